"""Second moments of what flows into a layer: sums of products of the rows of its input.

``H = Σ x xᵀ`` over the rows that :mod:`aimet_ext.data.geometry` gives is all that the squared
output error needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from aimet_ext.core.objective import Noise, SecondMoment
from aimet_ext.data.cache import available_bytes, mapped_zeros
from aimet_ext.data.geometry import Geometry

Storage: TypeAlias = Literal["memory", "mapped"]

# Of rows of both streams [groups, n, in], the same object if there is one; and of how much each row
# counts [groups, n], where that is known.
NoteRows: TypeAlias = Callable[..., None]

_BLOCK = 1024  # rows that are multiplied at a time
# Rows of one text resemble each other: so many are worth one that was drawn by itself. With 3,
# roundings by 8 to 1000 tokens do best on other text; with many tokens it makes no difference.
_ALIKE = 3
_STRIP = 128  # rows of H that are computed at a time


class MomentSum:
    """``H = Σ x̂ x̂ᵀ`` and, if asked for, ``C = Σ x̂ eᵀ`` with ``e = x − x̂``, over rows as they come.

    Products of blocks of rows are summed in float64. Blocks are filled before they are multiplied:
    how the rows were cut into batches makes no difference, bit for bit. Of ``H`` only strips that
    reach from the diagonal to the right are computed and kept, which saves almost half.

    Rows may count for more or less than one; the means are then ``Σ s x̂ x̂ᵀ / Σ s``.

    Where the one layer that reads the rows has far fewer outputs than inputs, ``C Wᵀ = Σ x̂ (W e)ᵀ``
    takes less time and memory than ``C``, of which no more is asked for: see :func:`is_narrow`.

    Beside the sums, memory is needed for 1024 rows, twice that with ``cross``.

    :param width: elements of a row.
    :param groups: each has rows and sums of its own.
    :param device: where rows are multiplied.
    :param cross: sum ``C`` as well; each :meth:`add` then needs both streams.
    :param through: ``W [out, in]``, to sum ``C Wᵀ`` in place of ``C``; for one group.
    :param dtype: type of the products.
    :param mapped_dir: folder for sums that do not fit in memory, the system's folder for
        temporary files if None. Nothing is left there.
    :param max_bytes: sums larger than this are kept in a memory-mapped file, on the CPU; half of
        what ``device`` has left if None.
    :ivar storage: storage of the sums: memory, or a memory-mapped file.
    :ivar tokens: number of rows added.
    """

    def __init__(
        self,
        width: int,
        groups: int = 1,
        *,
        device: torch.device | str = "cpu",
        cross: bool = False,
        through: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        mapped_dir: str | Path | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.width, self.groups = width, groups
        self.device, self.dtype = torch.device(device), dtype
        self._folder = mapped_dir
        places = [slice(begin, begin + _STRIP) for begin in range(0, width, _STRIP)]
        shapes = [(groups, min(_STRIP, width - p.start), width - p.start) for p in places]
        sizes = [math.prod(shape) for shape in shapes]
        if through is not None and (groups > 1 or not cross):
            raise ValueError("through is for the errors (cross=True) of rows of a single group")
        self._through = None if through is None else through.to(self.device, dtype)
        crossed = (groups, width, width if through is None else len(through))
        needed = 8 * (sum(sizes) + math.prod(crossed) * cross)
        self.storage = _storage(needed, self.device, max_bytes)
        parts = self._zeros((sum(sizes),), torch.float64).split(sizes)
        sums = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self._strips = list(zip(places, sums, strict=True))  # [groups, strip, in - begin] each
        self._cross = self._zeros(crossed, torch.float64) if cross else None
        self._peak = torch.zeros(groups, width, dtype=dtype, device=self.device)
        self._powers = torch.zeros(2, groups, dtype=torch.float64)  # Σ (Σ x̂²)², Σ Σ x̂⁴
        self._mass = torch.zeros(2, groups, dtype=torch.float64)  # Σ s, Σ s²
        self._blocks: Tensor | None = None  # [1 or 2, groups, rows, width]: x̂, then e
        self._filled = 0
        self.tokens = 0

    @property
    def peak(self) -> Tensor:
        """Largest ``|x̂|`` of every element of a row, ``[in]`` or ``[groups, in]``."""
        return self._peak[0].clone() if self.groups == 1 else self._peak.clone()

    @torch.no_grad()
    def add(
        self, rows: Tensor, float_rows: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add rows. After an error the sum is of no use any more.

        :param rows: ``x̂ [groups, tokens, in]``, of any floating dtype.
        :param float_rows: ``x``, the same rows in the float stream, given if and only if ``cross``.
        :param weights: Weight of each row, ``s ≥ 0 [groups, tokens]``, 1 on average or of
            that order; None if all count alike.
        :raises ValueError: a shape is wrong, or a row holds NaN or infinity.
        """
        for given in (rows,) if self._cross is None else (rows, float_rows):
            shape = None if given is None else list(given.shape)
            if shape != [self.groups, rows.shape[1], self.width]:
                raise ValueError(
                    f"rows must be [{self.groups}, tokens, {self.width}], as many in both streams, "
                    f"got {shape}"
                )
        if self._cross is None and float_rows is not None:
            raise ValueError("float_rows are for sums built with cross=True, got them without")
        if weights is not None and weights.shape != rows.shape[:2]:
            raise ValueError(
                f"weights must be {list(rows.shape[:2])}, one for each row, "
                f"got {list(weights.shape)}"
            )
        begin = 0
        while begin < rows.shape[1]:
            end = min(begin + _BLOCK - self._filled, rows.shape[1])
            self._fill(
                rows[:, begin:end],
                None if float_rows is None else float_rows[:, begin:end],
                None if weights is None else weights[:, begin:end],
            )
            begin = end
        self.tokens += rows.shape[1]
        if weights is None:
            self._mass += rows.shape[1]
        else:
            shares = weights.to(self._mass)
            self._mass += torch.stack([shares.sum(1), shares.square().sum(1)])

    def _fill(self, rows: Tensor, float_rows: Tensor | None, weights: Tensor | None) -> None:
        """Copy at most as many rows as the block still takes, and multiply it when it is full."""
        if self._blocks is None:
            shape = (1 if self._cross is None else 2, self.groups, _BLOCK, self.width)
            self._blocks = torch.empty(shape, dtype=self.dtype, device=self.device)
        place = slice(self._filled, self._filled + rows.shape[1])
        block = self._blocks[0, :, place]
        block.copy_(rows)
        peak = _largest(block, "")
        torch.maximum(self._peak, peak, out=self._peak)
        if float_rows is not None:
            # Subtracted before rounded to the dtype of the products: the difference may be small.
            wide = torch.promote_types(rows.dtype, self.dtype)
            error = self._blocks[1, :, place]
            torch.sub(float_rows.to(self.device, wide), rows.to(self.device, wide), out=error)
            if not bool(torch.isfinite(error.sum())):
                _largest(error, " of the float stream")
        if weights is not None:
            self._blocks[:, :, place] *= weights.to(block).sqrt()[..., None]
        self._filled += rows.shape[1]
        if self._filled == _BLOCK:
            self._multiply()

    def _multiply(self) -> None:
        """Add the products of the rows in the block to the sums, and empty it."""
        if self._blocks is None or not self._filled:
            return
        blocks = self._blocks[:, :, : self._filled]  # [1 or 2, groups, rows, width]
        with _full_precision():
            lost = blocks[-1]
            if self._through is not None:
                lost = lost @ self._through.mT
            for place, sums in self._strips:
                left = blocks[0, :, :, place].mT  # [groups, strip, rows]
                sums += self._home(left @ blocks[0, :, :, place.start :])
                if self._cross is not None:
                    self._cross[:, place] += self._home(left @ lost)
        squares = blocks[0].square_()  # [groups, rows, width]; the rows are done with
        norms = squares.sum(-1).double()  # summed in float64 where sums are long
        powers = norms.square().sum(-1), squares.square_().sum(-1).sum(1, dtype=torch.float64)
        self._powers += torch.stack(powers).to(self._powers.device)
        self._filled = 0

    @torch.no_grad()
    def result(self, dtype: torch.dtype = torch.float32) -> SecondMoment:
        """Return the means so far; adding may go on. ``H`` is symmetric bit for bit.

        :param dtype: type of the moments, which are mapped if the sums are.
        :raises ValueError: no rows went in, or their squares overflow.
        """
        if not self.tokens:
            raise ValueError("second moments need at least one token that counts, got none")
        self._multiply()
        square = (self.groups, self.width, self.width)
        second = self._zeros(square, dtype)
        cross = None if self._cross is None else self._zeros(self._cross.shape, dtype)
        for place, sums in self._strips:
            mean = self._mean(sums)  # [groups, strip, in - begin]
            corner = mean[:, :, : mean.shape[1]]
            corner.copy_(corner.triu() + corner.triu(1).mT)
            second[:, place, place.start :] = mean
            second[:, place.start :, place] = mean.mT
            if cross is not None and self._cross is not None:
                cross[:, place] = self._mean(self._cross[:, place])
        total, squares = self._mass
        powers, worth = self._powers / squares, float((total.square() / squares).min())
        if self.groups == 1:
            second, cross = second[0], None if cross is None else cross[0]
            powers = powers[:, 0]
        noise = Noise.of(second, max(1, int(worth / _ALIKE)), powers)
        return SecondMoment(
            second,
            cross,
            self.tokens,
            float(self._peak.max()),
            noise,
            worth,
            through=self._through is not None,
        )

    def _mean(self, sums: Tensor) -> Tensor:
        if not torch.isfinite(sums.sum()):
            largest = float(self._peak.max())
            raise ValueError(
                f"inputs must be small enough to be squared in {self.dtype}, got values up to "
                f"{largest:.3g}; look for the layer upstream that overflows"
            )
        return sums / self._mass[0].to(sums.device)[:, None, None]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.storage == "mapped":
            return mapped_zeros(shape, dtype, self._folder)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _home(self, product: Tensor) -> Tensor:
        """Return the product where the sums are."""
        return product.to(self._strips[0][1].device)


