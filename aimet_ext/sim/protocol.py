"""What an algorithm needs of a quantization simulation, whatever it runs on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from aimet_ext.config import Granularity, QSpec
from aimet_ext.core.affine import Grid
from aimet_ext.data.batches import ForwardFn
from aimet_ext.models.topology import BlockTopology, TopologyDescription
from aimet_ext.walk.protocol import Streams, Walk
from aimet_ext.walk.stream import BlockStream

if TYPE_CHECKING:
    from aimet_ext.sim.facts import SimFacts

__all__ = ["Range", "SimAdaptor", "WeightQuantizer", "adapt", "moved_ranges"]

Range: TypeAlias = tuple[float, float]

# Root package of a simulation's class -> module and class of its adaptor.
_ADAPTORS = {
    "aimet_torch": ("aimet_ext.sim.torch.adaptor", "TorchSim"),
    "aimet_onnx": ("aimet_ext.sim.onnx.adaptor", "OnnxSim"),
}


class WeightQuantizer(Protocol):
    """The quantizer of one layer's weight, in AIMET's words; nothing is cached."""

    @property
    def name(self) -> str:
        """Name of the layer."""

    @property
    def weight(self) -> Tensor:
        """The layer's float weight, output channels first; to be read, see :meth:`set_weight`."""

    def set_weight(self, values: Tensor) -> None:
        """Put values of the weight's shape in its place."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells of the grid along each dimension of the weight."""

    @property
    def bitwidth(self) -> int:
        """Bits of a quantized weight."""

    @property
    def symmetric(self) -> bool:
        """Whether the offset is fixed."""

    @property
    def qmin(self) -> int:
        """Smallest integer."""

    @property
    def qmax(self) -> int:
        """Largest integer."""

    @property
    def zero_point_shift(self) -> float:
        """0, or 0.5 where the values lie half a step off the integers."""

    @property
    def block_size(self) -> tuple[int, ...] | None:
        """AIMET's block size along each dimension, None unless blockwise."""

    @property
    def block_grouping(self) -> tuple[int, ...] | None:
        """Blocks that share a float scale along each dimension, None unless LPBQ."""

    @property
    def scale_bits(self) -> int | None:
        """Bits of LPBQ's integer scales, None for any other grid."""

    @property
    def granularity(self) -> Granularity:
        """The grid in the words of :mod:`aimet_ext.config`."""

    @property
    def frozen(self) -> bool:
        """Whether ``sim.compute_encodings`` leaves the range alone."""

    @property
    def initialized(self) -> bool:
        """Whether there is a range."""

    def spec(self) -> QSpec:
        """Width, symmetry and granularity in the words of :mod:`aimet_ext.config`."""

    def grid(self) -> Grid:
        """The grid as the simulation uses it, read back from the quantizer."""

    def free_grid(self) -> Grid:
        """The same with LPBQ's raw float scale for every block."""

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Write the range of each cell, of the grid's ``shape`` or one that expands to it."""

    def set_scale(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Write the range that has this scale (raw, for LPBQ) and offset (None: symmetric)."""

    def calibrate(self) -> None:
        """Set the range from the weight, as ``sim.compute_encodings`` does; not if frozen."""

    def freeze(self, frozen: bool = True) -> None:
        """Have ``sim.compute_encodings`` leave the range alone, or no longer."""


class SimAdaptor(Protocol):
    """One simulation. Names are those of ``model.named_modules()``."""

    @property
    def sim(self) -> Any:
        """The simulation itself."""

    @property
    def model(self) -> nn.Module:
        """The model with its quantizers."""

    ledger: Any
    """The record of transforms that the simulation carries, None before the first."""

    settings: dict[str, Any] | None
    """What ``create_sim`` was called with, None for a simulation built by hand."""

    def weight_quantizer(self, name: str) -> WeightQuantizer | None:
        """Weight quantizer of a layer, None if its weight stays float."""

    def weight_quantizers(
        self, names: Iterable[str] | None = None
    ) -> Mapping[str, WeightQuantizer]:
        """Weight quantizers of the layers named, or of all that have one."""

    def disabled_quantizers(
        self,
        module: str = "",
        *,
        weights: bool = True,
        activations: bool = True,
        keep: Iterable[str] = (),
    ) -> AbstractContextManager[None]:
        """Context in which a module computes in float; restored at the end whatever happens.

        Weights of the layers in ``keep`` stay quantized.
        """

    def live_activations(self, module: str) -> AbstractContextManager[None]:
        """Context in which inputs and outputs are quantized on the range of the tensor at hand."""

    def float_parameters(self, module: str) -> dict[str, nn.Parameter]:
        """Parameters of a module, named within it, without those of quantizers."""

    def snapshot(
        self, module: str, *, weights: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of a module's weights and the whole state of its quantizers; plain JSON beside.

        Without weights where these are not going to change.
        """

    def restore(self, module: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Put back what :meth:`snapshot` returned."""

    def activation_quantizers(self, module: str = "") -> dict[str, Any]:
        """Input and output quantizers inside a module by their full names."""

    def tensor_ranges(self, module: str, run: Callable[[], object]) -> dict[str, Range]:
        """Range of what each quantizer of a module quantizes, but weights, while ``run`` runs."""

    def reset_encodings(self, names: Iterable[str]) -> list[str]:
        """Drop the ranges of these quantizers, frozen or not, for ``compute_encodings`` to fill."""

    def calibrated(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Context in which these layers' weight quantizers have a range, if only for the while."""

    def float_state(self) -> Mapping[str, Tensor]:
        """Parameters and persistent buffers, tied ones under each name, without quantizers'."""

    def full_name(self, name: str) -> str:
        """The name in ``model`` of a layer that goes by several names, else the name itself."""

    def unsupported_layers(self) -> Mapping[str, str]:
        """What has a weight and is none of the layers, by name, and why."""

    def shared_weights(self) -> dict[str, list[str]]:
        """Names of all modules that hold the same weight, for each that shares one."""

    def batches(self, dataloader: Any, *, opaque: bool = False) -> list[Any]:
        """The batches of a dataloader, each one checked.

        :param opaque: batches are of the user's own type, for the user's ``forward_fn``.
        """

    def walk(
        self,
        batches: Sequence[Any],
        layers: Sequence[str],
        *,
        streams: Streams,
        effective: Mapping[str, Tensor],
        forward_fn: ForwardFn | None,
        cache_dir: str | Path | None,
        device: torch.device | str | None,
    ) -> Walk:
        """A walk to layers, with the quantizers off; see :mod:`aimet_ext.walk.protocol`.

        :param effective: weights that the quantized stream uses from the start, by layer.
        """

    def find_blocks(self, description: TopologyDescription | None) -> list[BlockTopology]:
        """Decoder blocks, see :func:`aimet_ext.models.topology.find_blocks`."""

    def own_parameters(
        self, kinds: Collection[str], description: TopologyDescription | None
    ) -> AbstractContextManager[None]:
        """Context in which what pairs of these kinds rescale is stored for each block alone.

        It stays so afterwards; an exception puts the model back as it was.
        """

    def capture(
        self,
        first_block: str,
        batches: Sequence[Any],
        forward_fn: ForwardFn | None,
        *,
        cache_dir: str | Path | None,
        device: torch.device | str | None,
    ) -> BlockStream:
        """What the first block receives, see :mod:`aimet_ext.walk.capture`."""

    def commit(self, module: str) -> None:
        """Note that a module's parameters were changed in place, for all that holds copies."""

    def preserved_state(self) -> AbstractContextManager[None]:
        """Context that restores training flags, ``requires_grad`` and ``use_cache``."""

    @property
    def framework(self) -> Literal["torch", "onnx"]:
        """The framework that the simulation runs in."""

    @property
    def runner(self) -> Any:
        """The object that computes outputs: the module, or the session of onnxruntime."""

    def lint_facts(self) -> SimFacts:
        """Return the facts of the simulation that a lint judges."""


def adapt(sim: object) -> SimAdaptor:
    """The adaptor for a simulation, by its type.

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
    """Names whose range moved by more than ``tolerance`` times its larger bound.

    :param before: ranges by name, see :meth:`SimAdaptor.tensor_ranges`.
    :param after: the same after a transform.
    """
    moved = []
    for name, (low, high) in before.items():
        if name not in after:
            continue
        shift = max(abs(low - after[name][0]), abs(high - after[name][1]))
        if shift > tolerance * max(abs(low), abs(high)):
            moved.append(name)
    return moved
