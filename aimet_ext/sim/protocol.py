"""The protocols of a quantization simulation, by concern, and the adaptor that meets them all."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Unpack

import torch
from torch import Tensor, nn

from aimet_ext.core.affine import Grid
from aimet_ext.core.clipping import GridLayout
from aimet_ext.data.batches import ForwardFn
from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.residual import ResidualEnds, Survey
from aimet_ext.models.topology import BlockTopology
from aimet_ext.sim.points import Points, Range
from aimet_ext.specs import LPBQ, Blockwise, Granularity, PerChannel, PerTensor, QSpec
from aimet_ext.walk.passes import BlockPass, WalkOptions
from aimet_ext.walk.walk import Streams, Walk

if TYPE_CHECKING:
    from aimet_ext.sim.facts import SimFacts

# Root package of a simulation's class -> module and class of its adaptor.
_ADAPTORS = {
    "aimet_torch": ("aimet_ext.sim.torch.adaptor", "TorchSim"),
    "aimet_onnx": ("aimet_ext.sim.onnx.adaptor", "OnnxSim"),
}


RECURRENT = "weights of recurrent layers are decided by layer-wise techniques alone"
"""Reason why others leave them alone."""


def carried(name: str) -> Any:
    """Return a property of an adaptor that AIMET's simulation carries, None before it is set.

    So it follows the simulation through ``copy.deepcopy``.
    """
    return property(
        lambda adaptor: getattr(adaptor.sim, name, None),
        lambda adaptor, value: setattr(adaptor.sim, name, value),
    )


class WeightQuantizer(Protocol):
    """Quantizer of one layer's weight, as AIMET has it.

    The kind of its grid is read once: ask the adaptor again after a grid was replaced. Ranges are
    read anew each time.
    """

    name: str
    """Name of the layer."""

    @property
    def layout(self) -> GridLayout:
        """The grid but its ranges, as that of a matrix ``[out, in]``."""

    @property
    def weight(self) -> Tensor:
        """Float weight of the layer, output channels first; read only, see :meth:`set_weight`."""

    def is_of(self, other: WeightQuantizer) -> bool:
        """Return True if another layer has the same weight and quantizer, each the same object."""
        return False

    def set_weight(self, values: Tensor) -> None:
        """Replace the weight by values of its shape."""

    def stored(self, values: Tensor) -> Tensor:
        """Return values of the weight's shape as the layer has its weight."""
        return values

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells of the grid along each dimension of the weight."""

    @property
    def bitwidth(self) -> int:
        """Bits of a quantized weight."""
        return (self.layout.qmax - self.layout.qmin).bit_length()

    @property
    def frozen(self) -> bool:
        """True if ``sim.compute_encodings`` leaves the range alone."""

    @property
    def initialized(self) -> bool:
        """True if there is a range."""

    @property
    def granularity(self) -> Granularity:
        """The nearest word of :mod:`aimet_ext.specs` for the grid's shape."""
        if self.layout.block_size is not None:
            # Input channels of a block, whatever the kernel.
            width, bits = self.weight.shape[1] // self.layout.shape[1], self.layout.scale_bits
            return Blockwise(width) if bits is None else LPBQ(width, bits)
        return PerTensor() if math.prod(self.shape) == 1 else PerChannel()

    def spec(self) -> QSpec:
        """Return width, symmetry and granularity in the words of :mod:`aimet_ext.specs`."""
        return QSpec(
            bitwidth=self.bitwidth,
            symmetric=self.layout.symmetric,
            granularity=self.granularity,
        )

    def grid(self) -> Grid:
        """Return the grid that AIMET quantizes with, in float32.

        :raises ValueError: the quantizer has no range yet.
        """

    def free_grid(self) -> Grid:
        """Return the grid with LPBQ's raw float scale for every block."""

    def matrix_grid(self, device: torch.device) -> Grid:
        """Return :meth:`grid` as that of a matrix ``[out, in]`` on a device."""
        grid, shape = self.grid(), self.layout.shape
        scale, offset = (t.reshape(shape).to(device) for t in (grid.scale, grid.offset))
        return replace(grid, scale=scale, offset=offset)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Write the range of each cell.

        :param low: Smallest value, of the layout's shape, the grid's or one that expands to it.
        :param high: Largest value.
        :raises ValueError: a bound is not finite.
        """

    def set_scale(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Write the range that has this scale and offset.

        :param scale: Shaped as the bounds of :meth:`set_range`; for LPBQ the raw scale of each
            block, which AIMET turns into an integer times its channel's scale.
        :param offset: AIMET's offset (minus the zero point), None for a symmetric grid.
        """

    def calibrate(self) -> None:
        """Set the range from the weight, as ``sim.compute_encodings`` does, unless frozen."""

    def freeze(self, frozen: bool = True) -> None:
        """Make ``sim.compute_encodings`` leave the range alone, or set it again."""

    def reset(self) -> None:
        """Drop the range, frozen or not, for ``sim.compute_encodings`` to set it anew."""

    def shaped(self, values: Tensor) -> Tensor:
        """Return numbers of all cells in the grid's shape, from that of the layout or a smaller."""
        own = values.numel() == math.prod(self.shape)
        return values.reshape(self.shape) if own else values.expand(self.shape)

    def no_range(self) -> ValueError:
        """Return the error for a grid that is read before there is one."""
        return ValueError(
            f"{self.name}: a weight quantizer with a range is required, got one without; "
            "run sim.compute_encodings first"
        )


