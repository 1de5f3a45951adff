"""Grids and ranges of an ONNX simulation: given, taken from a file or another one, calibrated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import aimet_onnx
import numpy as np
import torch
from aimet_onnx.common.defs import QuantizationDataType
from aimet_onnx.qc_quantize_op import QcQuantizeOp
from onnx import NodeProto

from aimet_ext.core.affine import Grid, fake_quantize
from aimet_ext.files.encodings import Layout, to_grid
from aimet_ext.onnx.index import MOVES
from aimet_ext.onnx.layers import OnnxLayer
from aimet_ext.onnx.rewrite.rotate import ENDING as ROTATION
from aimet_ext.onnx.rewrite.rotate import HADAMARD
from aimet_ext.sim.onnx.quantizers import (
    RAW_SCALE,
    calibrate_on,
    load_scale,
    quantizer_state,
    restore_quantizer,
    uninitialize,
    weight_quantizer_of,
)
from aimet_ext.sim.onnx.state import (
    absent_tensors,
    enabled_quantizers,
    insert_quantizers,
    rebuild_session,
    untie,
)
from aimet_ext.sim.protocol import Range, adapt
from aimet_ext.specs import LPBQ, Blockwise, Granularity, PerChannel, PerTensor, QSpec

if TYPE_CHECKING:
    from aimet_ext.onnx.layers import OnnxLayer
    from aimet_ext.sim.onnx.adaptor import OnnxSim

Entry = Mapping[str, Any]
# Widths that a QDQ model has types for.
_WIDTHS = (4, 8, 16)


def is_frozen(quantizer: QcQuantizeOp | None) -> bool:
    """Return True if an earlier technique froze the range of a quantizer."""
    return quantizer is not None and quantizer.is_encoding_frozen()


def parameter_quantizers(adaptor: OnnxSim) -> dict[str, QcQuantizeOp]:
    """Return the weight quantizers of layers, of any type, on or off.

    The table of an embedding has none: AIMET takes it for an activation.
    """
    known, quantizers = set(adaptor.sim.param_names), adaptor.sim.qc_quantize_op_dict
    return {n: quantizers[x.weight] for n, x in adaptor.layers.items() if x.weight in known}


def readers(adaptor: OnnxSim) -> dict[str, list[NodeProto]]:
    """Return the simulation's own nodes that read a tensor, quantized or not, by its name."""
    nodes = adaptor.sim.model.model.graph.node
    through = {n.output[0]: n.input[0] for n in nodes if n.op_type == "QcQuantizeOp"}
    found: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input if node.op_type != "QcQuantizeOp" else ():
            found.setdefault(through.get(name, name), []).append(node)
    return found


def body_names(adaptor: OnnxSim) -> dict[str, list[str]]:
    """Return the names of the nodes of each function of the simulation's model, by its domain."""
    functions = adaptor.sim.model.model.functions
    return {function.domain: [node.name for node in function.node] for function in functions}


def is_fused(node: NodeProto) -> bool:
    """Return True for what AIMET makes of MatMul and Add."""
    return node.domain.startswith("aimet.supergroup")


def put_grids(adaptor: OnnxSim, specs: Mapping[str, QSpec | None], undo: ExitStack) -> None:
    """Give layers their grids and ranges; all quantizers are made before any is changed.

    :param specs: Grid of each layer, None for a float weight.
    :param undo: Gets what puts every quantizer back.
    :raises ValueError: AIMET has no such grid for a layer.
    """
    quantizers = parameter_quantizers(adaptor)
    made: dict[str, tuple[Any, Any]] = {}
    for name, spec in specs.items():
        layer = adaptor.layers[name]
        if layer.weight not in made:
            own = quantizers.get(name)
            stored = adaptor.graph.array(layer.weight)
            copy = _weight_copy(name, own, spec, stored, layer.channel_axis)
            made[layer.weight] = (own, copy)
            made.update(_bias_copies(adaptor, layer, spec))
    for quantizer, copy in made.values():
        undo.callback(restore_quantizer, quantizer, *quantizer_state(quantizer))
        restore_quantizer(quantizer, *quantizer_state(copy))


def _weight_copy(
    name: str,
    quantizer: QcQuantizeOp | None,
    spec: QSpec | None,
    weight: np.ndarray[Any, Any],
    axis: int,
) -> QcQuantizeOp:
    """Copy a weight's quantizer, with a grid and the range that calibration would set."""
    if quantizer is None:
        raise ValueError(
            f"{name}: a weight for which the simulation has a quantizer is required, it has none "
            "(AIMET takes the table of an embedding for an activation); leave the layer out"
        )
    copy = _empty_copy(quantizer)
    copy.enabled = spec is not None
    if spec is None:
        return copy
    if not isinstance(spec.granularity, PerTensor):
        _check_axes(name, copy, spec, weight.ndim, axis)
    copy.set_qspec(aimet_spec(spec))
    calibrate_on(copy, weight)
    return copy


