"""Exceptions of aimet_ext, findings of its checks, and the import of optional packages."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the ``pip install`` line."""


class CorruptFileError(ValueError):
    """A file read back from disk is damaged, was changed, or was not written by aimet_ext."""


class TransformRefused(ValueError):
    """A function-preserving transform does not hold on the model at hand."""


@dataclass(frozen=True)
class Finding:
    """One fault.

    :param check: name of the check, for example ``"bias"``.
    :param name: tensor, layer or file.
    :param message: value that is required there, and the one that was found.
    :param remedy: action that removes the fault.
    """

    check: str
    name: str
    message: str
    remedy: str

    def to_json(self) -> dict[str, str]:
        """Return the fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.check}: {self.name}: {self.message}; {self.remedy}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    :param module: dotted name of the module to import.
    :param extra: the extra of ``aimet-ext`` that installs it.
    :raises MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module} is needed here and is not installed. "
            f'Install it with: pip install "aimet-ext[{extra}]"'
        ) from error


def faults_of(error: Any) -> list[str]:
    """Return each fault of settings: its place, what is required there, and what came.

    :param error: ``pydantic.ValidationError``.
    """
    found = []
    for fault in error.errors(include_url=False):
        place = "".join(f"{part}: " for part in [".".join(map(str, fault["loc"]))] if part)
        said = fault["type"] == "value_error"  # by this package, and the value in it
        given = "" if said or "missing" in fault["type"] else f", got {fault['input']!r}"
        found.append(f"{place}{str(fault['msg']).removeprefix('Value error, ')}{given}")
    return found


def some(names: Sequence[str], most: int = 4) -> str:
    """Return the first few names, and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