class SimHandle(Protocol):
    """A simulation, its model, and the records that the simulation carries."""

    ledger: Any = carried("aimet_ext_ledger")
    """Record of transforms, None before the first."""

    settings: Any = carried("aimet_ext_settings")
    """Arguments of ``create_sim``, None for a simulation built by hand."""

    sim: Any
    """The simulation itself."""

    @property
    def model(self) -> nn.Module:
        """The model with its quantizers."""

    @property
    def framework(self) -> Literal["torch", "onnx"]:
        """The framework that the simulation runs in."""

    @property
    def runner(self) -> Any:
        """The object that computes outputs: the module, or the session of onnxruntime."""


class WeightQuantizers(Protocol):
    """The weight quantizers of a simulation by the names of their layers."""

    how_to_quantize: str
    """Advice for a layer without a weight quantizer, in messages."""

    def layer_names(self) -> Iterable[str]:
        """Return the names of all layers that may have a weight quantizer."""

    def weight_quantizer(self, name: str) -> WeightQuantizer | None:
        """Return the weight quantizer of a layer, None if its weight stays float.

        :raises ValueError: there is no module of that name.
        """

    def weight_quantizers(self, names: Iterable[str] | None = None) -> dict[str, WeightQuantizer]:
        """Return the weight quantizers of the layers named, or of all that have one.

        :raises ValueError: a layer named has none.
        """
        wanted = self.layer_names() if names is None else names
        every = {name: self.weight_quantizer(name) for name in wanted}
        missing = [name for name, found in every.items() if found is None]
        if missing and names is not None:
            raise ValueError(
                "each of these layers needs a weight quantizer and has none: "
                f"{', '.join(missing)}; leave them out, or {self.how_to_quantize}"
            )
        return {name: found for name, found in every.items() if found is not None}

    def recurrent_as_linear(self) -> AbstractContextManager[None]:
        """Open a context in which the weights of recurrent layers are layers, as far as can be.

        Before it and behind it they are none of :meth:`layer_names`. Names of layers that are
        decided in it are known to the ledger.
        """

    def matrices_beside(self, module: str, layers: Collection[str]) -> list[str]:
        """Return what else in a module has a quantized weight, by full names, given a range.

        Matrices of recurrent layers are among it. None where a module always computes with these
        on their grids.

        :param module: Name of the module.
        :param layers: Full names of the layers and recurrent layers to leave out.
        """
        return []

    def other_quantizers(self) -> dict[str, WeightQuantizer]:
        """Return the quantizers of weights beside :meth:`weight_quantizers`, by other names."""
        return {}


@contextmanager
def calibrated(quantizers: Iterable[WeightQuantizer]) -> Iterator[None]:
    """Open a context in which these weight quantizers have a range."""
    new = [quantizer for quantizer in quantizers if not quantizer.initialized]
    try:
        for quantizer in new:
            quantizer.calibrate()
        yield
    finally:
        for quantizer in new:
            quantizer.reset()


class Disabled(Protocol):
    """Quantizers that are off for the time of a context."""

    def back(self, layers: Iterable[str]) -> AbstractContextManager[None]:
        """Open a context in which those of layers are on, at a cost of these layers alone.

        :param layers: Full names.
        """