def _bias_copies(
    adaptor: OnnxSim, layer: OnnxLayer, spec: QSpec | None
) -> Iterator[tuple[str, tuple[QcQuantizeOp, QcQuantizeOp]]]:
    """Copy a bias's quantizer, with a range for each channel, as AIMET has it beside blocks.

    It stays off if it was.
    """
    name = layer.bias or ""
    bias = adaptor.sim.qc_quantize_op_dict.get(name)
    if bias is None or spec is None or isinstance(spec.granularity, PerTensor):
        return
    if bias.tensor_quantizer_params is None:  # of a lone Add, which has one scale
        return
    if bias.quant_info.usePerChannelMode or bias.is_encoding_frozen():
        return
    copy = _empty_copy(bias)
    copy.data_type = QuantizationDataType.int
    copy.use_symmetric_encodings = True
    copy.enable_per_channel_quantization()
    if copy.enabled:
        calibrate_on(copy, adaptor.graph.array(name))
    yield name, (bias, copy)


def _empty_copy(quantizer: QcQuantizeOp) -> QcQuantizeOp:
    """Copy a quantizer, with a C++ part of its own and no range."""
    copy = quantizer._copy()
    uninitialize(copy)
    setattr(copy, RAW_SCALE, None)
    return copy


def _check_axes(name: str, quantizer: QcQuantizeOp, spec: QSpec, dims: int, axis: int) -> None:
    own = quantizer.tensor_quantizer_params
    if own is None or own.channel_axis is None:
        raise ValueError(
            f"{name}: AIMET knows no channels of this weight and quantizes it per tensor only, "
            f"got {spec.granularity}; give it PerTensor() or leave it out"
        )
    if own.channel_axis % dims != axis:
        raise ValueError(
            f"{name}: output channels of the stored weight in dimension {axis} are required, but "
            f"AIMET takes dimension {own.channel_axis % dims} for them; give it PerTensor() or "
            "leave it out"
        )


def aimet_spec(spec: QSpec) -> aimet_onnx.QSpec:
    """Return a spec in AIMET's classes."""
    dtype, granularity = aimet_onnx.qtype.int(spec.bitwidth), spec.granularity
    if isinstance(granularity, LPBQ):
        return aimet_onnx.QSpec.lpbq(dtype, granularity.block_size, granularity.scale_bits)
    if isinstance(granularity, Blockwise):
        return aimet_onnx.QSpec.blockwise(dtype, granularity.block_size, symmetric=spec.symmetric)
    if isinstance(granularity, PerTensor):
        return aimet_onnx.QSpec.per_tensor(dtype, symmetric=spec.symmetric)
    return aimet_onnx.QSpec.per_channel(dtype, symmetric=spec.symmetric)


@dataclass(frozen=True)
class Loaded:
    """Tensors that encodings were given to.

    :param quantizers: Tensors that have a quantizer with a range of the file.
    :param moved: Encoded outputs of nodes that only move values, whose source has that range.
    :param tables: Lookup tables that lie on their grid in the graph, row by row; their quantizer
        has one scale of 16 bits, which adds next to nothing.
    """

    quantizers: tuple[str, ...]
    moved: tuple[str, ...]
    tables: tuple[str, ...]

    def others(self, sim: Any) -> list[str]:
        """Return the tensors whose quantizers are in use and have no range of the file."""
        return [n for n in enabled_quantizers(sim) if n not in (*self.quantizers, *self.tables)]


def put_encodings(sim: Any, encoded: Mapping[str, Entry]) -> Loaded:
    """Give a simulation's quantizers the ranges of a file's entries, and constants their values.

    Quantizers of other tensors are left as they are. A range that is shared by what the file knows
    and what it does not is no longer shared.

    :param encoded: Entries of encodings 1.0.0 by tensor.
    :raises ValueError: the model lacks a tensor; all such are named and nothing changes.
    """
    return _Loader(sim, encoded).load()


def calibrate_added(
    sim: Any, names: Collection[str], batches: Sequence[Mapping[str, np.ndarray[Any, Any]]]
) -> None:
    """Set the ranges of these quantizers from batches, all others frozen and in use."""
    for name, quantizer in enabled_quantizers(sim).items():
        if name not in names:
            quantizer.freeze_encodings()
    sim.compute_encodings([dict(batch) for batch in batches])


def put_rotations(sim: Any) -> tuple[str, ...]:
    """Give the matrices that turn queries and keys their ranges, which nothing may change.

    All entries of a Hadamard matrix have one size, so that its grid holds it exactly. Of a range
    that AIMET widens, against a bias that there is not, it would be another matrix. Other matrices
    get 16 bits, as 8 would cost more than they gain.

    :returns: their names.
    """
    adaptor: Any = adapt(sim)
    graph, every = adaptor.graph, enabled_quantizers(sim)
    names = tuple(name for name in every if name.endswith(ROTATION) and graph.is_stored(name))
    for name in names:
        if not name.startswith(HADAMARD):
            every[name].set_precision(aimet_onnx.qtype.int(16))
        calibrate_on(every[name], graph.array(name))
        every[name].freeze_encodings()
    return names


