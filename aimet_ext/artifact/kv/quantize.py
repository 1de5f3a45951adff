"""Graphs with a cache as an NPU computes them, with the ranges of the graph without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from onnx.numpy_helper import to_array

from aimet_ext.artifact.hand_off import HandOff
from aimet_ext.artifact.kv.run import CacheFiles
from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.models.kv_cache import CacheShape
from aimet_ext.onnx.index import stored_values
from aimet_ext.onnx.reading import read_model
from aimet_ext.onnx.rewrite.compilable import fold_constants
from aimet_ext.onnx.rewrite.kv import moved_from, same_tensors, separate_outputs
from aimet_ext.onnx.rewrite.rotate import turned_tensors
from aimet_ext.sim.onnx.build import build_target
from aimet_ext.sim.onnx.ranges import (
    put_encodings,
    put_rotations,
    quantize_activations,
    take_ranges,
)
from aimet_ext.sim.onnx.state import enabled_quantizers


@dataclass(frozen=True, eq=False)
class Reference:
    """A simulation without a cache, as an NPU computes it.

    :param hand_off: Hand-off with all ranges.
    :param graph: Its float model, constant parts folded.
    """

    hand_off: HandOff
    graph: Any

    @classmethod
    def of(cls, found: HandOff) -> Reference:
        """Return the reference of a hand-off whose folder is still there."""
        encoded = entries(load_encodings(found.folder / f"{found.prefix}.encodings"))
        model = read_model(found.folder / f"{found.prefix}.onnx")
        return cls(found, fold_constants(model, keep=encoded))


def quantized_graph(
    files: CacheFiles,
    name: str,
    reference: Reference,
    *,
    config_file: str | Mapping[str, Any],
    kv_bitwidth: int | None = None,
) -> Any:
    """Build an ``aimet_onnx`` simulation of a graph with a cache.

    Ranges of its encodings file are taken from there. All other ranges are those of the same
    tensors of ``reference``; caches have the range of the keys and values that are put into them,
    the mask and the tables of positions the range of what they hold. Nothing is calibrated.

    :param name: Name of the graph, its encodings beside it.
    :param reference: The same simulation without a cache.
    :param config_file: Configuration of AIMET, that of ``reference``.
    :param kv_bitwidth: Bits of the cache; None: those of the keys and values.
    :raises ValueError: a tensor is quantized that the reference does not have.
    """
    path = files.path(name)
    encoded = entries(load_encodings(path.with_suffix(".encodings")))
    model = fold_constants(read_model(path), keep=encoded)
    turned = turned_tensors(model)
    encoded = {each: entry for each, entry in encoded.items() if each not in turned}
    if kv_bitwidth is not None:
        separate_outputs(model, _cache_names(files.shape)[1])
    sources = _Sources(model, reference.graph, files.shape)
    ranges = enabled_quantizers(reference.hand_off.sim)
    widths = Counter(ranges[name].bitwidth for name in reference.hand_off.added)
    sim = build_target(
        model,
        config_file,
        activation_bits=max(widths, key=widths.__getitem__, default=16),
        sample={name: value.numpy() for name, value in files.feed(files.lengths[name]).items()},
    )
    loaded = put_encodings(sim, encoded)
    narrow = {} if kv_bitwidth is None else dict.fromkeys(sources.cache_names(), kv_bitwidth)
    quantize_activations(sim, dict.fromkeys(narrow))
    turns = put_rotations(sim)
    others = [name for name in loaded.others(sim) if name not in turns]
    same, fixed = sources.ranges(others, ranges.keys(), files.mask_value)
    take_ranges(sim, reference.hand_off.sim, same, fixed, bitwidths=narrow)
    return sim


class _Sources:
    """Tensors of a graph with a cache in the graph without one.

    :param model: Graph with a cache, its constants folded.
    :param plain: Graph without one, its constants folded.
    """

    def __init__(self, model: Any, plain: Any, shape: CacheShape) -> None:
        self._plain_moved = moved_from(plain)
        past, self._present = _cache_names(shape)
        inputs = {value.name for value in model.graph.input}
        pairs = zip(past, self._present, strict=True)
        self._past = {name: new for name, new in pairs if name in inputs}
        self._joined = {
            node.output[0]: next(name for name in node.input if name in self._past)
            for node in model.graph.node
            if node.op_type == "Concat" and any(name in self._past for name in node.input)
        }
        tables = {
            node.output[0]: node.input[0]
            for node in model.graph.node
            if node.op_type == "Gather" and node.input[1] == "position_ids"
        }
        self._before = {**self._past, **tables, **self._joined, **moved_from(model)}
        self._constants = stored_values(model.graph)
        self._same = same_tensors(plain, model, frozenset({*self._joined, *tables}))

    def ranges(
        self, names: list[str], known: Collection[str], mask_value: float
    ) -> tuple[dict[str, str], dict[str, tuple[float, float]]]:
        """Return each name's tensor of the reference, or ``(min, max)`` where that is known.

        :param known: Tensors of the reference with a quantizer in use.
        :raises ValueError: neither is there for a name; all such are named.
        """
        same: dict[str, str] = {}
        fixed: dict[str, tuple[float, float]] = {}
        missing = []
        for name in names:
            origin = self._origin(name)
            source = self._reference(origin, known)
            if origin == "attention_mask":
                fixed[name] = (mask_value, 0.0)
            elif origin in self._constants:
                values = to_array(self._constants[origin])
                fixed[name] = (float(values.min()), float(values.max()))
            elif source is not None:
                same[name] = source
            else:
                missing.append(name)
        if missing:
            raise ValueError(
                "the simulation without a cache must have a range for every tensor that the one "
                f"with a cache quantizes, but has none for {', '.join(missing[:5])}"
            )
        return same, fixed

    def cache_names(self) -> tuple[str, ...]:
        """Return the names of caches that come in, of what is added to them, and of both joined."""
        return (*self._past, *self._present, *self._joined)

    def _origin(self, name: str) -> str:
        """Return the tensor whose values these are, or which they are joined with."""
        while name in self._before:
            name = self._before[name]
        return name

    def _reference(self, origin: str, known: Collection[str]) -> str | None:
        found = self._same.get(origin)
        while found is not None and found not in known:
            found = self._plain_moved.get(found)
        return found


def _cache_names(shape: CacheShape) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the caches that come in, and of what is added to each of them."""
    return shape.past_names(1), shape.output_names()[1:]
