"""A quantization simulation of an ONNX file, with the ranges that an encodings file gives it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aimet_onnx
import numpy as np
import onnx
import torch
from aimet_onnx.common.quantsim_config.quantsim_config import _get_config_file
from aimet_onnx.qc_quantize_op import QcQuantizeOp

from aimet_ext.config import LPBQ, Blockwise, Granularity, PerChannel, PerTensor, QSpec
from aimet_ext.core.affine import Grid, fake_quantize
from aimet_ext.onnx.index import MOVES
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.sim.onnx.quantizer_state import calibrate_on, load_scale, uninitialize
from aimet_ext.sim.onnx.quantizers import OnnxWeightQuantizer
from aimet_ext.sim.onnx.setup import aimet_spec
from aimet_ext.sim.onnx.state import enabled_quantizers
from aimet_ext.sim.protocol import adapt

__all__ = [
    "Loaded",
    "build_target_sim",
    "calibrate_added",
    "insert_quantizers",
    "only_these",
    "put_encodings",
]

Entry = Mapping[str, Any]
# Of an entry, its tensor's shape (none for a single range) and the axis of its channels.
GridOf = Callable[[Entry, tuple[int, ...], int], Grid]

# Widths that a QDQ model has types for.
_WIDTHS = (4, 8, 16)


@dataclass(frozen=True)
class Loaded:
    """Where encodings went.

    :param quantizers: tensors that have a quantizer with a range of the file.
    :param moved: encoded outputs of nodes that only move values, whose source has that range.
    :param tables: lookup tables that lie on their grid in the graph, row by row; their quantizer
        has one scale of 16 bits, which adds next to nothing.
    """

    quantizers: tuple[str, ...]
    moved: tuple[str, ...]
    tables: tuple[str, ...]


def build_target_sim(
    model: onnx.ModelProto,
    config: str | Mapping[str, Any],
    *,
    activation_bits: int = 16,
    sample: Mapping[str, Any] | None = None,
) -> Any:
    """A simulation with quantizers wherever a target has them; ranges are still to be set.

    MatMul and the Add of a bias stay apart: HTP drops the float bias of an LPBQ layer that AIMET
    took for one operator.

    :param model: float model; it becomes part of the simulation.
    :param config: AIMET's alias or the content of a configuration.
    :param sample: inputs as arrays, to find types with.
    """
    content = _content(config)
    fusions = [each for each in content.get("supergroup_pass_list", ()) if each != "MatmulAdd"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        content = {**content, "supergroup_pass_list": fusions}
        path.write_text(json.dumps(content), encoding="utf-8")
        return aimet_onnx.QuantizationSimModel(
            model,
            config_file=str(path),
            param_type="int8",
            activation_type=f"int{activation_bits}",
            dummy_input=None if sample is None else dict(sample),
            providers=["CPUExecutionProvider"],
        )


def _content(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """The content of a configuration, also of one that AIMET has an alias for."""
    if not isinstance(config, str):
        return dict(config)
    content: dict[str, Any] = json.loads(Path(_get_config_file(config)).read_text("utf-8"))
    return content


def put_encodings(sim: Any, encoded: Mapping[str, Entry], grid_of: GridOf) -> Loaded:
    """Give a simulation's quantizers the ranges of a file, and its weights their quantized values.

    Quantizers of other tensors are left as they are. A range that is shared by what the file knows
    and what it does not is no longer shared.

    :param encoded: entries of encodings 1.0.0 by tensor.
    :param grid_of: the grid of an entry, of the tensor's shape and the axis of its channels.
    :raises ValueError: the model lacks a tensor; all such are named and nothing changes.
    """
    return _Loader(sim, encoded, grid_of).load()


def calibrate_added(
    sim: Any, names: Collection[str], batches: Sequence[Mapping[str, np.ndarray[Any, Any]]]
) -> None:
    """Set the ranges of these quantizers from batches, all others frozen and in use."""
    for name, quantizer in enabled_quantizers(sim).items():
        if name not in names:
            quantizer.freeze_encodings()
    sim.compute_encodings([dict(batch) for batch in batches])


def insert_quantizers(sim: Any, bitwidths: Mapping[str, int]) -> None:
    """Have these activations be quantized, each by a quantizer of its own without a range yet."""
    for name, bits in bitwidths.items():
        if name not in sim.qc_quantize_op_dict:
            sim._insert_quantizer(name, is_param=False)
            sim.activation_names.append(name)
        quantizer = sim.qc_quantize_op_dict[name]
        quantizer.enabled = True
        quantizer.set_precision(aimet_onnx.qtype.int(bits))
    sim._rebuild_session()


@contextmanager
def only_these(sim: Any, names: Collection[str]) -> Iterator[None]:
    """Context in which no quantizer but these is in use."""
    off = [q for name, q in enabled_quantizers(sim).items() if name not in names]
    kept = {id(q) for name, q in enabled_quantizers(sim).items() if name in names}
    off = [q for q in off if id(q) not in kept]
    try:
        for quantizer in off:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in off:
            quantizer.enabled = True


class _Loader:
    """Puts the entries of one file into one simulation."""

    def __init__(self, sim: Any, encoded: Mapping[str, Entry], grid_of: GridOf) -> None:
        self.sim, self.encoded, self.grid_of = sim, encoded, grid_of
        adaptor: Any = adapt(sim)
        self.adaptor, self.graph = adaptor, adaptor.graph
        self.layers = {layer.weight: layer for layer in adaptor.layers.values()}
        self.quantizers: list[str] = []
        self.moved: list[str] = []
        self.tables: list[str] = []

    def load(self) -> Loaded:
        products = self.sim.connected_graph.get_all_products()
        absent = [
            name
            for name in self.encoded
            if name not in products and name not in self.sim.qc_quantize_op_dict
        ]
        if absent:
            raise ValueError(
                "an ONNX file with every tensor of its encodings is required, but it has none "
                f"named {', '.join(absent[:5])}; export the model again"
            )
        places = {name: self._place(name) for name in self.encoded}
        targets = {name: place for name, place in places.items() if place is not None}
        self.moved = [name for name, place in places.items() if place != name]
        self._insert(set(targets.values()))
        self._untie(set(targets.values()))
        for name, place in targets.items():
            if self.graph.constant(place) is not None:
                self._put_constant(place, self.encoded[name])
            else:
                self._put_tensor(place, self.encoded[name])
                self.quantizers.append(place)
        self.adaptor.touch()
        self.adaptor.refresh()
        return Loaded(tuple(self.quantizers), tuple(self.moved), tuple(self.tables))

    def _place(self, name: str) -> str | None:
        """Tensor whose quantizer does what an encoding says; None if another one already does."""
        source, alone = name, True
        while (node := self._mover(source)) is not None:
            source = node.input[0]
            alone = alone and len(self.graph.consumers.get(source, ())) == 1
            if source in self.encoded:
                return None if _same(self.encoded[source], self.encoded[name]) else name
        return source if alone else name

    def _mover(self, name: str) -> Any:
        """The node that makes a tensor by moving values, None for any other."""
        index = self.graph.producer.get(name)
        if index is None:
            return None
        node = self.graph.nodes[index]
        return node if node.op_type in MOVES else None

    def _insert(self, names: Collection[str]) -> None:
        for name in sorted(names):
            if name not in self.sim.qc_quantize_op_dict:
                self.sim._insert_quantizer(name, is_param=False)
                self.sim.qc_quantize_op_dict[name].enabled = False
                self.sim.activation_names.append(name)

    def _untie(self, names: set[str]) -> None:
        """Give each loaded tensor a quantizer of its own."""
        users: dict[int, list[str]] = {}
        for name, quantizer in self.sim.qc_quantize_op_dict.items():
            users.setdefault(id(quantizer), []).append(name)
        own = {}
        for shared in users.values():
            if len(shared) > 1:
                for name in names & set(shared):
                    own[name] = self.sim.qc_quantize_op_dict[name]._copy()
        if own:
            self.sim._set_quantizers(own, rebuild_session=False)

    def _put_constant(self, name: str, entry: Entry) -> None:
        """Put a stored value on its grid, and set its quantizer."""
        value = self.graph.tensor(name)
        layer = self.layers.get(name)
        single = entry["enc_type"] == "PER_TENSOR"
        axis = int(layer is not None and layer.transposed)
        grid = self.grid_of(entry, () if single else tuple(value.shape), axis)
        self.graph.set_tensor(name, fake_quantize(value, grid))
        quantizer = self.sim.qc_quantize_op_dict[name]
        if grid.scale.numel() == 1:
            self._put_tensor(name, entry)
            self.quantizers.append(name)
        elif layer is None or name not in self.sim.param_names:
            _put_table(quantizer, self.graph.array(name))
            self.tables.append(name)
        else:
            self._put_weight(layer, quantizer, entry, grid)
            self.quantizers.append(name)

    def _put_tensor(self, name: str, entry: Entry) -> None:
        """One range for a whole tensor."""
        quantizer = self.sim.qc_quantize_op_dict[name]
        grid = _contained(self.grid_of(entry, (), 0))
        uninitialize(quantizer, parameter=False)
        quantizer.quant_info.usePerChannelMode = False
        quantizer._scale_quantizer = None
        quantizer._encoding_min_max_fixed_vals = None
        quantizer.set_precision(aimet_onnx.qtype.int(_bits(grid)))
        quantizer.use_symmetric_encodings = bool(entry["is_sym"])
        quantizer.enabled = True
        first = float(grid.offset) + grid.qmin
        load_scale(quantizer, [float(grid.scale)], [first], grid.qmax - grid.qmin)
        quantizer.freeze_encodings()

    def _put_weight(
        self, layer: OnnxLayer, quantizer: QcQuantizeOp, entry: Entry, grid: Grid
    ) -> None:
        grid = _contained(grid)
        quantizer._is_encoding_frozen = False
        quantizer.enabled = True
        spec = QSpec(
            bitwidth=_bits(grid), symmetric=bool(entry["is_sym"]), granularity=_granularity(entry)
        )
        quantizer.set_qspec(aimet_spec(spec))
        weight = OnnxWeightQuantizer(layer.name, self.graph, layer, quantizer, self.adaptor.touch)
        scale, offset = grid.scale, grid.offset
        if layer.transposed:
            scale, offset = scale.transpose(0, 1), offset.transpose(0, 1)
        first = offset + grid.qmin - weight.qmin  # AIMET's own smallest integer may be another
        weight.set_scale(scale, None if spec.symmetric else first)
        weight.freeze()


def _put_table(quantizer: QcQuantizeOp, values: np.ndarray[Any, Any]) -> None:
    """One scale of 16 bits for a table that lies on a grid of its own, row by row."""
    uninitialize(quantizer, parameter=False)
    quantizer.set_precision(aimet_onnx.qtype.int(16))
    quantizer.use_symmetric_encodings = False
    quantizer.enabled = True
    calibrate_on(quantizer, values)
    quantizer.freeze_encodings()


def _granularity(entry: Entry) -> Granularity:
    kind = entry["enc_type"]
    if kind == "LPBQ":
        return LPBQ(entry["block_size"], entry["bw"] - entry["compressed_bw"])
    if kind == "PER_BLOCK":
        return Blockwise(entry["block_size"])
    return PerChannel() if kind == "PER_CHANNEL" else PerTensor()


def _contained(grid: Grid) -> Grid:
    """A grid of a width that ONNX has a type for, with all points of the one given."""
    bits = _bits(grid)
    if bits in _WIDTHS and not grid.zero_point_shift:
        return grid
    wider = next(width for width in _WIDTHS if width >= bits)
    scale, offset, low = grid.scale, grid.offset, grid.qmin
    if grid.zero_point_shift:  # (q + 1/2) s = (2 q + 1) s / 2
        scale, offset = scale / 2, torch.zeros_like(offset)
    if low < 0:
        low = -(1 << wider - 1)
    return replace(
        grid,
        scale=scale,
        offset=offset,
        qmin=low,
        qmax=low + (1 << wider) - 1,
        zero_point_shift=0.0,
    )


def _bits(grid: Grid) -> int:
    return (grid.qmax - grid.qmin).bit_length()


def _same(one: Entry, two: Entry) -> bool:
    keys = ("bw", "scale", "offset", "enc_type")
    return all(one.get(key) == two.get(key) for key in keys)