def quantize_activations(sim: Any, bitwidths: Mapping[str, int | None]) -> None:
    """Quantize these activations, to a width where one is given; they need ranges next."""
    insert_quantizers(sim, bitwidths)
    for name, bits in bitwidths.items():
        quantizer = sim.qc_quantize_op_dict[name]
        quantizer.enabled = True
        if bits is not None:
            quantizer.set_precision(aimet_onnx.qtype.int(bits))
    rebuild_session(sim)


def take_ranges(
    sim: Any,
    reference: Any,
    same: Mapping[str, str],
    fixed: Mapping[str, Range],
    *,
    bitwidths: Mapping[str, int],
) -> None:
    """Give quantizers of activations ranges, and freeze them. Those that were shared no longer are.

    :param sim: Simulation to change.
    :param reference: Simulation with all ranges.
    :param same: Tensor of ``reference`` whose range each tensor gets.
    :param fixed: ``(min, max)`` of further tensors.
    :param bitwidths: Widths of tensors that get another one than they have.
    """
    names, quantizers = [*same, *fixed], sim.qc_quantize_op_dict
    untie(sim, names)
    for name, source in same.items():
        shape = quantizers[name].tensor_quantizer_params
        state = quantizer_state(reference.qc_quantize_op_dict[source])
        restore_quantizer(quantizers[name], *state)
        quantizers[name].tensor_quantizer_params = shape
        quantizers[name].enabled = True
    for name, (low, high) in fixed.items():
        _put_range(quantizers[name], low, high)
    for name, bits in bitwidths.items():
        (encoding,) = quantizers[name].get_encodings()
        uninitialize(quantizers[name], parameter=False)  # a frozen one keeps its width
        quantizers[name].set_precision(aimet_onnx.qtype.int(bits))
        _put_range(quantizers[name], encoding.min, encoding.max)
    for name in names:
        quantizers[name].freeze_encodings()
    rebuild_session(sim)


def _put_range(quantizer: QcQuantizeOp, low: float, high: float) -> None:
    uninitialize(quantizer, parameter=False)
    quantizer.enabled = True
    calibrate_on(quantizer, np.array([low, high], dtype=np.float32))


class _Loader:
    """Loader of the entries of one file into one simulation."""

    def __init__(self, sim: Any, encoded: Mapping[str, Entry]) -> None:
        self.sim, self.encoded = sim, encoded
        adaptor: Any = adapt(sim)
        self.adaptor, self.graph = adaptor, adaptor.graph
        self.layers = {layer.weight: layer for layer in adaptor.layers.values()}
        self.quantizers: list[str] = []
        self.moved: list[str] = []
        self.tables: list[str] = []

    def load(self) -> Loaded:
        absent = absent_tensors(self.sim, self.encoded)
        if absent:
            raise ValueError(
                "an ONNX file with every tensor of its encodings is required, but it has none "
                f"named {', '.join(absent[:5])}; export the model again"
            )
        places = {name: self._place(name) for name in self.encoded}
        targets = {name: place for name, place in places.items() if place is not None}
        self.moved = [name for name, place in places.items() if place != name]
        insert_quantizers(self.sim, sorted(set(targets.values())))
        untie(self.sim, set(targets.values()))
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
        """Return the tensor whose quantizer an encoding sets; None if another encoding sets it."""
        source, alone = name, True
        while (node := self.graph.node(source)) is not None and node.op_type in MOVES:
            source = node.input[0]
            alone = alone and len(self.graph.consumers.get(source, ())) == 1
            if source in self.encoded:
                return None if _same(self.encoded[source], self.encoded[name]) else name
        return source if alone else name

    def _put_constant(self, name: str, entry: Entry) -> None:
        """Round a stored value to its grid, and set its quantizer."""
        value = self.graph.tensor(name)
        layer = self.layers.get(name)
        single = entry["enc_type"] == "PER_TENSOR"
        axis = 0 if layer is None else layer.channel_axis
        grid = _grid(entry, () if single else tuple(value.shape), axis)
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
        """Give a whole tensor one range."""
        quantizer = self.sim.qc_quantize_op_dict[name]
        grid = _contained(_grid(entry, (), 0))
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
        weight = weight_quantizer_of(self.graph, layer, quantizer, self.adaptor.touch)
        scale, offset = grid.scale, grid.offset
        if layer.channel_axis:
            scale, offset = scale.transpose(0, 1), offset.transpose(0, 1)
        first = (
            offset + grid.qmin - weight.layout.qmin
        )  # AIMET's own smallest integer may be another
        weight.set_scale(scale, None if spec.symmetric else first)
        weight.freeze()


def _grid(entry: Entry, shape: tuple[int, ...], axis: int) -> Grid:
    """Return the grid of an entry.

    :param shape: Shape of its tensor, empty for a single range.
    :param axis: Dimension of its channels.
    """
    scale_bits = entry["bw"] - entry["compressed_bw"] if "compressed_bw" in entry else None
    return to_grid(entry, Layout(shape, axis, scale_bits))


def _put_table(quantizer: QcQuantizeOp, values: np.ndarray[Any, Any]) -> None:
    """Give a table that lies on a grid of its own, row by row, one scale of 16 bits."""
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
    """Return a grid of a width that ONNX has a type for, with all points of the one given."""
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
