"""The exported graph as compilers take it: with one adapter as constants, or all as inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load_file

from aimet_ext.errors import CorruptFileError, require
from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.files.manifest import read_manifest

if TYPE_CHECKING:
    import numpy as np


def encodings_file(prefix: str, adapter: str) -> str:
    """Return the name of an adapter's encodings file."""
    return f"{prefix}_{adapter}.encodings"


def bake_adapter(folder: str | Path, name: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Return the exported graph with one adapter's weights as constants, and its encodings.

    Compilers for NPUs take constants by channel, which as inputs they refuse; and tools that know
    nothing of adapters take such a graph as any other.

    :param folder: Folder that :func:`aimet_ext.lora.export` wrote.
    :param name: Name of the adapter.
    :returns: ``onnx.ModelProto``, and entries of encodings 1.0.0 by the names of their tensors,
        the base's and the adapter's.
    :raises CorruptFileError: a file was changed, or the folder is another one.
    :raises ValueError: there is no adapter of that name.

    >>> model, encodings = bake_adapter("llama-w4-lora", "poems")
    """
    onnx = require("onnx", "onnx")
    from aimet_ext.onnx.index import keep_where
    from aimet_ext.onnx.values import set_value

    folder, manifest = open_folder(folder)
    if name not in manifest["adapters"]:
        raise ValueError(
            f"the name of an adapter must be one of {manifest['adapters']}, got {name!r}"
        )
    model = onnx.load(str(folder / f"{manifest['prefix']}.onnx"))
    weights = load_file(folder / f"{name}.safetensors")
    for proto in model.graph.initializer:
        if proto.name in weights:
            set_value(proto, weights[proto.name])
    keep_where(model.graph.input, lambda value: value.name not in weights)
    return model, _encodings(folder, manifest["prefix"], name)


def shared_graph(
    folder: str | Path,
) -> tuple[Any, dict[str, dict[str, Any]], dict[str, dict[str, np.ndarray[Any, Any]]]]:
    """Return the exported graph with adapters' weights as inputs, and one set of encodings.

    Once compiled, it computes with whichever adapter it is fed. HTP takes it where the weights have
    one range for each tensor.

    :param folder: Folder that :func:`aimet_ext.lora.export` wrote, of adapters that were quantized
        with ``quantize(..., shared=True)``.
    :returns: ``onnx.ModelProto``; entries of encodings 1.0.0 by tensor; and for each adapter the
        inputs that it fills.
    :raises CorruptFileError: a file was changed, or the folder is another one.
    :raises ValueError: the adapters have encodings of their own.

    >>> model, encodings, adapters = shared_graph("llama-w4-lora")
    """
    onnx = require("onnx", "onnx")
    from aimet_ext.onnx.index import keep_where

    folder, manifest = open_folder(folder)
    names, prefix = manifest["adapters"], manifest["prefix"]
    encodings = [_encodings(folder, prefix, name) for name in names]
    others = [name for name, one in zip(names, encodings, strict=True) if one != encodings[0]]
    if others:
        raise ValueError(
            f"adapters that share their encodings are required, but {', '.join(others)} and "
            f"{names[0]} do not; quantize all of them in one call with shared=True"
        )
    model = onnx.load(str(folder / f"{prefix}.onnx"))
    feeds = {name: dict(load_file(folder / f"{name}.safetensors")) for name in names}
    keep_where(model.graph.initializer, lambda proto: proto.name not in feeds[names[0]])
    return model, encodings[0], feeds


def open_folder(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of adapters and its manifest, after all hashes were compared.

    :raises CorruptFileError: a file was changed, or the folder is another one.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest["kind"] != "lora":
        raise CorruptFileError(
            f"{folder}: a folder of aimet_ext.lora.export is required, got {manifest['kind']!r}"
        )
    return folder, manifest


def _encodings(folder: Path, prefix: str, name: str) -> dict[str, dict[str, Any]]:
    """Return the encodings of the base and of an adapter."""
    encoded = entries(load_encodings(folder / f"{prefix}.encodings"))
    return {**encoded, **entries(load_encodings(folder / encodings_file(prefix, name)))}
