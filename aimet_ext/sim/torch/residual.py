"""The ends of a PyTorch simulation's residual stream: untied, found and computed by themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.data.batches import ForwardFn, call_model
from aimet_ext.models.proof import float64_casts
from aimet_ext.models.residual import (
    ResidualEnds,
    Survey,
    classify_ends,
    logits_of,
    read_norms,
    without_blocks,
)
from aimet_ext.models.topology import BlockTopology
from aimet_ext.walk.hooks import evaluating, run_batch

if TYPE_CHECKING:
    from aimet_ext.sim.torch.adaptor import TorchSim


@contextmanager
def untied(model: nn.Module, groups: Sequence[Sequence[str]]) -> Iterator[None]:
    """Give all but the first module of each group a weight, and a quantizer of it, of its own.

    They stay so after the context, unless it is left by an exception. Configs no longer say that
    embeddings are tied, or a checkpoint of the model would lose a weight.

    :param groups: Names of modules that share a weight.
    """
    undo: list[Callable[[], object]] = []

    def put(where: Any, key: str, value: Any) -> None:
        before = where[key]
        undo.append(lambda: where.__setitem__(key, before))
        where[key] = value

    try:
        for module in (model.get_submodule(name) for group in groups for name in group[1:]):
            weight = module.get_parameter("weight")
            own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            put(module._parameters, "weight", own)
            quantizers: Any = getattr(module, "param_quantizers", {})
            if "weight" in quantizers and quantizers["weight"] is not None:
                put(quantizers, "weight", copy.deepcopy(quantizers["weight"]))
        configs = {
            id(config): vars(config)
            for module in (model.modules() if groups else ())
            if (config := getattr(module, "config", None)) is not None
        }
        for fields in configs.values():
            if fields.get("tie_word_embeddings"):
                put(fields, "tie_word_embeddings", False)
        yield
    except BaseException:
        with uninterrupted():
            while undo:
                undo.pop()()
        raise


def shared_outside(
    model: nn.Module, shared: Mapping[str, Sequence[str]], blocks: Sequence[str]
) -> list[list[str]]:
    """Return the groups of different modules outside of the blocks that share a weight.

    Tables come first, since it is the output layer that takes over gains.
    """
    inside = tuple(f"{name}." for name in blocks)
    groups: dict[int, list[str]] = {}
    for names in shared.values():
        modules = {id(model.get_submodule(name)): name for name in names}
        outside = [name for name in modules.values() if not name.startswith(inside)]
        if len(outside) > 1:
            outside.sort(key=lambda name: not isinstance(model.get_submodule(name), nn.Embedding))
            groups[id(model.get_submodule(outside[0]).weight)] = outside
    return list(groups.values())


def survey(adaptor: TorchSim, batches: Sequence[Any], forward_fn: ForwardFn | None) -> Survey:
    """Return the float outputs of a simulation, and the ranges of what its quantizers read."""
    outputs: list[Tensor] = []

    def run() -> None:
        for number, batch in enumerate(batches):
            outputs.append(logits_of(run_batch(adaptor.model, batch, number, forward_fn)))

    with evaluating(adaptor.model), torch.no_grad():
        ranges = adaptor.tensor_ranges("", run)
    return Survey(tuple(outputs), ranges)


def find_ends(
    adaptor: TorchSim, blocks: Sequence[BlockTopology], batch: Any, forward_fn: ForwardFn | None
) -> ResidualEnds:
    """Return what stands before and behind the blocks of a simulation's model.

    :param batch: Batch on which the model without its blocks is computed.
    :raises TransformRefused: a parameter beside the blocks has no known role.
    """
    model = adaptor.model
    inside = tuple(f"{block.name}." for block in blocks)
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in adaptor.float_parameters("").items():
        if not name.startswith(inside):
            module, _, key = name.rpartition(".")
            modules.setdefault(module, {})[key] = tuple(parameter.shape)
    tables = [name for name in modules if isinstance(model.get_submodule(name), nn.Embedding)]
    norm = read_norms(blocks[0])[0]
    first = model.get_submodule(blocks[0].name)
    width = first.get_parameter(f"{norm.module}.weight").shape[0]
    embeddings, last = classify_ends(modules, tables, width, norm.gain_offset)
    function = _OutputsWithoutBlocks(adaptor, [b.name for b in blocks], batch, forward_fn)
    return ResidualEnds(embeddings, last, function)


class _Runner(nn.Module):
    """A model whose parameters can be replaced, however it is called."""

    def __init__(self, model: nn.Module, forward_fn: ForwardFn | None) -> None:
        super().__init__()
        self.inner, self.forward_fn = model, forward_fn

    def forward(self, batch: Any) -> Tensor:
        """Return the logits of a batch."""
        return logits_of(call_model(self.inner, batch, self.forward_fn))


def logits_behind(
    adaptor: TorchSim, blocks: Sequence[BlockTopology], forward_fn: ForwardFn | None
) -> Callable[[Any, Tensor], Tensor]:
    """Return a function from a batch and its last hidden states to the float model's logits."""
    model = adaptor.model
    modules = [model.get_submodule(block.name) for block in blocks]
    kinds: dict[str, bool] = {}

    def logits(batch: Any, hidden: Tensor) -> Tensor:
        if not kinds:
            kinds["tuple"] = _returns_tuple(adaptor, modules[0], batch, forward_fn)
        with (
            adaptor.disabled_quantizers(),
            without_blocks(modules, kinds["tuple"], hidden),
            evaluating(model),
        ):
            return logits_of(call_model(model, batch, forward_fn))

    return logits


def _returns_tuple(
    adaptor: TorchSim, block: nn.Module, batch: Any, forward_fn: ForwardFn | None
) -> bool:
    """Return True if a block's output is a tuple."""
    kinds: list[type] = []

    def see(_module: Any, _args: Any, output: Any) -> None:
        kinds.append(type(output))

    hook = block.register_forward_hook(see)
    try:
        with adaptor.disabled_quantizers(), evaluating(adaptor.model), torch.no_grad():
            run_batch(adaptor.model, batch, 0, forward_fn)
    finally:
        hook.remove()
    return bool(kinds) and issubclass(kinds[0], tuple)


class _OutputsWithoutBlocks:
    """See :data:`aimet_ext.models.residual.EndsFn`."""

    def __init__(
        self, adaptor: TorchSim, blocks: Sequence[str], batch: Any, forward_fn: ForwardFn | None
    ) -> None:
        self.adaptor, self.batch, self.forward_fn = adaptor, batch, forward_fn
        self.blocks = [adaptor.model.get_submodule(name) for name in blocks]
        self.inside = tuple(f"{name}." for name in blocks)
        self.returns_tuple = _returns_tuple(adaptor, self.blocks[0], batch, forward_fn)

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the model's outputs in the dtype of the parameters, the blocks left out."""
        model, dtype = self.adaptor.model, next(iter(params.values())).dtype
        runner = _Runner(model, self.forward_fn)
        with (
            self.adaptor.disabled_quantizers(),
            without_blocks(self.blocks, self.returns_tuple),
            evaluating(model),
            torch.no_grad(),
            float64_casts(dtype),
        ):
            every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            outside = {n: v.detach() for n, v in every.items() if not n.startswith(self.inside)}
            cast = {n: v.to(dtype) if v.is_floating_point() else v for n, v in outside.items()}
            values = {f"inner.{name}": value for name, value in {**cast, **params}.items()}
            result: Tensor = functional_call(runner, values, (self.batch,), tie_weights=False)
        return result