class Activations(Protocol):
    """The quantizers of tensors, which are switched off and on, watched and calibrated."""

    def disabled_quantizers(
        self,
        module: str = "",
        *,
        weights: bool = True,
        activations: bool = True,
        keep: Iterable[str] = (),
    ) -> AbstractContextManager[Disabled]:
        """Open a context in which a module computes in float; quantizers are on again after it.

        :param module: Name of the module, ``""`` for the whole model.
        :param weights: True to switch off those of parameters, norm gains and biases among them.
        :param activations: True to switch off those of all other tensors.
        :param keep: Names of layers, and results of :meth:`WeightQuantizers.matrices_beside`, whose
            weight quantizers stay on.
        """

    def live_activations(self, module: str) -> AbstractContextManager[None]:
        """Open a context in which activations are quantized on the range of the tensor at hand."""

    def activation_quantizers(self, module: str = "") -> dict[str, Any]:
        """Return input and output quantizers inside a module by their full names."""

    def activation_bits(self) -> int:
        """Return the most bits of an integer activation, 0 where all are float."""

    def tensor_ranges(self, module: str, run: Callable[[], object]) -> dict[str, Range]:
        """Return the range of what each quantizer of a module quantizes while ``run`` runs it.

        Weights of layers are left out: they have :meth:`WeightQuantizer.calibrate`.

        :param module: Name of the module to watch.
        :param run: Function that runs it, as often as there are batches.
        :returns: ``(min, max)`` by the names of the quantizers that saw something.
        """

    def reset_encodings(self, names: Iterable[str]) -> list[str]:
        """Drop the ranges of these quantizers, frozen or not, for ``compute_encodings`` to fill.

        :param names: Full names, as :meth:`tensor_ranges` gives them.
        :returns: those that had a range.
        """


