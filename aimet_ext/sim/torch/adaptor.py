"""The adaptor to ``aimet_torch.QuantizationSimModel``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.quantization.base import QuantizerBase
from torch import Tensor, nn

from aimet_ext.data.batches import ForwardFn, iterate_batches
from aimet_ext.models.topology import BlockTopology, TopologyDescription, find_blocks
from aimet_ext.sim.facts import SimFacts
from aimet_ext.sim.protocol import Range, SimAdaptor
from aimet_ext.sim.torch.live_ranges import forwards, live, observer, widen
from aimet_ext.sim.torch.quantizers import (
    TorchWeightQuantizer,
    quantizer_state,
    restore_quantizer,
    uninitialize,
)
from aimet_ext.walk.blocks import BlockWalk, find_stack
from aimet_ext.walk.protocol import Streams, Walk
from aimet_ext.walk.streamed import BlockPass, open_pass
from aimet_ext.walk.traced import walk_graph

__all__ = ["TorchSim"]


class TorchSim(SimAdaptor):
    """See :class:`aimet_ext.sim.protocol.SimAdaptor`. It holds no state of its own.

    :param sim: built by ``create_sim`` or by hand.
    """

    how_to_quantize = "set param_quantizers['weight']"

    def __init__(self, sim: QuantizationSimModel) -> None:
        self.sim = sim

    @property
    def model(self) -> nn.Module:
        """The model with its quantizers."""
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
        return TorchWeightQuantizer(name, module)

    def layer_names(self) -> Iterator[str]:
        """Return the names of all quantized modules."""
        return (name for name, _ in self._quantized(""))

    @contextmanager
    def disabled_quantizers(
        self,
        module: str = "",
        *,
        weights: bool = True,
        activations: bool = True,
        keep: Iterable[str] = (),
    ) -> Iterator[None]:
        """Context in which a module computes in float; restored at the end whatever happens.

        :param module: name, ``""`` for the whole model.
        :param weights: quantizers of parameters, norm gains and biases among them.
        :param activations: quantizers of inputs and outputs.
        :param keep: names of layers whose weight quantizers stay on.
        """
        kept = {(f"{name}.param_quantizers", "weight") for name in keep}
        places = [
            (self.model.get_submodule(parent), key, quantizer)
            for (parent, key), quantizer in self._places(module).items()
            if (weights if parent.endswith("param_quantizers") else activations)
            and (parent, key) not in kept
        ]
        try:
            for container, key, _ in places:
                setattr(container, key, None)
            yield
        finally:
            for container, key, quantizer in places:
                setattr(container, key, quantizer)

    @contextmanager
    def live_activations(self, module: str) -> Iterator[None]:
        """Context in which inputs and outputs are quantized on the range of the tensor at hand.

        Calibrated or not, frozen or not: the quantizers' own ranges are neither read nor written.
        Gradients pass straight through the rounding; the range counts as a constant.
        """
        quantizers = self.activation_quantizers(module).values()
        with forwards({quantizer: live(quantizer) for quantizer in quantizers}):
            yield

    def float_parameters(self, module: str) -> dict[str, nn.Parameter]:
        """Parameters of a module, named within it, without those of quantizers."""
        root = self._module(module)
        inside = tuple(name + "." for name, _ in _named_quantizers(root))
        return {
            name: parameter
            for name, parameter in root.named_parameters()
            if not name.startswith(inside)
        }

    @torch.no_grad()
    def snapshot(
        self, module: str, *, weights: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of a module's weights and the whole state of its quantizers.

        :param weights: false where weights are not going to change.
        :returns: tensors, and plain JSON values beside them.
        """
        tensors = {
            name: parameter.detach().clone()
            for name, parameter in self.float_parameters(module).items()
            if weights
        }
        meta = {}
        for name, quantizer in _named_quantizers(self._module(module)):
            state, meta[name] = quantizer_state(quantizer)
            tensors.update({f"{name}.{key}": value for key, value in state.items()})
        return tensors, {"quantizers": meta}

    @torch.no_grad()
    def restore(self, module: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Put back what :meth:`snapshot` returned; the parameters stay the same objects."""
        for name, parameter in self.float_parameters(module).items():
            if name in tensors:
                parameter.copy_(tensors[name])
        for name, quantizer in _named_quantizers(self._module(module)):
            state = {
                key: tensors[f"{name}.{key}"]
                for key, _ in quantizer.named_parameters(recurse=False)
            }
            restore_quantizer(quantizer, state, meta["quantizers"][name])

    def activation_quantizers(self, module: str = "") -> dict[str, QuantizerBase]:
        """Input and output quantizers inside a module by their full names."""
        return {
            name: quantizer
            for name, quantizer in self._quantizers(module).items()
            if _is_activation(name)
        }

    @torch.no_grad()
    def tensor_ranges(self, module: str, run: Callable[[], object]) -> dict[str, Range]:
        """Range of what each quantizer of a module quantizes while ``run`` runs it in float.

        Layers' weights are left out: they have their own :meth:`TorchWeightQuantizer.calibrate`.

        :param module: name of the module to watch.
        :param run: runs it, as often as there are batches.
        :returns: ``(min, max)`` by the full names of the quantizers that saw something.
        """
        ranges: dict[str, Range] = {}
        watched = self.activation_quantizers(module)
        for name in self._quantizers(module):
            if name not in watched and not self._is_layer_weight(name):
                widen(ranges, name, self._parameter_of(name))
        observers = {quantizer: observer(ranges, name) for name, quantizer in watched.items()}
        with forwards(observers), self.disabled_quantizers(module, activations=False):
            run()
        return ranges

    def reset_encodings(self, names: Iterable[str]) -> list[str]:
        """Drop the ranges of these quantizers, frozen or not, for ``compute_encodings`` to fill.

        :param names: full names, as :meth:`tensor_ranges` gives them.
        :returns: those that had a range.
        """
        quantizers = self._quantizers("")
        had = [name for name in names if quantizers[name].is_initialized()]
        for name in had:
            uninitialize(quantizers[name])
            quantizers[name].allow_overwrite(True)
        return had

    def float_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of the model without those of its quantizers.

        Tied parameters stand under each of their names.

        :returns: the tensors themselves, detached, by their names in the model.
        """
        inside = tuple(f"{key}." for key in map(".".join, self._places("")))
        every = self.model.state_dict(keep_vars=True)
        return {
            name: value.detach()
            for name, value in every.items()
            if isinstance(value, Tensor) and not name.startswith(inside)
        }

    def full_name(self, name: str) -> str:
        """The name itself: modules have one."""
        return name

    def unsupported_layers(self) -> dict[str, str]:
        """None: what is no layer here is known by its type."""
        return {}

    def shared_weights(self) -> dict[str, list[str]]:
        """Names of all modules that hold the same weight, for each that shares one."""
        by_weight: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            weight: Any = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter):
                by_weight.setdefault(id(weight), []).append(name)
        shared = (names for names in by_weight.values() if len(names) > 1)
        return {name: names for names in shared for name in names}

    def batches(self, dataloader: Any, *, opaque: bool = False) -> list[Any]:
        """The batches of a dataloader, see :func:`aimet_ext.data.batches.iterate_batches`."""
        return list(iterate_batches(dataloader, opaque=opaque))

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
        """By blocks where the model repeats them, else by its graph."""
        settings: dict[str, Any] = {
            "streams": streams,
            "effective": effective,
            "forward_fn": forward_fn,
            "cache_dir": cache_dir,
            "device": device,
        }
        blocks = find_stack(self.model, layers)
        if blocks:
            return BlockWalk(self.model, blocks, batches, layers, **settings)
        return walk_graph(self.model, batches, layers, **settings)

    def find_blocks(self, description: TopologyDescription | None) -> list[BlockTopology]:
        """Decoder blocks, see :func:`aimet_ext.models.topology.find_blocks`."""
        return find_blocks(self.model, description)

    def own_parameters(
        self, kinds: Collection[str], description: TopologyDescription | None
    ) -> AbstractContextManager[None]:
        """Changes nothing: each module has its own."""
        return nullcontext()

    def block_pass(
        self,
        blocks: Sequence[str],
        batches: Sequence[Any],
        *,
        effective: Mapping[str, Tensor],
        forward_fn: ForwardFn | None,
        cache_dir: str | Path | None,
        device: torch.device | str | None,
    ) -> BlockPass:
        """Capture both streams at the first block, the quantizers being off."""
        return open_pass(
            self.model,
            blocks,
            batches,
            {"float": {}, "quantized": effective},
            forward_fn=forward_fn,
            cache_dir=cache_dir,
            device=device,
        )

    def commit(self, module: str) -> None:
        """Nothing to do: nobody holds copies."""

    @contextmanager
    def preserved_state(self) -> Iterator[None]:
        """Context that restores training flags, ``requires_grad`` and ``use_cache``."""
        training = {module: module.training for module in self.model.modules()}
        gradients = {p: (p.requires_grad, p.grad) for p in self.model.parameters()}
        configs = [module.config for module in training if hasattr(module, "config")]
        caches = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
        try:
            yield
        finally:
            for module, was in training.items():
                module.training = was
            for parameter, (was, gradient) in gradients.items():
                parameter.requires_grad_(was)
                parameter.grad = gradient
            for config, cached in caches:
                config.use_cache = cached

    @property
    def framework(self) -> Literal["torch"]:
        """The framework that the simulation runs in."""
        return "torch"

    @property
    def runner(self) -> nn.Module:
        """The model with the quantizers that are on."""
        return self.model

    def lint_facts(self) -> SimFacts:
        """Return the facts of the simulation that a lint judges."""
        from aimet_ext.sim.torch.facts import read_facts

        return read_facts(self)

    def _module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"a module of sim.model is required, got {name!r}; "
                "see the names in sim.model.named_modules()"
            ) from error

    def _quantized(self, module: str) -> Iterator[tuple[str, Any]]:
        """Quantized layers inside a module by their full names."""
        prefix = f"{module}." if module else ""
        for name, layer in self._module(module).named_modules():
            if isinstance(layer, BaseQuantizationMixin):
                yield (prefix + name).rstrip("."), layer

    def _quantizers(self, module: str) -> dict[str, QuantizerBase]:
        prefix = f"{module}." if module else ""
        return {prefix + name: found for name, found in _named_quantizers(self._module(module))}

    def _places(self, module: str) -> dict[tuple[str, str], QuantizerBase]:
        """Every place that holds a quantizer: name of its container and key in it."""
        prefix = f"{module}." if module else ""
        named = self._module(module).named_modules(remove_duplicate=False)  # tied weights share
        places = {}
        for name, found in named:
            if isinstance(found, QuantizerBase):
                container, _, key = (prefix + name).rpartition(".")
                places[container, key] = found
        return places

    def _parameter_of(self, quantizer: str) -> Tensor:
        layer, _, parameter = quantizer.rpartition(".param_quantizers.")
        return getattr(self.model.get_submodule(layer), parameter)

    def _is_layer_weight(self, quantizer: str) -> bool:
        if _is_activation(quantizer):
            return False
        return quantizer.endswith(".weight") and self._parameter_of(quantizer).dim() > 1


def _named_quantizers(root: nn.Module) -> Iterator[tuple[str, QuantizerBase]]:
    for name, module in root.named_modules():
        if isinstance(module, QuantizerBase):
            yield name, module


def _is_activation(quantizer: str) -> bool:
    return ".param_quantizers." not in f".{quantizer}"
