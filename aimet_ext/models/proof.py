"""Scale pairs proved on the model at hand: multiplied in, they leave a block's output alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aimet_ext.core.equivalence import ScalePair, powers_of_two, stored_scales, transform
from aimet_ext.data.batches import map_tensors, module_device, tensors_in
from aimet_ext.errors import TransformRefused
from aimet_ext.walk.hooks import evaluating
from aimet_ext.walk.states import hidden_state, tokens_first, tokens_inside
from aimet_ext.walk.stream import nearest_config

BlockFn = Callable[[Mapping[str, Tensor]], Tensor]

_MIN_BATCH, _MIN_LENGTH = 2, 8
_LENGTH = 16
# Which axis holds the positions, in what decoder blocks of transformers receive.
_SEQUENCE_AXES = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
# A cache would carry the keys and values of one call into the next.
_CACHES = {"past_key_values": None, "past_key_value": None, "use_cache": False}

_FACTORIES = (torch.tensor, torch.full)  # of numbers in float32, if no type is named

#: Largest allowed max|change| / max|output|. float64 proves the algebra, float32 the use.
BOUNDS: Mapping[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-5}

# Beyond these a block amplifies what float32 rounds. With attention it stays below 7e-7; with
# delta rules and state space models it does not.
_CALM: Mapping[torch.dtype, float] = {torch.float32: 1e-6}
_SEEDS, _MANY_TOKENS = 4, 128


class Float64Casts(TorchFunctionMode):
    """Turns a module's own casts to float32 into casts to float64.

    ``.float()``, ``.to(float32)``, ``softmax(dtype=float32)``: whatever names float32 in a call.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with float64 in place of float32."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _widen(value) for name, value in (kwargs or {}).items()}
        if func in _FACTORIES and any(isinstance(value, float) for value in args):
            named.setdefault("dtype", torch.float64)  # which holds the lowest score of this type
        return func(*map(_widen, args), **named)


