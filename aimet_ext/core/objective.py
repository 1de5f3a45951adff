"""Errors of a quantized layer or block against its float original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_TILE = 128  # columns; smaller ones save more products, and make each slower
#: Of fewer tokens than this for each input of a layer, roundings learn more noise than signal.
TOKENS_AN_INPUT = 4
#: Tokens of all experts, for each input of a layer that leans on them.
POOLED_AN_INPUT = 16
# Noise of a smaller share than this counts by its square: it turns more codes than it is worth.
_FAINT = 0.05


def is_short(tokens: float, inputs: int) -> bool:
    """Return whether so few tokens came that what is decided may fit these alone."""
    return tokens < TOKENS_AN_INPUT * inputs


@dataclass(frozen=True, eq=False)
class Noise:
    """Shares of noise in a second moment, estimated from its own rows; ``[]`` or ``[groups]``.

    :param products: Share in the products of two inputs, what is beside the diagonal.
    :param squares: Share in what tells one input's mean square from another's.
    """

    products: Tensor
    squares: Tensor

    @classmethod
    def of(cls, second: Tensor, tokens: int, powers: Tensor) -> Noise:
        """Estimate the shares with the least expected squared error (Schäfer and Strimmer 2005).

        Faint ones are taken for fainter still, so that with many tokens nothing changes.

        :param second: ``H``, ``[in, in]`` or ``[groups, in, in]``.
        :param tokens: Independent rows that it is the mean of, or as many as they are worth; of
            rows that count ``s`` each, ``(Σ s)² / Σ s²`` at most.
        :param powers: Means of ``(Σ x²)²`` and of ``Σ x⁴`` over rows, ``[2]`` or ``[2, groups]``;
            those of rows that count ``s`` each are weighted by ``s²``.
        """
        own = second.diagonal(dim1=-2, dim2=-1).double().square().sum(-1)
        beside, spread = _inner(second, second)
        norms, fourth = powers.double().to(second.device)
        variance = torch.stack([norms - fourth - beside, fourth - own])
        variance = variance / (tokens - 1) if tokens > 1 else variance + torch.inf
        shares = (variance / torch.stack([beside, spread])).nan_to_num(1.0, 1.0).clamp(0, 1)
        return cls.within(second, shares.square() * (1 + _FAINT) / (shares + _FAINT))

    @classmethod
    def within(cls, second: Tensor, shares: Tensor) -> Noise:
        """Return shares ``[2, ...]`` within what can be taken out of a moment."""
        # Not all: what was seen has to be told from the rest, in this precision.
        most = 1 - torch.finfo(second.dtype).eps ** 0.5
        products, squares = shares.clamp(0, most)  # float64: what is left may be small
        return cls(products, squares)


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Return inner products of two moments, ``[2, ...]``, in float64.

    The first is that beside the diagonals, the second that of the diagonals' deviations from their
    means over inputs that are not always 0.
    """
    squares = []
    for second in (one, other):
        diagonal = second.diagonal(dim1=-2, dim2=-1).double()  # [..., in]
        alive = diagonal > 0
        mean = diagonal.sum(-1) / alive.sum(-1).clamp_min(1)
        squares.append((diagonal, (diagonal - mean[..., None]) * alive))
    (own, spread), (others, spreads) = squares
    if one is other:
        every = torch.linalg.vector_norm(one, dim=(-2, -1), dtype=torch.float64).square()
    else:
        every = (one * other).sum((-2, -1), dtype=torch.float64)
    return torch.stack([every - (own * others).sum(-1), (spread * spreads).sum(-1)])


