"""The adaptor to ``aimet_torch.QuantizationSimModel``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, Unpack

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.quantization.base import QuantizerBase
from torch import Tensor, nn

from aimet_ext.core.affine import Grid, fake_quantize, minmax_range, scale_offset
from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.data.batches import ForwardFn, iterate_batches
from aimet_ext.files.tensors import of_parameter, parameter_quantizer
from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.proof import probe_batch
from aimet_ext.models.residual import ResidualEnds, Survey
from aimet_ext.models.rotary import check_rotary
from aimet_ext.models.topology import BlockTopology, find_blocks
from aimet_ext.sim.facts import SimFacts
from aimet_ext.sim.protocol import Range, SimAdaptor
from aimet_ext.sim.torch import residual
from aimet_ext.sim.torch.graph import Apart, write_graph
from aimet_ext.sim.torch.places import Emptied
from aimet_ext.sim.torch.points import TorchPoints, replaced_quantizers
from aimet_ext.sim.torch.quantizers import TorchWeightQuantizer, weight_quantizer_of
from aimet_ext.sim.torch.recurrent import as_linear, reason_to_leave
from aimet_ext.sim.torch.state import (
    named_quantizers,
    quantizer_state,
    restore_quantizer,
    uninitialize,
)
from aimet_ext.walk.blocks import BlockWalk, find_stacks
from aimet_ext.walk.passes import BlockPass, WalkOptions, open_pass
from aimet_ext.walk.sides import find_sides
from aimet_ext.walk.traced import walk_graph
from aimet_ext.walk.walk import RerunWalk, Streams, Walk

_T = TypeVar("_T")


class TorchSim(TorchPoints, SimAdaptor):
    """See :class:`aimet_ext.sim.protocol.SimAdaptor`, which documents the methods.

    The adaptor holds no state of its own.

    :param sim: built by ``create_sim`` or by hand.
    """

    how_to_quantize = "set param_quantizers['weight']"

    def __init__(self, sim: QuantizationSimModel) -> None:
        self.sim = sim

    @property
    def model(self) -> nn.Module:
        return self.sim.model

    def weight_quantizer(self, name: str) -> TorchWeightQuantizer | None:
        """Weight quantizer of a layer, None if its weight stays float.

        :raises ValueError: there is no module of that name.
        """
        module = self._module(name)
        if not isinstance(module, BaseQuantizationMixin):
            return None
        if "weight" not in module.param_quantizers or module.param_quantizers["weight"] is None:
            return None
        return weight_quantizer_of(name, module)

    def matrices_beside(self, module: str, layers: Collection[str]) -> list[str]:
        found = []
        for name, quantizer in self._quantizers(module):
            layer, _, key = name.rpartition(".param_quantizers.")
            if not of_parameter(name) or layer in layers:
                continue
            owner: Any = self.model.get_submodule(layer)
            value = getattr(owner, key, None)
            if isinstance(value, Tensor) and value.dim() > 1:
                if not quantizer.is_initialized():
                    owner.compute_param_encodings()
                found.append(layer if key == "weight" else f"{layer}.{key}")
        return found

    def layer_names(self) -> Iterator[str]:
        return (name for name, _ in self.sim.named_qmodules())

    def disabled_quantizers(
        self,
        module: str = "",
        *,
        weights: bool = True,
        activations: bool = True,
        keep: Iterable[str] = (),
    ) -> AbstractContextManager[Emptied]:
        """Open a context in which a module computes in float; restored at the end whatever happens.

        :param module: Name, ``""`` for the whole model.
        :param weights: Switch for quantizers of parameters, norm gains and biases among them.
        :param activations: Switch for quantizers of inputs and outputs.
        :param keep: Names of layers or matrices whose weight quantizers stay on.
        """
        kept = {parameter_quantizer(key) for name in keep for key in (f"{name}.weight", name)}
        found = (
            (name, quantizer)
            for name, quantizer in self._quantizers(module)
            if (weights if of_parameter(name) else activations) and name not in kept
        )
        return Emptied(self.model, found).open()

    @contextmanager
    def live_activations(self, module: str) -> Iterator[None]:
        """Quantize inputs and outputs on the range of the tensor at hand, in a context.

        Calibrated or not, frozen or not: the quantizers' own ranges are neither read nor written.
        Gradients pass straight through the rounding; the range counts as a constant.
        """
        quantizers = self.activation_quantizers(module).values()
        with replaced_quantizers({quantizer: _live(quantizer) for quantizer in quantizers}):
            yield

    def float_parameters(self, module: str) -> dict[str, nn.Parameter]:
        root = self._module(module)
        return _outside(root.named_parameters(), named_quantizers(root))

    @torch.no_grad()
    def snapshot(
        self, module: str, *, weights: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return copies of a module's weights and the whole state of its quantizers.

        :param weights: False where weights are not going to change.
        :returns: tensors, and plain JSON values beside them.
        """
        tensors = {
            name: parameter.detach().clone()
            for name, parameter in self.float_parameters(module).items()
            if weights
        }
        meta = {}
        for name, quantizer in _once(named_quantizers(self._module(module))):
            state, meta[name] = quantizer_state(quantizer)
            tensors.update({f"{name}.{key}": value for key, value in state.items()})
        return tensors, {"quantizers": meta}

    @torch.no_grad()
    def restore(self, module: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        for name, parameter in self.float_parameters(module).items():
            if name in tensors:
                parameter.copy_(tensors[name])
        for name, quantizer in _once(named_quantizers(self._module(module))):
            restore_quantizer(quantizer, tensors, meta["quantizers"][name], f"{name}.")

    def activation_quantizers(self, module: str = "") -> dict[str, QuantizerBase]:
        return {
            name: quantizer
            for name, quantizer in _once(self._quantizers(module))
            if not of_parameter(name)
        }

    def activation_bits(self) -> int:
        found = self.activation_quantizers().values()
        return max((q.bitwidth for q in found if hasattr(q, "qmax")), default=0)

    @torch.no_grad()
    def tensor_ranges(self, module: str, run: Callable[[], object]) -> dict[str, Range]:
        """Return the range of what each quantizer of a module reads while ``run`` runs in float.

        Layers' weights are left out: they have their own :meth:`TorchWeightQuantizer.calibrate`.

        :param module: Name of the module to watch.
        :param run: Function that runs it, as often as there are batches.
        :returns: ``(min, max)`` by the full names of the quantizers that saw something.
        """
        ranges: dict[str, Range] = {}
        watched = self.activation_quantizers(module)
        for name, _ in _once(self._quantizers(module)):
            if name not in watched:
                layer, _, key = name.rpartition(".param_quantizers.")
                value: Tensor = getattr(self.model.get_submodule(layer), key)
                if key != "weight" or value.dim() < 2:
                    _widen(ranges, name, value)
        observers = {quantizer: _observer(ranges, name) for name, quantizer in watched.items()}
        with replaced_quantizers(observers), self.disabled_quantizers(module, activations=False):
            if observers:
                run()
        return ranges

    def reset_encodings(self, names: Iterable[str]) -> list[str]:
        quantizers: dict[str, Any] = {name: self.model.get_submodule(name) for name in names}
        had = [name for name in quantizers if quantizers[name].is_initialized()]
        for name in had:
            uninitialize(quantizers[name])
            quantizers[name].allow_overwrite(True)
        return had

    def float_state(self) -> dict[str, Tensor]:
        """Return parameters and persistent buffers of the model without those of quantizers.

        Tied parameters stand under each of their names.

        :returns: the tensors themselves, detached, by their names in the model.
        """
        state = self.model.state_dict(keep_vars=True)
        every = ((name, v.detach()) for name, v in state.items() if isinstance(v, Tensor))
        return _outside(every, self._quantizers(""))

    def passing_buffers(self) -> dict[str, Tensor]:
        """Return buffers that a model derives from its config and does not save.

        Mostly rotary frequencies. They belong to the state of a simulation nevertheless: their
        dtype depends on how the model was cast.
        """
        saved = self.float_state()
        buffers = (item for item in self.model.named_buffers() if item[0] not in saved)
        return _outside(buffers, self._quantizers(""))

    def original_names(self) -> Callable[[str], str]:
        try:
            from aimet_ext.models.huggingface import checkpoint_prefix
        except ModuleNotFoundError:  # no transformers, so no Hugging Face model
            return lambda name: name
        prefix = checkpoint_prefix(self.model)
        return lambda name: name.removeprefix(prefix)

    def aliases(self) -> Mapping[str, str]:
        original = self.original_names()
        return {original(name): name for name, _ in self.model.named_modules() if name}

    def recurrent_as_linear(self) -> AbstractContextManager[None]:
        return as_linear(self.model)

    def unsupported_layers(self) -> dict[str, str]:
        # What else is no layer is known by its type.
        return {
            name: reason
            for name, module in self.sim.named_qmodules()
            if (reason := reason_to_leave(module)) is not None
        }

    def shared_weights(self) -> dict[str, list[str]]:
        by_weight: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            weight: Any = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter):
                by_weight.setdefault(id(weight), []).append(name)
        shared = (names for names in by_weight.values() if len(names) > 1)
        return {name: names for names in shared for name in names}

    def batches(self, dataloader: Any, *, opaque: bool = False) -> list[Any]:
        return list(iterate_batches(dataloader, opaque=opaque))

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
        settings: dict[str, Any] = {"streams": streams, "effective": effective, **options}
        forward_fn = options.get("forward_fn")
        if together:
            name, twins = next(iter(together.items()))
            settings["sides"] = find_sides(self.model, layers, batches, forward_fn)
            reason = f"{name} shares its weight with {', '.join(twins)}"
            return RerunWalk(
                self.model, batches, layers, together=together, reason=reason, **settings
            )
        stacks = find_stacks(self.model, layers, batches, forward_fn)
        blocks = [block for stack in stacks for block in stack.blocks]
        settings["sides"] = find_sides(self.model, [*layers, *blocks], batches, forward_fn)
        if stacks:
            return BlockWalk(self.model, [], batches, layers, stacks=stacks, **settings)
        return walk_graph(self.model, batches, layers, leaves=self.sim.qmodules(), **settings)

    def find_blocks(
        self, description: TopologyDescription | None, run: Callable[[], object] | None = None
    ) -> list[BlockTopology]:
        names = [name for name, module in self.model.named_modules() if _is_quantized(module)]
        unquantized = {name for name in names if self.weight_quantizer(name) is None}
        with self.disabled_quantizers():
            # A class that AIMET does not know, as a router's, has no quantizers.
            return find_blocks(
                self.model, description, run, is_layer=_is_quantized, unused=unquantized
            )

    def check_rotary(self) -> None:
        check_rotary(self.model)

    def own_parameters(
        self, kinds: Collection[str], description: TopologyDescription | None
    ) -> AbstractContextManager[None]:
        return nullcontext()  # each module has its own

    def own_ends(self, description: TopologyDescription | None) -> AbstractContextManager[None]:
        blocks = [block.name for block in self.find_blocks(description)]
        groups = residual.shared_outside(self.model, self.shared_weights(), blocks)
        return residual.untied(self.model, groups)

    def residual_ends(
        self, blocks: Sequence[BlockTopology], batch: Any, forward_fn: ForwardFn | None
    ) -> ResidualEnds:
        return residual.find_ends(self, blocks, batch, forward_fn)

    def survey(self, batches: Sequence[Any], forward_fn: ForwardFn | None) -> Survey:
        return residual.survey(self, batches, forward_fn)

    def logits_behind(
        self, blocks: Sequence[BlockTopology], forward_fn: ForwardFn | None
    ) -> Callable[[Any, Tensor], Tensor]:
        return residual.logits_behind(self, blocks, forward_fn)

    def probe_batch(self) -> Any:
        return probe_batch(self.model)

    def block_pass(
        self,
        blocks: Sequence[str],
        batches: Sequence[Any],
        *,
        effective: Mapping[str, Tensor],
        **options: Unpack[WalkOptions],
    ) -> BlockPass:
        weights = {"float": {}, "quantized": effective}
        return open_pass(self.model, blocks, batches, weights, **options)

    def commit(self, module: str) -> None:
        """Do nothing: no one holds copies."""

    @contextmanager
    def preserved_state(self) -> Iterator[None]:
        training = {module: module.training for module in self.model.modules()}
        gradients = {p: (p.requires_grad, p.grad) for p in self.model.parameters()}
        configs = [module.config for module in training if hasattr(module, "config")]
        caches = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
        try:
            yield
        finally:
            with uninterrupted():
                for module, was in training.items():
                    module.training = was
                for parameter, (was, gradient) in gradients.items():
                    parameter.requires_grad_(was)
                    parameter.grad = gradient
                for config, cached in caches:
                    config.use_cache = cached

    def remembered(self) -> Callable[[], None]:
        quantizers = [
            (self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], quantizer)
            for name, quantizer in self._quantizers("")
        ]
        parameters = [
            (module._parameters, {**module._parameters}) for module in self.model.modules()
        ]

        def put_back() -> None:
            for container, key, quantizer in quantizers:
                setattr(container, key, quantizer)
            for own, kept in parameters:
                own.update(kept)

        return put_back

    @property
    def framework(self) -> Literal["torch"]:
        return "torch"

    @property
    def runner(self) -> nn.Module:
        return self.model

    def lint_facts(self) -> SimFacts:
        from aimet_ext.sim.torch.facts import read_facts

        return read_facts(self)

    def write_graph(self, path: Path, args: tuple[Any, ...], apart: Apart, **options: Any) -> None:
        """Write an ONNX file without the large weights, and encodings 2.0.0 beside it.

        AIMET's exporter rounds the weights that it writes unless its own method for that is set
        aside: a reader that quantizes the file's weights gets the simulation's values.

        :param path: Path of the ONNX file; the encodings file has the ending ``.encodings``.
        :param args: Positional arguments to trace with.
        :param apart: Receiver of the large weights.
        :param options: Arguments of ``torch.onnx.export``.
        """
        write_graph(self.sim, path, args, apart, options)

    def encoding_settings(self) -> dict[str, Any]:
        """Return the settings of the simulation that encodings 1.0.0 hold."""
        return {
            "excluded_layers": self.sim._excluded_layer_names,
            "quantizer_args": self.sim.quant_args,
        }

    def _module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"a module of sim.model is required, got {name!r}; "
                "see the names in sim.model.named_modules()"
            ) from error

    def _quantizers(self, module: str) -> list[tuple[str, QuantizerBase]]:
        """Return quantizers inside a module by their full names, a shared one under all of them."""
        return named_quantizers(self._module(module), module)


