"""Files of graphs with a cache: their shared weights, and the graphs run in onnxruntime."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimet_ext.errors import CorruptFileError, require
from aimet_ext.files.manifest import read_manifest
from aimet_ext.files.reading import naming
from aimet_ext.models.kv_cache import CacheShape, Run, TokenCache, run_with_cache
from aimet_ext.onnx.reading import read_model
from aimet_ext.onnx.session import open_session

KIND = "cache"
FLOAT, QDQ = ".onnx", ".qdq.onnx"
_SMALLEST = 1024  # bytes of what is stored outside; smaller constants stay in their model
_ALIGNMENT = 4096  # so that a reader can map each tensor into memory


@dataclass(frozen=True)
class CacheGraphs:
    """Graphs of one model that share a cache.

    :param shape: Shape of the cache.
    :param mask_value: Value of their masks for tokens that are not seen.
    :param calls: Function that runs a call, by the number of its tokens.
    """

    shape: CacheShape
    mask_value: float
    calls: Mapping[int, Run]

    def cache(self) -> TokenCache:
        """Return an empty cache for these graphs."""
        return TokenCache(self.shape, mask_value=self.mask_value)

    def logits(self, ids: Tensor, prompt: int | None = None) -> Tensor:
        """Return logits ``[1, seq, vocab]`` of ids ``[1, seq]``, on an empty cache.

        :param prompt: Number of ids that the longer graph takes; None: all.
        """
        return run_with_cache(self.calls, self.cache(), ids, prompt)


@dataclass(frozen=True)
class CacheFiles:
    """Files of the graphs, and the shapes of their inputs.

    :param folder: Folder of the graphs.
    :param lengths: Tokens of a call by the graph's name.
    :param shape: Shape of the cache.
    :param mask_value: Value of their masks for tokens that are not seen.
    """

    folder: Path
    lengths: Mapping[str, int]
    shape: CacheShape
    mask_value: float

    def path(self, name: str, ending: str = FLOAT) -> Path:
        """Return the file of a graph."""
        return self.folder / f"{name}{ending}"

    def feed(self, length: int) -> dict[str, Tensor]:
        """Return the inputs of a call of ``length`` tokens, all of them 0, on an empty cache."""
        ids = torch.zeros(1, length, dtype=torch.long)
        return TokenCache(self.shape, mask_value=self.mask_value).feed(ids, length)

    def in_onnxruntime(self, ending: str = FLOAT) -> CacheGraphs:
        """Return the graphs, ready to run in onnxruntime on the CPU."""
        calls = {
            length: _onnx_call(self.path(name, ending), self.shape)
            for name, length in self.lengths.items()
        }
        return CacheGraphs(self.shape, self.mask_value, calls)


def load_cache_graphs(path: str | Path, *, qdq: bool = False) -> CacheGraphs:
    """Load the graphs that :func:`aimet_ext.export_with_cache` wrote, ready to run.

    :param path: Folder, every file of which is compared with its hash.
    :param qdq: True for the quantized graphs instead of the float ones.
    :raises CorruptFileError: a file was changed, is absent, or the folder holds something else.
    :raises ValueError: there are no quantized graphs.

    >>> graphs = load_cache_graphs("out", qdq=True)
    >>> logits = graphs.logits(ids, prompt=48)
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest["kind"] != KIND:
        raise CorruptFileError(
            f"{folder}: graphs with a cache are required, got {manifest['kind']!r}"
        )
    if qdq and not manifest.get("qdq"):
        raise ValueError(
            f"{folder} holds no quantized graphs; export with a dataloader, which calibrates the "
            "tensors that only an NPU quantizes"
        )
    with naming(folder):
        shape = CacheShape.from_dict(manifest["cache"])
        files = CacheFiles(folder, manifest["graphs"], shape, manifest["mask_value"])
        return files.in_onnxruntime(QDQ if qdq else FLOAT)


def _onnx_call(path: Path, shape: CacheShape) -> Run:
    """Return a function that runs a graph in onnxruntime on the CPU."""
    # The integers of 4-bit weights are multiplied by float32 activations, as in a simulation.
    session = open_session(path, entries={"session.qdq_matmulnbits_accuracy_level": "1"})
    names = shape.output_names()

    def call(feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: list[Any] = session.run(names, {name: t.numpy() for name, t in feed.items()})
        return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}

    return call


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
            before = read_model(path, external=False)
            own = {
                entry.value
                for proto in before.graph.initializer
                for entry in proto.external_data
                if entry.key == "location"
            }
            model = read_model(path)
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
