"""Writing the file that makes Olive use this package's pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aimet_ext.errors import CorruptFileError
from aimet_ext.integrations.olive_config import package_config

__all__ = ["write_package_config"]


def write_package_config(output: Path, base: Path | None) -> None:
    """Write Olive's package configuration with the pass of this package in it.

    :param base: another package configuration to start from; None for Olive's own.
    :raises FileExistsError: ``output`` is a file that is no such configuration.
    :raises CorruptFileError: ``base`` is no JSON.
    :raises ValueError: ``base`` is no package configuration.
    """
    merged = package_config(None if base is None else _read(base))
    if output.exists():
        _check_ours(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(merged, indent=4) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} must be a JSON file, but {error}") from error


def _check_ours(path: Path) -> None:
    """Refuse to replace what this package did not write."""
    try:
        passes = json.loads(path.read_text("utf-8"))["passes"].values()
        ours = any(entry["module_path"].startswith("aimet_ext.") for entry in passes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise FileExistsError(
            f"{path} is there and was not written by this command; name another file with --output"
        )
