"""Safetensors files that notice when a single byte of them was changed.

The metadata holds the SHA-256 of the whole file, taken with the hash itself written as 64 zeros.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.folders import replace_file

__all__ = ["is_sealed", "read_sealed", "write_sealed"]

_ZEROS = b"0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def write_sealed(
    path: str | Path, schema: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> None:
    """Write tensors and JSON values as safetensors, whole or not at all.

    :param schema: what the file holds and its version, for example ``"aimet_ext.scales/1"``.
    :param fields: JSON values; strings are stored as they are, the rest as JSON text.
    """
    texts = {key: _to_text(value) for key, value in fields.items()}
    metadata = {**texts, "schema": schema, "sha256": _ZEROS.decode()}
    contiguous = {name: _on_cpu(tensor) for name, tensor in tensors.items()}
    content = save(contiguous, metadata)
    digest = hashlib.sha256(content).hexdigest().encode()
    replace_file(path, content.replace(b'"sha256":"' + _ZEROS, b'"sha256":"' + digest, 1))


def read_sealed(path: str | Path, schema: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read back what :func:`write_sealed` wrote: tensors, and the fields as texts.

    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: the file is not safetensors, not of that schema, cut short, or one of
        its bytes was changed.
    """
    path = Path(path)
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    seals = list(_SEAL.finditer(content[:header_end]))
    if len(seals) != 1:
        raise CorruptFileError(
            f"{path}: a file of schema {schema!r} is required, but it carries no hash of aimet_ext;"
            " it is damaged or was written by another program"
        )
    start, stop = seals[0].span(1)
    blank = content[:start] + _ZEROS + content[stop:]
    if hashlib.sha256(blank).hexdigest().encode() != seals[0][1]:
        raise CorruptFileError(
            f"{path} is not as it was written (its hash differs); write it again from its source"
        )
    try:
        tensors = load(content)
        metadata = json.loads(content[8:header_end])["__metadata__"]
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("schema") != schema:
        raise CorruptFileError(
            f"{path}: a file of schema {schema!r} is required, got {metadata.get('schema')!r}"
        )
    return tensors, metadata


def is_sealed(path: str | Path, schema: str) -> bool:
    """Whether a file is a sound one of that schema."""
    try:
        read_sealed(path, schema)
    except (OSError, CorruptFileError):
        return False
    return True


def _on_cpu(tensor: Tensor) -> Tensor:
    # A copy of its own: tensors that share memory are refused by safetensors.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
