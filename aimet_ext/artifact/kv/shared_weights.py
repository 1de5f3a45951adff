"""Weights that several ONNX files share, stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from aimet_ext.errors import require

__all__ = ["share_weights"]

_SMALLEST = 1024  # bytes of what is stored outside; smaller constants stay in their model
_ALIGNMENT = 4096  # so that a reader can map each tensor into memory


def share_weights(paths: Sequence[Path], name: str) -> int:
    """Move the initializers of ONNX files to one file beside them, equal ones once.

    Files of external data that a model had before are removed.

    :param paths: ONNX files of one folder.
    :param name: Name of the file for their weights.
    :returns: bytes of that file.
    """
    onnx = require("onnx", "onnx")
    folder = paths[0].parent
    places: dict[bytes, tuple[int, int]] = {}
    with (folder / name).open("wb") as file:
        for path in paths:
            before = onnx.load(str(path), load_external_data=False)
            own = {
                entry.value
                for proto in before.graph.initializer
                for entry in proto.external_data
                if entry.key == "location"
            }
            model = onnx.load(str(path))
            for proto in model.graph.initializer:
                values = proto.raw_data
                if len(values) < _SMALLEST:
                    continue
                key = hashlib.sha256(values).digest()
                if key not in places:
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    places[key] = (file.tell(), len(values))
                    file.write(values)
                offset, length = places[key]
                onnx.external_data_helper.set_external_data(proto, name, offset, length)
                proto.ClearField("raw_data")
            path.write_bytes(model.SerializeToString())
            for other in own - {name}:
                (folder / other).unlink(missing_ok=True)
        return file.tell()