def _outside(
    named: Iterable[tuple[str, _T]], quantizers: Iterable[tuple[str, Any]]
) -> dict[str, _T]:
    """Return the values that are in none of the quantizers."""
    inside = tuple(f"{name}." for name, _ in quantizers)
    return {name: value for name, value in named if not name.startswith(inside)}


def _once(named: Iterable[tuple[str, _T]]) -> list[tuple[str, _T]]:
    """Return each object under its first name."""
    first: dict[int, tuple[str, _T]] = {}
    for item in named:
        first.setdefault(id(item[1]), item)
    return list(first.values())


def _live(quantizer: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that quantizes a tensor as a quantizer does, on the tensor's own range."""

    def quantize(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        integers = (quantizer.qmin, quantizer.qmax, quantizer.symmetric)
        low, high = minmax_range(tensor.detach(), tuple(quantizer.shape), *integers)
        scale, offset = scale_offset(low.float(), high.float(), *integers)
        return fake_quantize(tensor, Grid(scale, offset, *integers[:2], quantizer.block_size))

    return quantize


def _observer(ranges: dict[str, Range], name: str) -> Callable[[Tensor], Tensor]:
    """Return a function that passes a tensor on and notes its range under a name."""

    def observe(tensor: Tensor) -> Tensor:
        _widen(ranges, name, tensor)
        return tensor

    return observe


def _widen(ranges: dict[str, Range], name: str, tensor: Tensor) -> None:
    """Make a range hold all of a tensor."""
    if tensor.numel():
        low, high = ranges.get(name, (float("inf"), -float("inf")))
        ranges[name] = (min(low, float(tensor.min())), max(high, float(tensor.max())))


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, BaseQuantizationMixin)
