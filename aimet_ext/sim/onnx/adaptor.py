"""The adaptor to ``aimet_onnx.QuantizationSimModel``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from aimet_onnx import QuantizationSimModel
from torch import Tensor, nn

from aimet_ext.data.batches import ForwardFn
from aimet_ext.data.feeds import named_batches
from aimet_ext.models.description import TopologyDescription
from aimet_ext.models.residual import ResidualEnds, Survey
from aimet_ext.models.topology import BlockTopology
from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import (
    FoundLayers,
    OnnxLayer,
    find_layers,
    node_names,
    other_weights,
)
from aimet_ext.onnx.recurrent import OPERATORS, is_matrix_of, with_states
from aimet_ext.onnx.shells import module_tree, shell
from aimet_ext.onnx.values import input_specs
from aimet_ext.sim.facts import SimFacts
from aimet_ext.sim.onnx.names import layer_aliases
from aimet_ext.sim.onnx.points import OnnxPoints
from aimet_ext.sim.onnx.quantizers import (
    OnnxWeightQuantizer,
    SwitchedOff,
    is_integer,
    live_quantizer,
    quantizer_state,
    restore_quantizer,
    uninitialize,
    weight_quantizer_of,
)
from aimet_ext.sim.onnx.state import FloatState, rebuild_session
from aimet_ext.sim.protocol import RECURRENT, Range, SimAdaptor, WeightQuantizer, carried
from aimet_ext.walk.passes import BlockPass, WalkOptions
from aimet_ext.walk.walk import Streams, Walk

if TYPE_CHECKING:
    from aimet_ext.sim.onnx.blocks import Copies, OnnxPart


class OnnxSim(OnnxPoints, SimAdaptor):
    """See :class:`aimet_ext.sim.protocol.SimAdaptor`.

    The graph is indexed once, when it is first needed. Its layers are named after their nodes;
    ``model`` is a tree of modules that stand for them and hold no weights. Activation quantizers
    are named after their tensors.

    :param sim: built by ``create_sim`` or by hand.
    """

    how_to_quantize = "enable the quantizers of their weights"
    _stale: Any = carried("aimet_ext_stale_session")

    def __init__(self, sim: QuantizationSimModel) -> None:
        self.sim = sim
        self.parts: dict[str, OnnxPart] = {}
        self._parameters: frozenset[str] = frozenset()  # AIMET keeps a list
        self.copied: tuple[str, ...] = ()
        self._helpers: frozenset[str] = frozenset()  # names of nodes that compute states

    @cached_property
    def graph(self) -> OnnxGraph:
        """The float model; its values are those of the simulation's model."""
        return OnnxGraph(self.sim.model.model)

    @cached_property
    def layers(self) -> FoundLayers:
        """Layers with a weight by name, quantized or not."""
        return find_layers(self.graph)

    @cached_property
    def others(self) -> dict[str, OnnxLayer]:
        """Weights of all that is no layer, and layers' weights that AIMET counts as activations."""
        layers = self.layers.values()
        own = {layer.weight for layer in layers if self._is_parameter(layer.weight)}
        return other_weights(self.graph, own)

    @cached_property
    def shells(self) -> dict[str, nn.Module]:
        """The module that stands for each layer."""
        return {name: shell(self.graph, layer) for name, layer in self.layers.items()}

    @cached_property
    def model(self) -> nn.Module:
        return module_tree(self.shells)

    def weight_quantizer(self, name: str) -> OnnxWeightQuantizer | None:
        layer = self._layer(name)
        if layer is None or not self._is_parameter(layer.weight):
            return None
        return self._quantizer(layer)

    def other_quantizers(self) -> dict[str, WeightQuantizer]:
        found = ((name, self._quantizer(weight)) for name, weight in self.others.items())
        return {name: quantizer for name, quantizer in found if quantizer is not None}

    def _quantizer(self, layer: OnnxLayer) -> OnnxWeightQuantizer | None:
        quantizer = self.sim.qc_quantize_op_dict.get(layer.weight)
        if not is_integer(quantizer) or layer.weight in self.sim._folded_param_quantizers:
            return None
        parameter = self._is_parameter(layer.weight)
        return weight_quantizer_of(self.graph, layer, quantizer, self.touch, parameter)

    def counts_as_weight(self, name: str) -> bool:
        if name in self.others:
            return self._is_parameter(self.others[name].weight)
        return super().counts_as_weight(name)

    def layer_names(self) -> Iterator[str]:
        return iter(self.layers)

    def disabled_quantizers(
        self,
        module: str = "",
        *,
        weights: bool = True,
        activations: bool = True,
        keep: Iterable[str] = (),
    ) -> AbstractContextManager[SwitchedOff]:
        layers = (self._layer(name) for name in keep)
        kept = {layer.weight for layer in layers if layer is not None}
        inside, every = self._quantized_in(module), self.sim.qc_quantize_op_dict
        if module and module not in self.parts:  # whose activations are not told apart
            inside += [name for name in every if not self._is_parameter(name)]
        off = {
            name: every[name]
            for name in inside
            if name in every
            and every[name].enabled
            and name not in kept
            and (weights if self._is_parameter(name) else activations)
        }
        return SwitchedOff(off, self._quantized_in).open()

    @contextmanager
    def live_activations(self, module: str) -> Iterator[None]:
        from aimet_ext.onnx.blocks.module import observed

        found = self.activation_quantizers(module)
        live = {name: live_quantizer(quantizer) for name, quantizer in found.items()}
        with observed(self._module(module), lambda name, t: live[name](t) if name in live else t):
            yield

    def float_parameters(self, module: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a block, named within it; a layer holds none of its own."""
        return dict(self._module(module).named_parameters())

    @torch.no_grad()
    def snapshot(
        self, module: str, *, weights: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        stored = self._stored_in(module)
        tensors = {f"{name}/value": self.graph.tensor(name) for name in stored if weights}
        meta: dict[str, Any] = {}
        for name in self._quantized_in(module):
            quantizer = self.sim.qc_quantize_op_dict.get(name)
            if quantizer is not None:
                state, meta[name] = quantizer_state(quantizer)
                tensors.update({f"{name}/{key}": value for key, value in state.items()})
        return tensors, {"quantizers": meta}

    @torch.no_grad()
    def restore(self, module: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        for name in self._stored_in(module):
            if f"{name}/value" in tensors:
                self.graph.set_tensor(name, tensors[f"{name}/value"])
                self.touch()
        for name in self._quantized_in(module):
            if name in meta["quantizers"]:
                prefix = f"{name}/"
                inner = {
                    k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
                }
                state = meta["quantizers"][name]
                restore_quantizer(self.sim.qc_quantize_op_dict[name], inner, state)
        if module in self.parts:
            self.parts[module].reload()

    def activation_quantizers(self, module: str = "") -> dict[str, Any]:
        """Return the quantizers of tensors in and around a module, by the tensor's name."""
        every = self.sim.qc_quantize_op_dict
        return {
            name: every[name]
            for name in (self._tensors_of(module) if module else every)
            if name in every and is_integer(every[name]) and not self._is_parameter(name)
        }

    def activation_bits(self) -> int:
        found = self.activation_quantizers().values()
        return max((q.bitwidth for q in found if q.enabled), default=0)

    @torch.no_grad()
    def tensor_ranges(self, module: str, run: Callable[[], object]) -> dict[str, Range]:
        from aimet_ext.onnx.blocks.module import observed_ranges

        weights = {layer.weight for layer in self.layers.values()}
        every = self.sim.qc_quantize_op_dict
        names = self._tensors_of(module) if module in self.parts else every
        watched = [n for n in names if n not in weights and is_integer(every.get(n))]
        if not watched:
            return {}
        with self.disabled_quantizers(module, activations=False):
            return observed_ranges(self._module(module), run, watched)

    def reset_encodings(self, names: Iterable[str]) -> list[str]:
        every = self.sim.qc_quantize_op_dict
        had = [name for name in names if every[name].is_initialized()]
        for name in had:
            uninitialize(every[name], parameter=self._is_parameter(name))
        return had

    def float_state(self) -> Mapping[str, Tensor]:
        return FloatState(self.graph, without=self.copied)

    def remembered(self) -> Callable[[], None]:
        kept = {q: q.enabled for q in self.sim.qc_quantize_op_dict.values()}

        def put_back() -> None:
            for quantizer, enabled in kept.items():
                quantizer.enabled = enabled

        return put_back

    def original_names(self) -> Callable[[str], str]:
        return lambda name: name  # a graph has names of its own

    def aliases(self) -> Mapping[str, str]:
        """Return the layer of a node's name, also of one that fusing or a bias gave it."""
        named = {n: name for name, every in layer_aliases(self).items() for n in every}
        return {**named, **node_names(self.graph, self.layers)}

    @contextmanager
    def recurrent_as_linear(self) -> Iterator[None]:
        if not any(node.op_type in OPERATORS for node in self.graph.nodes):
            yield
            return
        names = ("graph", "layers", "others", "shells", "model")
        before = {name: self.__dict__.pop(name) for name in names if name in self.__dict__}
        self.graph, self.layers, self._helpers = with_states(before["graph"])
        try:
            yield
        finally:
            for name in names:
                self.__dict__.pop(name, None)
            self.__dict__.update(before)
            self._helpers = frozenset()

    def unsupported_layers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in self.other_quantizers():
            for use in self.others[name].uses:
                node = self.graph.nodes[use.node]
                place = node.name or f"{node.op_type} of {node.output[0]}"
                if is_matrix_of(node, self.others[name].weight):
                    found[place] = RECURRENT
                elif node.op_type not in OPERATORS and node.name not in self._helpers:
                    found[place] = f"{name} is quantized to nearest, not decided"
        return {**found, **self.layers.skipped}

    def shared_weights(self) -> dict[str, list[str]]:
        return self.layers.shared_weights()

    def batches(self, dataloader: Any, *, opaque: bool = False) -> list[Any]:
        """Return inputs of the model by name, see :func:`aimet_ext.data.feeds.named_batches`."""
        if opaque:
            raise _no_forward_fn()
        return named_batches(dataloader, input_specs(self.graph.inputs))

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
        """Start a walk through the graph, in onnxruntime."""
        if options.get("forward_fn") is not None:
            raise _no_forward_fn()
        from aimet_ext.onnx.walk.walk import OnnxWalk

        return OnnxWalk(
            self.graph,
            {**self.layers, **{n: w for n, w in self.others.items() if n in effective}},
            self.shells,
            batches,
            layers,
            streams=streams,
            effective=effective,
            cache_dir=options.get("cache_dir"),
            device=options.get("device"),
        )

    def find_blocks(
        self, description: TopologyDescription | None, run: Callable[[], object] | None = None
    ) -> list[BlockTopology]:
        from aimet_ext.sim.onnx.blocks import add_blocks

        return add_blocks(self, description)

    def check_rotary(self) -> None:
        from aimet_ext.onnx.rewrite.rotate import queries_and_keys

        queries_and_keys(self.graph)

    def own_parameters(
        self, kinds: Collection[str], description: TopologyDescription | None
    ) -> AbstractContextManager[None]:
        """Open a context in which what pairs of these kinds rescale has one reader.

        They stay copied after it, unless it is left by an exception.
        """
        from aimet_ext.sim.onnx.blocks import copy_shared

        return self._copied(lambda: copy_shared(self, kinds, description))

    def own_ends(self, description: TopologyDescription | None) -> AbstractContextManager[None]:
        from aimet_ext.sim.onnx.residual import copy_ends

        return self._copied(lambda: copy_ends(self, description))

    @contextmanager
    def _copied(self, make: Callable[[], Copies]) -> Iterator[None]:
        """Open a context with copies, which are taken out again if it is left by an exception."""
        session, stale, before = self.sim.session, self._stale, self.copied
        copies = make()
        try:
            self._look_again((*before, *copies.names))
            yield
        except BaseException:
            copies.undo()
            self._look_again(before)
            self._stale = stale or self.sim.session is not session
            self.refresh()
            raise

    def residual_ends(
        self, blocks: Sequence[BlockTopology], batch: Any, forward_fn: ForwardFn | None
    ) -> ResidualEnds:
        from aimet_ext.sim.onnx.residual import add_ends

        return add_ends(self, blocks[0].name.rpartition(".")[0], batch)

    def survey(self, batches: Sequence[Any], forward_fn: ForwardFn | None) -> Survey:
        from aimet_ext.sim.onnx.residual import survey

        return survey(self, batches)

    def logits_behind(
        self, blocks: Sequence[BlockTopology], forward_fn: ForwardFn | None
    ) -> Callable[[Any, Tensor], Tensor]:
        from aimet_ext.sim.onnx.residual import logits_behind

        return logits_behind(self, blocks[0].name.rpartition(".")[0])

    def probe_batch(self) -> Any:
        from aimet_ext.sim.onnx.residual import probe_batch

        return probe_batch(self)

    def _look_again(self, copied: Sequence[str]) -> None:
        """Drop the index of the graph, some of whose nodes read other tensors now."""
        self.copied = tuple(copied)
        self.parts.clear()
        for name in ("graph", "layers", "others", "shells", "model"):
            self.__dict__.pop(name, None)
        if copied:
            self.touch()

    def block_pass(
        self,
        blocks: Sequence[str],
        batches: Sequence[Any],
        *,
        effective: Mapping[str, Tensor],
        **options: Unpack[WalkOptions],
    ) -> BlockPass:
        """Capture both streams at the first block, the quantizers being off."""
        if options.get("forward_fn") is not None:
            raise _no_forward_fn()
        from aimet_ext.sim.onnx.blocks import open_pass

        return open_pass(self, blocks, batches, effective, **options)

    def commit(self, module: str) -> None:
        """Write a block's parameters, changed in place, to where the model stores them."""
        if module in self.parts:
            self.parts[module].commit()
            self.touch()

    def touch(self) -> None:
        """Note that values of the model changed, which the session does not see by itself."""
        self._stale = True

    def refresh(self) -> None:
        """Build the session anew if values of the model changed since it was built."""
        if self._stale:
            rebuild_session(self.sim)
            self._stale = False

    @contextmanager
    def preserved_state(self) -> Iterator[None]:
        """Open a context at whose end the session computes with the weights as they are then.

        Not after an exception: first the weights have to be put back, in a context of their own.
        """
        yield
        self.refresh()

    @property
    def framework(self) -> Literal["onnx"]:
        return "onnx"

    @property
    def runner(self) -> Any:
        return self.sim.session

    def lint_facts(self) -> SimFacts:
        from aimet_ext.sim.onnx.facts import read_facts

        return read_facts(self)

    def _layer(self, name: str) -> OnnxLayer | None:
        """Return the layer of a module's name, also of its name within a part."""
        if name in self.layers:
            return self.layers[name]
        keys = name.split(".")
        for depth in range(1, len(keys) + 1):
            part = self.parts.get(".".join(keys[:depth]))
            inner = ".".join(keys[depth:])
            if part is not None and inner in part.layers:
                return part.layers[inner]
        self._module(name)
        return None

    def _module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"a layer of the ONNX model is required, got {name!r}; "
                "see the names of its MatMul, Gemm, Conv and Gather nodes"
            ) from error

    def _stored_in(self, module: str) -> list[str]:
        """Return the names of a module's stored values, biases among them."""
        if module in self.parts:
            return list(self.parts[module].stored)
        self._module(module)
        prefix = f"{module}." if module else ""
        if module in self.layers:  # which is asked for each layer
            inside = [self.layers[module]]
        else:
            inside = [x for name, x in self.layers.items() if name.startswith(prefix)]
        names = (name for layer in inside for name in (layer.weight, layer.bias))
        return list(dict.fromkeys(name for name in names if name is not None))

    def _quantized_in(self, module: str) -> list[str]:
        """Return the names of a module's stored values and of what a block computes, "" for all."""
        if not module:
            return list(self.sim.qc_quantize_op_dict)
        tensors = self.parts[module].tensors if module in self.parts else ()
        return [*self._stored_in(module), *tensors]

    def _tensors_of(self, module: str) -> list[str]:
        """Return the tensors that a module reads or makes."""
        if module in self.parts:
            return list(dict.fromkeys(self.parts[module].tensors))
        layer = self._layer(module)
        uses = () if layer is None else layer.uses
        return list(dict.fromkeys(tensor for use in uses for tensor in (use.input, use.output)))

    def _is_parameter(self, name: str) -> bool:
        if len(self._parameters) != len(self.sim.param_names):
            self._parameters = frozenset(self.sim.param_names)
        return name in self._parameters


def _no_forward_fn() -> TypeError:
    """Return the error for a ``forward_fn``, which has no model to call."""
    return TypeError(
        "forward_fn must be left out for an ONNX simulation, whose model is called with its "
        "inputs by name; got one"
    )
