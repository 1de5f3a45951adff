"""Experts that a model keeps in one three-dimensional parameter, as linear layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.walk.hooks import evaluating
from aimet_ext.walk.routing import PackedLayers, RoutedLayers, tokens_of

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_FLAT = ("w1", "v1", "w2")

#: Largest max|change| / max|output|; sums of half-precision products differ by their order.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def are_packed(module: nn.Module) -> bool:
    """Return True if a module holds experts in packed parameters and can be taken apart.

    That is told from its parameters, ``gate_up_proj`` or ``up_proj`` and ``down_proj``, of three
    dimensions with the experts first, and from its ``forward``, which takes hidden states, chosen
    experts and their weights, or hidden states that stand there once for each expert. Without as
    many ``down_proj``, the last experts return what they are given. Other forms are those of
    :class:`FlatExperts` and of :class:`SortedExperts`.
    """
    if _flat(module) or _is_sorted(module):
        return True
    packed: list[Any] = [getattr(module, name, None) for name in (_up_name(module), _DOWN)]
    if not all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in packed):
        return False
    spare = len(packed[0]) - len(packed[1])
    return _arguments(module) == 3 if spare > 0 else _arguments(module) in (1, 3) and not spare


def _arguments(module: nn.Module) -> int:
    return len(inspect.signature(type(module).forward).parameters) - 1


def _up_name(module: nn.Module) -> str:
    return next((name for name in _UP if hasattr(module, name)), _UP[0])


class SplitExperts(nn.Module):
    """The experts of a module that kept them packed, each a linear layer behind another.

    ``gate_up_proj`` and ``down_proj`` are lists of layers now. What stands between them is the
    original's own: its activation, limits and gate.

    An expert computes the tokens that are routed to it. While a graph is traced, or inside
    :func:`all_tokens`, every expert computes all tokens and those of others count zero, so that no
    shape depends on data. Experts without a ``down_proj`` return what they are given.

    :param experts: Module of packed experts, whose weights are copied.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        up = _up_name(experts)
        for name, value in vars(experts).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)  # limits and the like, which a gate may read
        for name, child in experts.named_children():
            self.add_module(name, child)
        self.dense = False
        self.gated = up == _UP[0]
        self.count = len(getattr(experts, _DOWN))
        self.idle = len(getattr(experts, up)) - self.count
        own = getattr(type(experts), "_apply_gate", None)
        self.apply_gate: Callable[[Any, Tensor], Tensor] = _gate if own is None else own
        packed = getattr(experts, up), getattr(experts, _DOWN)
        by_shape = packed[0].shape[-1] != packed[1].shape[-2]
        transposed = bool(getattr(experts, "is_transposed", by_shape))
        setattr(self, up, _layers(experts, up, transposed=transposed))
        setattr(self, _DOWN, _layers(experts, _DOWN, transposed=transposed))
        self.train(experts.training)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of what the chosen experts make of each token.

        :param hidden: ``[tokens, width]``.
        :param chosen: numbers of experts, ``[tokens, k]``.
        :param weights: ``[tokens, k]``.
        """
        total = torch.zeros_like(hidden)
        if self.idle:
            kept = (weights * (chosen >= self.count).to(weights.dtype)).sum(-1, keepdim=True)
            total = total + (hidden * kept).to(total.dtype)
        for expert in range(self.count):
            if self.dense or torch.jit.is_tracing():
                share = (weights * (chosen == expert).to(weights.dtype)).sum(-1, keepdim=True)
                total = total + (self.expert(expert, hidden) * share).to(total.dtype)
                continue
            columns, tokens = tokens_of(expert, chosen)
            if len(tokens):
                output = self.expert(expert, hidden[tokens]) * weights[tokens, columns, None]
                total.index_add_(0, tokens, output.to(total.dtype))
        return total

    @property
    def layers_up(self) -> RoutedLayers:
        """The first layer of each expert."""
        return getattr(self, _UP[0] if self.gated else _UP[1])

    def expert(self, number: int, x: Tensor) -> Tensor:
        """Return what one expert makes of tokens ``[tokens, width]``."""
        own: Any = self  # with the modules of the original
        inner = self.layers_up[number](x)
        inner = self.apply_gate(self, inner) if self.gated else own.act_fn(inner)
        output = getattr(self, _DOWN)[number](inner)
        return own.post_expert_norm(output) if hasattr(self, "post_expert_norm") else output


class GroupedExperts(SplitExperts):
    """Experts whose module is called with all tokens for each of them, as those of Llama 4.

    Tokens of other experts are zeros there, and so is what comes of them.
    """

    def forward(
        self, hidden: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Return what each expert makes of its tokens.

        :param hidden: ``[experts * tokens, width]``, expert by expert.
        :param chosen: number of the expert of each row, ``[experts * tokens, 1]``, another number
            for none; None where the rows tell.
        :param weights: weights of the rows, likewise.
        """
        if self.dense or torch.jit.is_tracing():
            grouped = hidden.view(self.count, -1, hidden.shape[-1])
            return torch.cat([self.expert(number, grouped[number]) for number in range(self.count)])
        if chosen is None or weights is None:
            hidden, chosen, weights = self.routing(hidden)
        return super().forward(hidden, chosen, weights)

    def routing(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the call of the other form, in which a row goes to one expert or to none."""
        owner = torch.arange(self.count, device=hidden.device)
        owner = owner.repeat_interleave(len(hidden) // self.count)
        chosen = torch.where(hidden.any(-1), owner, -1)[:, None]
        return hidden, chosen, torch.ones_like(chosen, dtype=hidden.dtype)


class FlatExperts(SplitExperts):
    """Experts whose matrices follow each other in ``mlp.w1``, ``v1`` and ``w2``, as DBRX's.

    An expert is ``w2 (f(w1 x) * v1 x)``, with ``w2`` stored as ``[in, out]``.

    :param experts: Module that holds them, called with chosen experts and weights.
    """

    w1: RoutedLayers
    v1: RoutedLayers
    w2: RoutedLayers

    def __init__(self, experts: Any) -> None:
        nn.Module.__init__(self)
        self.dense = False
        self.count, self.idle = int(experts.num_experts), 0
        self.activation_fn = experts.mlp.activation_fn
        for name in _FLAT:
            matrices = getattr(experts.mlp, name).unflatten(0, (self.count, -1))
            turned = name == "w2"
            layers = _linears(matrices, None, transposed=turned)
            routed = RoutedLayers(layers, transposed=turned, packed=f"mlp.{name}", stacked=False)
            setattr(self, name, routed)
        self.train(experts.training)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of what the chosen experts make of each token.

        :param hidden: ``[..., width]``.
        :param chosen: numbers of experts, ``[tokens, k]``.
        :param weights: ``[tokens, k]``.
        """
        return super().forward(hidden.flatten(0, -2), chosen, weights).view_as(hidden)

    @property
    def layers_up(self) -> RoutedLayers:
        """The first layer of each expert."""
        return self.w1

    def expert(self, number: int, x: Tensor) -> Tensor:
        """Return what one expert makes of tokens ``[tokens, width]``."""
        output: Tensor = self.w2[number](
            self.activation_fn(self.w1[number](x)) * self.v1[number](x)
        )
        return output


class SortedExperts(nn.Module):
    """A layer for each expert, called with the rows of all experts in turn, as those of JetMoe.

    :param experts: Module with a ``weight [experts, out, in]``.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        layers = _linears(experts.weight, None, transposed=False)
        self.layers = PackedLayers(layers, transposed=False, packed="weight")
        self.dense = False
        self.train(experts.training)

    def forward(self, rows: Tensor, sizes: Sequence[int] | Tensor) -> Tensor:
        """Return what the experts make of their rows.

        :param rows: ``[rows, in]``, those of the first expert first.
        :param sizes: number of rows of each expert; a tensor while a graph is traced, in which no
            shape may depend on data: then every expert computes all rows.
        """
        if not (self.dense or isinstance(sizes, Tensor)):
            parts = zip(self.layers, rows.split(sizes), strict=True)
            return torch.cat([layer(part) for layer, part in parts if len(part)])
        ends = torch.as_tensor(sizes, device=rows.device).cumsum(0)
        place = torch.arange(len(rows), device=rows.device)
        owner = (place[:, None] >= ends).sum(-1, keepdim=True)  # [rows, 1]
        return sum(layer(rows) * (owner == n).to(rows) for n, layer in enumerate(self.layers))


def _flat(module: nn.Module) -> bool:
    """Return True for what :class:`FlatExperts` takes apart."""
    mlp: Any = getattr(module, "mlp", None)
    found: list[Any] = [getattr(mlp, name, None) for name in _FLAT]
    if not all(isinstance(p, nn.Parameter) and p.dim() == 2 for p in found):
        return False
    count = getattr(module, "num_experts", 0)
    fits = bool(count) and len({p.shape for p in found}) == 1 and not len(found[0]) % count
    return fits and hasattr(mlp, "activation_fn") and _arguments(module) == 3


def _is_sorted(module: nn.Module) -> bool:
    """Return True for what :class:`SortedExperts` takes apart."""
    own = dict(module.named_parameters())
    return own.keys() == {"weight"} and own["weight"].dim() == 3 and _arguments(module) == 2


@contextmanager
def all_tokens(model: nn.Module) -> Iterator[None]:
    """Return a context in which every expert is called, whatever tokens are sent to it."""
    kinds = (SplitExperts, SortedExperts)
    split = [module for module in model.modules() if isinstance(module, kinds)]
    try:
        for module in split:
            module.dense = True
        yield
    finally:
        for module in split:
            module.dense = False


def _gate(experts: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def _layers(experts: Any, name: str, *, transposed: bool) -> RoutedLayers:
    """Return copies of a packed parameter's matrices, and of its biases, as layers."""
    packed, biases = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    count = len(getattr(experts, _DOWN))
    layers = _linears(packed[:count], biases, transposed=transposed)
    return RoutedLayers(layers, transposed=transposed, idle=len(packed) - count)


def _linears(packed: Tensor, biases: Tensor | None, *, transposed: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number in range(len(packed)):
        weight = packed.detach()[number]
        weight = (weight.T if transposed else weight).clone(memory_format=torch.contiguous_format)
        outputs, width = weight.shape
        layer = nn.Linear(width, outputs, bias=biases is not None, device="meta")
        layer.weight = nn.Parameter(weight, packed.requires_grad)
        if biases is not None:
            layer.bias = nn.Parameter(biases.detach()[number].clone(), biases.requires_grad)
        layers.append(layer)
    return layers


def split_experts(experts: Any) -> nn.Module | str:
    """Take packed experts apart, and prove on tokens for each of them that nothing else changed.

    :param experts: Module of which :func:`are_packed` is True; it stays as it is.
    :returns: the experts as layers; or, if they compute something else, how far off they are.
    """
    try:
        split, inputs = _split(experts)
        with evaluating(experts), evaluating(split), torch.no_grad():
            expected = experts(*inputs)
            change = float((split(*inputs) - expected).abs().max() / expected.abs().max())
    except (RuntimeError, AttributeError, TypeError) as error:
        return f"as linear layers they fail with {type(error).__name__}: {error}"
    bound = BOUNDS.get(expected.dtype, 0.0)
    if change <= bound:
        return split
    return f"as linear layers they are off by {change:.1e} of their output, allowed is {bound:.0e}"


def _split(experts: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return experts as layers, and inputs for both."""
    if _is_sorted(experts):
        count, _, width = experts.weight.shape
        rows = torch.randn(2 * count, width, generator=torch.Generator().manual_seed(0))
        return SortedExperts(experts), (rows.to(experts.weight), [2] * count)
    if _flat(experts):
        flat = FlatExperts(experts)
        hidden, chosen, weights = _tokens(flat)
        return flat, (hidden[None], chosen, weights)
    if _arguments(experts) == 1:
        grouped = GroupedExperts(experts)
        return grouped, _groups(grouped)
    split = SplitExperts(experts)
    return split, _tokens(split)


def _groups(split: SplitExperts) -> tuple[Tensor]:
    """Return tokens for each expert, of which the second half is another's."""
    layer: Any = split.layers_up[0]
    hidden = torch.randn(
        split.count, 4, layer.in_features, generator=torch.Generator().manual_seed(0)
    )
    hidden[:, 2:] = 0
    return (hidden.flatten(0, 1).to(layer.weight),)


def _tokens(split: SplitExperts) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, two experts for each, and weights of these."""
    layer: Any = split.layers_up[0]
    like, count = layer.weight, split.count + split.idle
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(2 * count)[:, None]
    chosen = (tokens + torch.arange(min(2, count))) % count  # [tokens, k]
    hidden = torch.randn(len(tokens), layer.in_features, generator=generator)
    weights = 0.5 + torch.rand(chosen.shape, generator=generator)
    return hidden.to(like), chosen.to(like.device), weights.to(like)