def float64_casts(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return :class:`Float64Casts` for float64, and a context that does nothing for another."""
    return Float64Casts() if dtype is torch.float64 else nullcontext()


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@dataclass(frozen=True)
class PairFailure:
    """A pair that changed the output.

    :param deviation: max|change| / max|output| in ``dtype``, where at most ``bound`` is allowed.
    """

    pair: ScalePair
    deviation: float
    bound: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"{self.pair.name} ({self.pair.kind}): max|change| / max|output| = "
            f"{self.deviation:.1e} in {str(self.dtype).rpartition('.')[2]}, "
            f"at most {self.bound:.0e} allowed"
        )


def random_scale(size: int, seed: int) -> Tensor:
    """Return a scale log-uniform in [1/4, 4], distinct per channel: float64 ``[size]``."""
    uniform = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.exp((2 * uniform - 1) * math.log(4.0))


def failing_pairs(
    block_fn: BlockFn,
    params: Mapping[str, Tensor],
    pairs: Sequence[ScalePair],
    *,
    seeds: int = 1,
    seed: int = 0,
    bounds: Mapping[torch.dtype, float] = BOUNDS,
    exact: bool = False,
) -> list[PairFailure]:
    """Return the pairs that do not leave the output alone, each multiplied in by itself.

    First all are multiplied in together: errors do not cancel under scales that are random. Each is
    tried by itself where their sum is out of bounds.

    Random scales, first in float64 under :class:`Float64Casts`, then in float32 as it is.

    :param block_fn: Output for a fixed input and the given parameters, computed in their dtype;
        :func:`probe` makes one from a module.
    :param params: Floating point parameters of the block, named relative to it. Never changed.
    :param seeds: Number of times that scales are drawn.
    :param bounds: Largest max|change| / max|output| by the type to compute in.
    :param exact: True for scales that are powers of two.
    :raises ValueError: the output is not finite or does not depend on ``params``.
    """
    failures: dict[int, PairFailure] = {}
    if not pairs:
        return []
    for dtype, bound in bounds.items():
        values = {name: value.detach().to(dtype) for name, value in params.items()}
        with torch.no_grad(), float64_casts(dtype):
            reference = _reference(block_fn, values)
            deviation = partial(_deviation, block_fn, values, reference)
            for first in range(seed, seed + seeds * len(pairs), len(pairs)):
                scales = {
                    number: _drawn(pair, first + number, values, exact=exact)
                    for number, pair in enumerate(pairs)
                    if number not in failures
                }
                if len(scales) > 1 and deviation(list(scales.values())) <= bound:
                    continue
                for number, own in scales.items():
                    found = deviation([own])
                    if not found <= bound:  # NaN fails
                        failures[number] = PairFailure(own[0], found, bound, dtype)
    return [failures[number] for number in sorted(failures)]


def _drawn(
    pair: ScalePair, seed: int, values: Mapping[str, Tensor], *, exact: bool
) -> tuple[ScalePair, Tensor]:
    """Return a pair with a random scale, as it is multiplied into parameters of one type."""
    like = next(iter(values.values()))
    scale = random_scale(pair.size, seed).to(like)
    if exact:
        return pair, powers_of_two(scale)
    (stored,) = stored_scales(values, [(pair, scale)], dict.fromkeys(values, like.dtype))
    return pair, stored


def judge_pairs(
    block_fn: Callable[[int], BlockFn], params: Mapping[str, Tensor], pairs: Sequence[ScalePair]
) -> tuple[list[PairFailure], list[str]]:
    """Return the pairs that fail, and the names of those that hold for powers of two alone.

    These are exact in float32, and multiply weights exactly too. They are for pairs behind which
    the block amplifies what other scales round; few tokens may be those that it amplifies.

    :param block_fn: Function that makes a :func:`probe` of so many tokens of each sequence.
    """
    failures = failing_pairs(block_fn(_LENGTH), params, pairs)
    exact = {f.pair.name: f.pair for f in failures if f.dtype is torch.float32}
    failures = [failure for failure in failures if failure.pair.name not in exact]
    failures += failing_pairs(block_fn(_LENGTH), params, list(exact.values()), exact=True)
    lost = {failure.pair.name for failure in failures}
    rest = [pair for pair in pairs if pair.name not in {*exact, *lost}]
    if rest:
        many = block_fn(_MANY_TOKENS)
        found = failing_pairs(many, params, rest, seeds=_SEEDS, bounds=_CALM)
        exact.update((failure.pair.name, failure.pair) for failure in found)
    return failures, [name for name in exact if name not in lost]


def prove_pairs(
    block_fn: BlockFn,
    params: Mapping[str, Tensor],
    pairs: Sequence[ScalePair],
    *,
    where: str = "the block",
    seed: int = 0,
) -> None:
    """Refuse pairs that change the output of a block; see :func:`failing_pairs`.

    :param where: Name of the block, for the error.
    :raises TransformRefused: a pair does not hold; all that do not are named.
    """
    failures = failing_pairs(block_fn, params, pairs, seed=seed)
    if failures:
        raise TransformRefused(
            f"{where}: a scale pair must leave the float function unchanged; "
            f"{'; '.join(map(str, failures))}. "
            "Leave these kinds out, or pass a TopologyDescription that fits the model"
        )


def _deviation(
    block_fn: BlockFn,
    values: Mapping[str, Tensor],
    reference: Tensor,
    scales: Sequence[tuple[ScalePair, Tensor]],
) -> float:
    """Return max|change| / max|output| after some pairs were multiplied in."""
    output = block_fn({**values, **transform(values, scales)})
    return ((output - reference).abs().max() / reference.abs().max()).item()


def _reference(block_fn: BlockFn, values: Mapping[str, Tensor]) -> Tensor:
    """Return the output to compare with, if a comparison can tell anything."""
    reference = block_fn(values)
    if not torch.isfinite(reference).all():
        raise ValueError(
            "a block must give finite outputs in a proof, got NaN or infinity; "
            "check its weights and inputs"
        )
    if torch.equal(reference, block_fn({name: value * 1.5 for name, value in values.items()})):
        raise ValueError(
            "block_fn must compute its output from params, got the same output for other params"
        )
    return reference


# ---- a block as a function of its parameters ----------------------------------------------------


def probe(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockFn:
    """Return a ``block_fn`` that calls a module with other parameters, in their dtype.

    Inputs, buffers and parameters that are not passed follow the dtype; dropout is off. Works on
    blocks of a simulation whose quantizers are off.

    :param args: positional arguments of the block, for example from :func:`probe_inputs`.
    :param kwargs: keyword arguments.
    """

    def block_fn(params: Mapping[str, Tensor]) -> Tensor:
        like = next(value for value in params.values() if value.is_floating_point())

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(like.dtype) if tensor.is_floating_point() else tensor

        rest = map_tensors(cast, {**dict(block.named_parameters()), **dict(block.named_buffers())})
        inputs = map_tensors(cast, (tuple(args), dict(kwargs)))
        with evaluating(block):
            return hidden_state(torch.func.functional_call(block, {**rest, **params}, *inputs))

    return block_fn


def probe_inputs(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, length: int = 16
) -> dict[str, Any]:
    """Make a block's inputs fit for a proof: two short sequences, the second one padded.

    Positions are cut, a single sequence gets a reversed twin, and a parameter ``attention_mask``
    becomes a causal mask that hides the last quarter of the second sequence. Caches are dropped.

    :param args: positional arguments of a captured call, hidden states
        ``[..., batch, seq, hidden]`` first unless they go by name.
    :param length: tokens to keep; all are kept if the block has tensor arguments of unknown names.
    :returns: all arguments by name; uncut where the block takes inputs of these sizes alone, as a
        graph of static shapes does.
    :raises ValueError: fewer than 8 tokens, or fewer than 8 to be kept.
    """
    named = _bind(block, args, kwargs)
    named.update({name: off for name, off in _CACHES.items() if name in named})
    short = _cut_inputs(block, dict(named), length)
    try:
        with evaluating(block), torch.no_grad():
            block(**short)
    except (RuntimeError, ValueError):
        return named
    return short


def _cut_inputs(block: nn.Module, named: dict[str, Any], length: int) -> dict[str, Any]:
    first = next(iter(named))
    hidden = tokens_first(named[first])
    batch, seq = hidden.shape[:2]
    if min(length, seq) < _MIN_LENGTH:
        raise ValueError(
            f"a proof needs sequences of at least {_MIN_LENGTH} tokens, got {min(length, seq)}; "
            "calibrate with longer sequences"
        )
    unknown = named.keys() - {first, "attention_mask", *_SEQUENCE_AXES}
    length = seq if any(tensors_in(named[name]) for name in unknown) else min(length, seq)

    def cut(tensor: Tensor, axis: int = -1, kept: int | None = None) -> Tensor:
        own = tensor.ndim > -axis and tensor.shape[0] == batch
        rows = tensor[:_MIN_BATCH] if own else tensor
        if kept is not None:
            return rows.narrow(axis, 0, kept)
        twice = own and batch == 1 and tensor.ndim > 1  # beside the twin of the hidden states
        return rows.expand(_MIN_BATCH, *rows.shape[1:]) if twice else rows

    for name, value in named.items():
        axis = _SEQUENCE_AXES.get(name)
        if axis is not None:
            named[name] = map_tensors(partial(cut, axis=axis, kept=length), value)
        elif name in unknown:
            named[name] = map_tensors(cut, value)
    hidden = hidden[:_MIN_BATCH, :length]
    hidden = hidden if batch > 1 else torch.cat([hidden, hidden.flip(1)])
    named[first] = tokens_inside(hidden)
    if "attention_mask" in inspect.signature(block.forward).parameters:
        named["attention_mask"] = _padded_mask(hidden, named.get("attention_mask"))
    return named


def _bind(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, the first parameter first."""
    signature = inspect.signature(block.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and named.pop(parameter.name, ()):
            raise ValueError(
                f"{type(block).__name__}.forward must name its parameters, got *{parameter.name}"
            )
    return named


def _padded_mask(hidden: Tensor, like: Any) -> Tensor:
    """Return a mask of the form of ``like`` that hides a quarter of the second sequence."""
    batch, length = hidden.shape[:2]
    real = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    real[1, length - length // 4 :] = False
    if isinstance(like, Tensor) and like.ndim == 2:
        return real.to(like.dtype)
    visible = real[:, None, None, :] & real.new_ones(length, length).tril()
    if isinstance(like, Tensor) and like.dtype is torch.bool:
        return visible  # [batch, 1, length, length]
    hidden_score = torch.finfo(hidden.dtype).min
    return torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, hidden_score)


def probe_batch(model: nn.Module) -> Any:
    """Return two short sequences of random ids, the second one padded where the model has masks.

    :raises ValueError: the model looks up no ids in a table.
    """
    getter = getattr(getattr(model, "model", model), "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    if not isinstance(table, nn.Embedding):
        tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
        table = next(tables, None)
    if table is None:
        raise ValueError(
            "dataloader must be given for a model without a table of embeddings, got none"
        )
    generator = torch.Generator().manual_seed(0)
    config = nearest_config(model, "?", "max_position_embeddings")
    length = min(_LENGTH, getattr(config, "max_position_embeddings", _LENGTH))
    ids = torch.randint(0, table.num_embeddings, (_MIN_BATCH, length), generator=generator)
    ids = ids.to(module_device(model))
    taken = inspect.signature(model.forward).parameters
    if "attention_mask" not in taken or "input_ids" not in taken:
        return (ids,)
    mask = torch.ones_like(ids)
    mask[1, length - length // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