@dataclass(frozen=True, eq=False)
class _Seen:
    """Difference of a moment from what it was before it was shrunk, as far as errors need it.

    :param kept: Share of the products that was kept, ``[]`` or ``[groups]``.
    :param pulled: The same of ``C``, a number of its own included.
    :param rest: Diagonal to add once the moment is divided by ``kept``, ``[..., in]``.
    """

    kept: Tensor
    pulled: Tensor
    rest: Tensor


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """Moments of a linear layer's inputs that determine its output error exactly.

    With the quantized stream's inputs ``x̂`` and the float stream's ``x = x̂ + e``, over all tokens

        Σ ‖W x − Ŵ x̂‖² = tr(E H Eᵀ) − 2 tr(E C Wᵀ) + Σ ‖W e‖²,   E = Ŵ − W,

    ``H = Σ x̂ x̂ᵀ`` and ``C = Σ x̂ eᵀ``: the difference form, which does not cancel.

    :param second: ``H [in, in]``, divided by the number of tokens; ``[groups, in, in]`` for a
        convolution in groups, each of which has inputs and output rows of its own; ``[in]`` for a
        diagonal ``H``.
    :param cross: ``C``, of the same shape, likewise; None where the target is ``W x̂``.
    :param tokens: number of tokens.
    :param peak: largest magnitude of an input; 0 if it is not known.
    :param noise: shares of noise, None if they are not known.
    :param worth: number of tokens that would tell as much if each counted alike; None for all.
    :param leaned: share of another moment in it, see :meth:`leaning`.
    :param through: true if ``cross`` is ``C Wᵀ [in, out]`` of the one layer that reads the inputs.
    """

    second: Tensor
    cross: Tensor | None
    tokens: int
    peak: float = 0.0
    noise: Noise | None = None
    worth: float | None = None
    leaned: float = 0.0
    through: bool = False
    _seen: _Seen | None = None
    _known: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return what is made of this moment, which all layers that read one input share."""
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    @classmethod
    def of_none(cls, width: int, dtype: torch.dtype, like: Tensor) -> SecondMoment:
        """Return the moment of no tokens, of inputs of a width, where ``like`` is."""
        return cls(torch.zeros(width, width, dtype=dtype, device=like.device), None, 0)

    @property
    def is_known(self) -> bool:
        """True if there were tokens to tell it, of its own or of those that it leans on."""
        return self.tokens > 0 or self.leaned > 0

    @property
    def is_noisy(self) -> bool:
        """True if noise in it is not faint."""
        return not self.tokens or self.noise is None or bool((self.noise.products > _FAINT).any())

    @property
    def is_short(self) -> bool:
        """True if the tokens are too few, see :func:`is_short`."""
        return is_short(self.effective_tokens, self.second.shape[-1])

    @property
    def effective_tokens(self) -> float:
        """Number of tokens that would tell as much if each counted alike."""
        return self.tokens if self.worth is None else self.worth

    def leaning(self, pool: SecondMoment, among: float) -> SecondMoment:
        """Return the mean of this moment and another one that has the least noise for its tokens.

        Of all ``a H + b P`` beside the diagonal, that of the least expected squared error is taken.
        ``H`` and ``P`` are in the result in the proportion ``a : b``, and ``1 - a - b`` is the
        share of noise, or more if both have more. With few tokens ``P`` decides, as far as ``H``
        resembles it; with many nothing changes. The number of tokens stays.

        :param pool: ``P`` of many tokens of a like kind, of the same shape ``[in, in]``.
        :param among: Number of the tokens that those of ``P`` were drawn from, this one's among
            them.
        """
        leaned, noise = 1.0, pool.noise
        assert noise is not None
        if self.tokens:
            own, both = _inner(self.second, self.second), _inner(self.second, pool.second)
            theirs = _inner(pool.second, pool.second)
            assert self.noise is not None
            known = 1 - torch.stack([self.noise.products, self.noise.squares]).to(own)
            both -= min(1.0, self.tokens / among) * (1 - known) * own  # the same noise in both
            # Expected products with what H is to be: H's own lacks its noise, P's is as it is.
            kept = (known * own * theirs - both.square())[0].clamp_min(0)
            given = ((1 - known) * own * both)[0].clamp_min(0)
            leaned = float((given / (kept + given)).nan_to_num(0.0))
            if not leaned:
                return self
            rest = 1 - leaned
            size = rest**2 * own + 2 * rest * leaned * both + leaned**2 * theirs
            met = rest * known * own + leaned * both
            # At least as if noise were the same in both; squares lose no more than products.
            other = torch.stack([noise.products, noise.squares]).to(own)
            shares = 1 - (met / size).nan_to_num(0.0)
            shares = torch.maximum(shares, rest * (1 - known) + leaned * other)
            noise = Noise.within(self.second, torch.minimum(shares, shares[0]))
        cross, rest = self.cross, 1 - leaned
        if pool.cross is not None:
            cross = leaned * pool.cross + (0 if cross is None else rest * cross)
        worth = leaned**2 / pool.effective_tokens
        worth += rest**2 / self.effective_tokens if self.tokens else 0
        return replace(
            self,
            second=rest * self.second + leaned * pool.second,
            cross=cross,
            peak=max(self.peak, pool.peak),
            noise=noise,
            worth=1 / worth,
            leaned=leaned,
            _known={},
        )

    def shrunk(self, strength: float = 1.0) -> SecondMoment:
        """Return the moment to decide by, in place of this one: less noise, by what is known of it.

        Products of inputs shrink towards 0, and mean squares towards their mean: with the least
        evidence, errors count alone and each alike, which is plain rounding; with much, nothing
        changes. Inputs that are always 0 stay so.

        :param strength: share of ``C`` to keep besides.
        """
        second, cross = self.second, self.cross
        none = second.new_zeros(second.shape[:-2])
        noise = self.noise or Noise(none, none)
        diagonal = second.diagonal(dim1=-2, dim2=-1)  # [..., in]
        own, alive = diagonal.clone(), diagonal > 0
        mean = own.sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp_min(1)
        new = torch.where(alive, torch.lerp(own, mean, noise.squares[..., None].to(own)), own)
        kept = (1 - noise.products).to(own)
        second.mul_(kept[..., None, None])
        diagonal.copy_(new)
        if cross is not None:
            cross.mul_(strength * kept[..., None, None])
        return replace(
            self, _seen=_Seen(kept, strength * kept, own - new / kept[..., None]), _known={}
        )

    def errors(self, error: Tensor, pull: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return :func:`row_errors` as decided by, and on the rows as they came, each ``[out]``.

        The two differ where the moment was shrunk.

        :param error: quantized minus float weight, ``[out, in]``.
        :param pull: that of the shrunk moment, ``[out, in]`` or None.
        """
        squares = row_errors(error, self.second, None)
        pulled = 0.0 if pull is None else 2 * (pull * error).sum(1)
        if self._seen is None:
            return squares - pulled, squares - pulled

        def by_row(numbers: Tensor) -> Tensor:  # [groups, …] or […] as [out or 1, …]
            grouped = self.second.dim() == 3
            return numbers.repeat_interleave(len(error) // len(numbers), 0) if grouped else numbers

        rest = (by_row(self._seen.rest) * error.square()).sum(1)
        seen = squares / by_row(self._seen.kept) + rest - pulled / by_row(self._seen.pulled)
        return squares - pulled, seen

    def pull(self, weight: Tensor) -> Tensor | None:
        """Return the linear term ``W Cᵀ [out, in]``: where upstream errors pull the weight to."""
        if self.cross is None or self.through:
            return None if self.cross is None else self.cross.mT.contiguous()
        return moment_product(weight, self.cross.mT)


def moment_product(rows: Tensor, moment: Tensor) -> Tensor:
    """Return ``rows · moment``, with each group's own moment for its rows.

    :param rows: ``[out, n]``.
    :param moment: ``[n, m]``, or ``[groups, n, m]`` where ``groups`` divides ``out``.
    :returns: ``[out, m]``.
    """
    if moment.dim() == 2:
        return rows @ moment
    grouped = rows.reshape(moment.shape[0], -1, rows.shape[1])  # [groups, out / groups, n]
    return (grouped @ moment).flatten(0, 1)  # [out, m]


def quadratic(rows: Tensor, moment: Tensor) -> Tensor:
    """Compute ``r H rᵀ`` of every row, with the tiles of ``H`` on and below its diagonal alone.

    That is half the products of ``(rows · H · rows).sum(-1)``.

    :param rows: ``[..., out, n]``.
    :param moment: symmetric, ``[..., n, n]``.
    :returns: ``[..., out]``.
    """
    width = rows.shape[-1]
    total = torch.zeros_like(rows[..., 0])
    for start in range(0, width, _TILE):
        end = min(start + _TILE, width)
        columns = rows[..., start:end]
        product = columns @ moment[..., start:end, start:end]
        if end < width:
            product += 2 * (rows[..., end:] @ moment[..., end:, start:end])
        total += (product * columns).sum(-1)
    return total


def row_errors(error: Tensor, second: Tensor, pull: Tensor | None) -> Tensor:
    """Return every output row's ``E H Eᵀ − 2 E · pull``: its mean squared error, up to a constant.

    :param error: quantized minus float weight, ``[..., out, in]``.
    :param second: ``H [in, in]`` or ``[groups, in, in]``; ``[in]`` if it is diagonal.
    :param pull: ``[out, in]`` or None, see :meth:`SecondMoment.pull`.
    :returns: ``[..., out]``.
    """
    if second.dim() == 1:
        errors = error.square() @ second
    elif second.dim() == 3:
        grouped = error.unflatten(-2, (len(second), -1))  # [..., groups, out / groups, in]
        errors = quadratic(grouped, second).flatten(-2)
    else:
        errors = quadratic(error, second)
    return errors if pull is None else errors - 2 * (pull * error).sum(-1)


def best_rows(candidates: Iterable[Tensor], errors: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the candidate with the lowest error for every row, of equal ones the first.

    :param candidates: at least one, ``[out, n]`` or ``[groups, n, rows]`` each.
    :param errors: function from a candidate to its rows' errors, ``[out]`` or ``[groups, rows]``.
    """
    candidates = iter(candidates)
    best = next(candidates)
    lowest = errors(best)
    for candidate in candidates:
        error = errors(candidate)
        better = error < lowest
        best = torch.where(better.unsqueeze(1), candidate, best)
        lowest = torch.where(better, error, lowest)
    return best


def sqnr_db(signal: float, noise: float) -> float:
    """Return the signal to quantization noise ratio in dB of two sums (or means) of squares."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def outputs_sqnr(outputs: Iterable[Tensor], targets: Iterable[Tensor]) -> float:
    """Return the ratio of :func:`sqnr_db` over all outputs, computed in float64.

    :param outputs: quantized outputs, one tensor a batch.
    :param targets: float outputs of the same shapes.
    """
    signal = noise = 0.0
    for output, target in zip(outputs, targets, strict=True):
        wide = target.double()
        signal += float(wide.square().sum())
        noise += float((output.double() - wide).square().sum())
    return -math.inf if math.isnan(noise) else sqnr_db(signal, noise)


def squared_error(
    output: Tensor, target: Tensor, mask: Tensor | None = None, trim: float = 0.0
) -> tuple[float, int]:
    """Sum of squared differences and number of elements, in float32, over the tokens that count.

    :param output: ``[batch, seq, ..., hidden]``.
    :param target: the same shape.
    :param mask: bool ``[batch, seq]``, None for all tokens.
    :param trim: share of the elements to leave out, see :func:`trimmed`.
    """
    difference = output.float() - target.float()
    if mask is not None:
        difference = difference[mask]
    squares = trimmed(difference.square(), trim)
    return float(squares.sum(dtype=torch.float64)), difference.numel()


def trimmed(squares: Tensor, share: float) -> Tensor:
    """Return squared deviations with 0 in place of the largest ones; differentiable.

    A few hidden states are a thousand times as large as all others. Their errors would be most of
    a sum, and the model hardly notices them.

    :param squares: any shape.
    :param share: share of the elements.
    """
    count = int(share * squares.numel())
    if not count:
        return squares
    least = squares.detach().flatten().topk(count).values[-1]
    return squares.where(squares.detach() < least, 0.0)