class FloatWeights(Protocol):
    """The float model inside a simulation: its parameters, and the names of its layers."""

    def float_state(self) -> Mapping[str, Tensor]:
        """Return parameters and persistent buffers, tied ones under each name, read only."""

    def float_parameters(self, module: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a module, named within it, without those of quantizers."""

    def commit(self, module: str) -> None:
        """Note that a module's parameters were changed in place, for all that holds copies."""

    def preserved_state(self) -> AbstractContextManager[None]:
        """Open a context that restores training flags, ``requires_grad`` and ``use_cache``."""

    def remembered(self) -> Callable[[], None]:
        """Return a function that puts every quantizer and parameter back in the place it has now.

        Contexts do that by themselves; an interrupt at the very end of one can keep it from it.
        """

    def original_names(self) -> Callable[[str], str]:
        """Return a function from names in ``model`` to names in the original checkpoint."""

    def aliases(self) -> Mapping[str, str]:
        """Return the name in ``model`` of modules by each other name that they have."""

    def unsupported_layers(self) -> Mapping[str, str]:
        """Return what has a weight and is none of the layers, by name, and the reason."""

    def shared_weights(self) -> dict[str, list[str]]:
        """Return the names of all modules that hold the same weight, for each that shares one."""


class Snapshots(Protocol):
    """Copies of a part of a simulation, to put it back as it was."""

    def snapshot(
        self, module: str, *, weights: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copy a module's weights and the whole state of its quantizers.

        :param weights: False where weights are not going to change.
        :returns: tensors, and plain JSON values beside them.
        """

    def restore(self, module: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Put back what :meth:`snapshot` returned."""


class CalibrationWalks(Protocol):
    """Calibration data on its way past the layers of a simulation."""

    def batches(self, dataloader: Any, *, opaque: bool = False) -> list[Any]:
        """Return the batches of a dataloader, each one checked.

        :param opaque: True if batches are of the user's own type, for the user's ``forward_fn``.
        """

    def walk(
        self,
        batches: Sequence[Any],
        layers: Sequence[str],
        *,
        streams: Streams,
        effective: Mapping[str, Tensor],
        together: Mapping[str, Sequence[str]] = MappingProxyType({}),
        **options: Unpack[WalkOptions],
    ) -> Walk:
        """Start a walk to layers, with the quantizers off; see :mod:`aimet_ext.walk.walk`.

        :param effective: Weights that the quantized stream uses from the start, by layer.
        :param together: Further layers that are decided with a layer, see
            :meth:`WeightQuantizer.is_of`, by that one; their inputs count as its own.
        """

    def block_pass(
        self,
        blocks: Sequence[str],
        batches: Sequence[Any],
        *,
        effective: Mapping[str, Tensor],
        **options: Unpack[WalkOptions],
    ) -> BlockPass:
        """Capture both streams at the first block, with the quantizers off.

        :param blocks: Full names of the blocks, in order.
        :param effective: Weights outside the blocks that the quantized stream uses, by layer.
        """


class Blocks(Protocol):
    """The decoder blocks of a simulation."""

    def find_blocks(
        self, description: TopologyDescription | None, run: Callable[[], object] | None = None
    ) -> list[BlockTopology]:
        """Find the decoder blocks, see :func:`aimet_ext.models.topology.find_blocks`.

        :param run: Function that runs the model on a batch; a graph is looked at without one.
        """

    def check_rotary(self) -> None:
        """Refuse a model whose queries and keys cannot be rotated when it runs.

        :raises ValueError: there are none behind a rotary embedding, or of a width without a
            Hadamard matrix.
        """

    def own_parameters(
        self, kinds: Collection[str], description: TopologyDescription | None
    ) -> AbstractContextManager[None]:
        """Open a context in which what pairs of these kinds rescale is stored once a block.

        It stays so afterwards; an exception puts the model back as it was.
        """


class ResidualStream(Protocol):
    """The model around its decoder blocks, and the float model as a whole."""

    def own_ends(self, description: TopologyDescription | None) -> AbstractContextManager[None]:
        """Open a context in which weights beside the blocks, a tied head's too, are stored once.

        It stays so afterwards; an exception puts the model back as it was.
        """

    def residual_ends(
        self, blocks: Sequence[BlockTopology], batch: Any, forward_fn: ForwardFn | None
    ) -> ResidualEnds:
        """Find what writes to the hidden states and reads them beside the blocks.

        Each module of it is a part of the simulation: see :meth:`FloatWeights.float_parameters`,
        :meth:`FloatWeights.commit` and :meth:`Snapshots.snapshot`.

        :param batch: Batch on which the model is computed without its blocks.
        :raises TransformRefused: a parameter beside the blocks has no known role.
        """

    def survey(self, batches: Sequence[Any], forward_fn: ForwardFn | None) -> Survey:
        """Compute the float model on batches, and watch all that is quantized in it."""

    def logits_behind(
        self, blocks: Sequence[BlockTopology], forward_fn: ForwardFn | None
    ) -> Callable[[Any, Tensor], Tensor]:
        """Return a function from a batch and its last hidden states to the float model's logits.

        It is differentiable in the hidden states ``[batch, seq, hidden]``.
        """

    def probe_batch(self) -> Any:
        """Return a batch of a few random ids.

        :raises ValueError: the model has further inputs, or no table of embeddings.
        """


class SimAdaptor(
    SimHandle,
    WeightQuantizers,
    Activations,
    FloatWeights,
    Snapshots,
    CalibrationWalks,
    Blocks,
    ResidualStream,
    Points,
    Protocol,
):
    """One simulation, of either framework. Names are those of ``model.named_modules()``."""

    def counts_as_weight(self, name: str) -> bool:
        """Return False for a lookup table, or what AIMET counts as an activation."""
        return not isinstance(self.model.get_submodule(name), nn.Embedding)

    def lint_facts(self) -> SimFacts:
        """Return the facts of the simulation that a lint judges."""


def adapt(sim: object) -> SimAdaptor:
    """Return the adaptor for a simulation, by its type.

    :param sim: ``aimet_torch.QuantizationSimModel`` or ``aimet_onnx.QuantizationSimModel``.
    :raises TypeError: another type.
    """
    for cls in type(sim).__mro__:
        found = _ADAPTORS.get(cls.__module__.partition(".")[0])
        if found is not None and cls.__name__ == "QuantizationSimModel":
            return getattr(importlib.import_module(found[0]), found[1])(sim)
    raise TypeError(
        "sim must be a QuantizationSimModel of aimet_torch or aimet_onnx, "
        f"got {type(sim).__module__}.{type(sim).__qualname__}; "
        "build one with aimet_ext.create_sim(model, sample_input_ids)"
    )


def moved_ranges(
    before: Mapping[str, Range], after: Mapping[str, Range], tolerance: float = 1e-3
) -> list[str]:
    """Return the names whose range moved by more than ``tolerance`` times its larger bound.

    :param before: Ranges by name, see :meth:`SimAdaptor.tensor_ranges`.
    :param after: Ranges after a transform.
    """
    moved = []
    for name, (low, high) in before.items():
        if name not in after:
            continue
        shift = max(abs(low - after[name][0]), abs(high - after[name][1]))
        if shift > tolerance * max(abs(low), abs(high)):
            moved.append(name)
    return moved