def is_narrow(weight: Tensor) -> bool:
    """Return True for a weight ``[out, in]`` with which ``C Wᵀ`` takes less time than ``C``."""
    return 2 * weight.shape[0] < weight.shape[1]


def sum_moments(
    inputs: Iterable[tuple[Tensor | None, Tensor | None, Tensor | None]],
    layer: nn.Module,
    *,
    dtype: torch.dtype,
    mapped_dir: str | Path | None = None,
    through: Tensor | None = None,
    also: Iterable[NoteRows] = (),
    weights: Iterator[Tensor] | None = None,
) -> MomentSum | None:
    """Sum the second moments of a layer's inputs, with ``C`` where both streams are given.

    :param inputs: By batch, input in the quantized and in the float stream (one may be None), and
        mask of the rows that count.
    :param layer: Linear layer or convolution that reads them.
    :param dtype: Type of the products; the sums are in float64.
    :param mapped_dir: Folder for sums that do not fit in memory.
    :param through: Weight ``[out, in]`` to sum ``C Wᵀ`` with in place of ``C``, for a layer of one
        group.
    :param also: Functions that are given the rows of both streams too, the same if there is one,
        and with ``weights`` how much each counts.
    :param weights: Weights of rows, for each input with any, ``[groups, ...]`` with the leading
        dimensions of a linear layer's input, ``[groups, images, *output]`` for a convolution; None
        if all count alike.
    :returns: the sums; None if there was no input.
    :raises ValueError: an input holds NaN or infinity.
    """
    geometry = Geometry.of(layer)
    total: MomentSum | None = None
    for quantized, original, mask in inputs:
        first = original if quantized is None else quantized
        assert first is not None
        both = quantized is not None and original is not None
        shares: Tensor | None = None
        if weights is not None and first.numel():
            shares = next(weights)
            shares = (shares if mask is None else shares[:, mask.to(shares.device)]).flatten(1)
        done = 0
        chunks = geometry.chunks(first, mask)
        pairs: Iterable[tuple[Tensor, Tensor | None]] = ((rows, None) for rows in chunks)
        if both and original is not None:
            pairs = zip(chunks, geometry.chunks(original, mask), strict=True)
        for rows, float_rows in pairs:
            if total is None:
                total = MomentSum(
                    rows.shape[2],
                    geometry.groups,
                    device=rows.device,
                    cross=both,
                    through=through if both and geometry.groups == 1 else None,
                    dtype=dtype,
                    mapped_dir=mapped_dir,
                )
            own = None if shares is None else shares[:, done : done + rows.shape[1]]
            done += rows.shape[1]
            total.add(rows, float_rows, own)
            counts = () if own is None else (own,)
            for note in also:
                note(rows, rows if float_rows is None else float_rows, *counts)
    return total


