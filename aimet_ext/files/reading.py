"""Files as they are read back: regular, bounded, of the expected form, or refused by their name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from aimet_ext.errors import CorruptFileError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

# A tokenizer of 250,000 tokens has 35 MB, the encodings of a model of 70 billion weights 300 MB.
LARGEST_JSON = 1 << 30
_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")  # of the pairs that UTF-16 writes some characters as


@contextmanager
def naming(
    place: str | Path, *through: type[Exception], problem: str = "it does not hold what it must"
) -> Iterator[None]:
    """Turn an error of whatever kind, met while a file's content is used, into one that names it.

    :param place: File or folder.
    :param through: Kinds of errors that are not about the file.
    :param problem: What is wrong then.
    :raises CorruptFileError: Anything was raised.
    """
    try:
        yield
    except CorruptFileError as error:
        if str(place) in str(error):
            raise
        raise CorruptFileError(f"{place}: {error}") from error
    except Exception as error:
        if isinstance(error, (MissingExtraError, OSError, MemoryError, *through)):
            raise
        said = " ".join(str(error).split())[:300]
        raise CorruptFileError(f"{place}: {problem} ({type(error).__name__}: {said})") from error


def check_regular(path: str | Path) -> Path:
    """Return the path of a regular file: devices and pipes, which never end, are refused.

    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: it is a folder, a device or a pipe.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is required and is absent")
    if not path.is_file():
        raise CorruptFileError(f"{path}: a regular file is required, but it is none")
    return path


def read_text(path: str | Path) -> str:
    """Return the content of a text file in UTF-8, or in UTF-16 that begins with a byte order mark.

    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: it is in another encoding, or no regular file.
    """
    content = check_regular(path).read_bytes()
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFileError(
            f"{path}: text in UTF-8 is required, but byte {error.start} is none; save it in UTF-8"
        ) from error


def read_json(path: str | Path, kind: Any = dict[str, Any]) -> Any:
    """Read a JSON file whose content must be of a type that pydantic can validate.

    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: it is not JSON, too large, or its content is of another type.
    """
    path = check_regular(path)
    if path.stat().st_size > LARGEST_JSON:
        raise CorruptFileError(f"{path}: at most {LARGEST_JSON} bytes of JSON are read")
    return parse_json(path.read_bytes(), path, kind)


def parse_json(text: str | bytes, place: object, kind: Any = Any) -> Any:
    """Return the value of a JSON text that was read from a file.

    :param place: Where it stands, for the error.
    :raises CorruptFileError: it is not JSON, or its value is of another type.
    """
    try:
        value = json.loads(text)
        if _HALVES.search(text.encode() if isinstance(text, str) else text):
            json.dumps(value, ensure_ascii=False).encode()  # what no file could be written with
        return TypeAdapter(kind).validate_python(value)
    except RecursionError as error:
        raise CorruptFileError(f"{place} is nested too deeply to be read") from error
    except ValidationError as error:
        raise CorruptFileError(f"{place} does not hold what it must: {error}") from error
    except ValueError as error:
        raise CorruptFileError(f"{place} is not JSON: {error}") from error


def open_safetensors(path: str | Path) -> Any:
    """Return an open safetensors file, whose tensors are read one by one.

    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: it is damaged or cut short.
    """
    try:
        return safe_open(check_regular(path), framework="pt")
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is no sound safetensors file: {error}") from error


class TensorFile(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file, each read when it is asked for and not kept.

    :param path: path of the file, which stays open.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: it is damaged or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._file = path, open_safetensors(path)
        self._names = dict.fromkeys(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            # A copy: the file may be written anew while its tensors are in use.
            found: Tensor = self._file.get_tensor(name).clone()
        except SafetensorError as error:
            raise CorruptFileError(f"{self.path} is no sound safetensors file: {error}") from error
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors, on the CPU, and the metadata of a safetensors file.

    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: it is damaged or cut short.
    """
    file = TensorFile(path)
    return dict(file), file.metadata
