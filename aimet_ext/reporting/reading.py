"""Files of reports, read back strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.reading import check_regular, read_json

_LARGEST = 256 << 20  # bytes of a file that is read; 100,000 layers have 100 MB

T = TypeVar("T")


def plain_of(content: Any) -> dict[str, Any]:
    """Return a report as plain JSON values; infinities are words."""
    return dict(TypeAdapter(type(content)).dump_python(content, mode="json"))


def read_checked(path: Path, kind: type[T]) -> T:
    """Return the content of a file, nothing of which is converted or unknown.

    :param path: JSON file.
    :param kind: Class with the form of the file.
    :raises FileNotFoundError: there is none.
    :raises CorruptFileError: the file is none of this kind, or of another version of it.
    """
    if check_regular(path).stat().st_size > _LARGEST:
        raise CorruptFileError(f"{path}: a report of at most {_LARGEST} bytes is read")
    read_json(path)  # refuses what is not JSON, or nested too deeply
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptFileError(
            f"{path}: a file of format 1 that aimet_ext wrote is required ({where}: {first['msg']})"
        ) from error