def _storage(size: int, device: torch.device, max_bytes: int | None) -> Storage:
    """Choose where ``size`` bytes of sums are kept."""
    if max_bytes is None:
        available = available_bytes(device)
        if available is None:
            return "memory"
        max_bytes = available // 2
    return "mapped" if size > max_bytes else "memory"


def _largest(rows: Tensor, whose: str) -> Tensor:
    """Return the largest magnitude over tokens, ``[groups, in]``.

    :raises ValueError: there is NaN or infinity among them.
    """
    largest = rows.abs().amax(1)
    wrong = torch.nonzero(~torch.isfinite(largest.flatten())).flatten()  # [wrong elements]
    if len(wrong):
        raise ValueError(
            f"inputs{whose} must be finite, got NaN or infinity in {len(wrong)} of "
            f"{largest.numel()} elements, the first of them number {int(wrong[0])}; "
            "look for the layer upstream that overflows"
        )
    return largest


@contextmanager
def _full_precision() -> Iterator[None]:
    """Compute products of float32 in float32, although the program may allow TF32 or bfloat16."""
    backends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    places = [backend.matmul for backend in backends if hasattr(backend, "matmul")]
    places = [place for place in places if hasattr(place, "fp32_precision")]
    allowed = [place.fp32_precision for place in places]
    former = None if places else torch.get_float32_matmul_precision()  # before torch 2.9
    try:
        for place in places:
            place.fp32_precision = "ieee"
        if former is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for place, precision in zip(places, allowed, strict=True):
            place.fp32_precision = precision
        if former is not None:
            torch.set_float32_matmul_precision(former)
