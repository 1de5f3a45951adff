"""Rotations: orthonormal Hadamard matrices, constructed, and random orthogonal ones.

An orthonormal Hadamard matrix has entries ``±1/√n``: it spreads one large channel evenly over all
(QuaRot, arXiv 2404.00456). Orders come from the constructions of Sylvester (2), Paley (q + 1 and
2 (q + 1) for prime powers q) and Kronecker products of these. A width that has none of them gets a
random orthogonal matrix.

Kronecker factors are kept apart, so that a rotation of ``n = a · b`` channels costs ``a + b``
products for each number in place of ``n``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import torch
from torch import Tensor

_MOST_PALEY = 1024  # order up to which Paley's matrices are looked for
_SYLVESTER = 64  # largest factor that is one matrix: two of them cost less than their product


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix ``R [size, size]`` in float64, as a product of cheap steps.

    :param steps: A step is a vector of signs ``[size]``, the diagonal of a matrix, or the Kronecker
        factors of one, a tuple of square matrices.
    :param how: Kind of the matrix, for people.
    """

    size: int
    steps: tuple[Tensor | tuple[Tensor, ...], ...]
    how: str

    def apply(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """Return ``x R``, or ``x Rᵀ``, in float64.

        :param x: ``[…, size]``.
        """
        x = x.double()
        for step in reversed(self.steps) if inverse else self.steps:
            if isinstance(step, Tensor):
                x = x * step.to(x.device)
                continue
            sizes = [len(factor) for factor in step]
            x = x.unflatten(-1, sizes)
            for axis, factor in enumerate(step):
                place = axis - len(step)
                matrix = (factor.T if inverse else factor).to(x.device)
                x = (x.movedim(place, -1) @ matrix).movedim(-1, place)
            x = x.flatten(-len(step))
        return x

    @cached_property
    def matrix(self) -> Tensor:
        """The matrix itself, float64 ``[size, size]``."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def rotation(
    size: int, *, mode: str = "hadamard", seed: int = 0, keeps_mean: bool = False
) -> Rotation:
    """Return a rotation for vectors of some width.

    :param mode: ``"hadamard"`` for a Hadamard matrix with random signs, where one can be
        constructed; ``"random"`` for a random orthogonal matrix, uniform over all (Haar measure).
    :param keeps_mean: True for a matrix with ``R 1 = 1``, which leaves the mean of the channels as
        it is, so that LayerNorm commutes with it: ``H D Hᵀ`` with signs ``D``, the first of them
        +1, and a Hadamard matrix ``H`` whose first column is constant.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = hadamard_factors(size) if mode == "hadamard" else None
    if factors is None:
        matrix = random_orthogonal(size - keeps_mean, generator)
        if keeps_mean:
            around = mean_basis(size)
            matrix = around @ torch.block_diag(torch.ones(1, 1), matrix).double() @ around.T
        return Rotation(size, ((matrix,),), "random orthogonal")
    draws = torch.randint(0, 2, (size,), generator=generator)
    signs = draws.double() * 2 - 1
    how = "Hadamard " + " ⊗ ".join(str(len(factor)) for factor in factors)
    if not keeps_mean:
        return Rotation(size, (signs, factors), f"{how}, random signs")
    signs[0] = 1.0
    turned = tuple(factor.T for factor in factors)
    return Rotation(size, (factors, signs, turned), f"{how}, random signs, mean kept")


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix, uniform over all of them: float64 ``[size, size]``."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to one (its polar factor), float64 ``[n, n]``."""
    u, _, vh = torch.linalg.svd(matrix.double())
    return u @ vh


def hadamard(size: int) -> Tensor | None:
    """Return an orthonormal Hadamard matrix, None if no construction here gives one.

    The first column is constant.

    :returns: float64 ``[size, size]``, entries ``±size**-0.5``.
    """
    factors = hadamard_factors(size)
    if factors is None:
        return None
    matrix = factors[0]
    for factor in factors[1:]:
        matrix = torch.kron(matrix, factor)
    return matrix


@lru_cache(maxsize=64)
def hadamard_factors(size: int) -> tuple[Tensor, ...] | None:
    """Return orthonormal Hadamard matrices whose Kronecker product has some order, or None."""
    if size < 1:
        return None
    odd = size
    while odd % 2 == 0:
        odd //= 2
    order = odd
    while order <= min(size, _MOST_PALEY):
        base = torch.ones(1, 1, dtype=torch.float64) if order == 1 else _paley(order)
        if base is not None:
            found = [base] if order > 1 else []
            found += _sylvester(size // order)
            return tuple(matrix / math.sqrt(len(matrix)) for matrix in found or [base])
        order *= 2
    return None


def _sylvester(size: int) -> Iterator[Tensor]:
    """Yield matrices of ±1 of powers of two whose product is a power of two."""
    while size > 1:
        part = min(size, _SYLVESTER)
        matrix = torch.ones(1, 1, dtype=torch.float64)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        while len(matrix) < part:
            matrix = torch.kron(matrix, two)
        yield matrix
        size //= part


def _paley(order: int) -> Tensor | None:
    """Return a Hadamard matrix of ±1 by one of Paley's constructions, first column +1, or None."""
    if order % 4:
        return None
    squares = _characters(order - 1)
    if squares is not None and (order - 1) % 4 == 3:
        # I + S with S skew: S = [[0, 1], [-1, Q]]
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, squares
        return _first_column_of_ones(torch.eye(order, dtype=torch.float64) + skew)
    half = order // 2
    squares = _characters(half - 1)
    if squares is None or (half - 1) % 4 != 1:
        return None
    # A symmetric conference matrix C = [[0, 1], [1, Q]]
    conference = torch.zeros(half, half, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, squares
    one = torch.eye(half, dtype=torch.float64)
    matrix = torch.cat(
        [
            torch.cat([one + conference, conference - one], 1),
            torch.cat([conference - one, -one - conference], 1),
        ]
    )
    return _first_column_of_ones(matrix)


def _first_column_of_ones(matrix: Tensor) -> Tensor:
    return matrix * matrix[:, :1]


def _characters(q: int) -> Tensor | None:
    """Return ``χ(a − b)`` for all pairs of elements of the field of order q, None without one.

    ``χ`` is 1 for squares, −1 for others, 0 for 0.
    """
    found = _prime_power(q)
    if found is None or q % 2 == 0:
        return None
    prime, degree = found
    elements = list(product(range(prime), repeat=degree))
    place = {element: number for number, element in enumerate(elements)}
    modulus = _irreducible(prime, degree)
    squares = {_times(e, e, modulus, prime) for e in elements}
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[[place[element] for element in squares]] = 1.0
    character[place[(0,) * degree]] = 0.0
    digits = torch.tensor(elements)  # [q, degree]
    weights = torch.tensor([prime ** (degree - 1 - i) for i in range(degree)])
    differences = (digits[:, None] - digits[None]) % prime  # [q, q, degree]
    return character[(differences * weights).sum(-1)]


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return a prime and an exponent of at most 3 with ``prime**exponent == q``, else None."""
    for degree in (1, 2, 3):
        prime = round(q ** (1 / degree))
        is_prime = prime > 1 and all(prime % d for d in range(2, math.isqrt(prime) + 1))
        if is_prime and prime**degree == q:
            return prime, degree
    return None


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """Return low coefficients of ``x**degree + …`` without roots, which for 2 and 3 is enough."""
    if degree == 1:
        return (0,)
    for low in product(range(prime), repeat=degree):
        if all(
            (x**degree + sum(c * x**i for i, c in enumerate(low))) % prime for x in range(prime)
        ):
            return low
    raise AssertionError("every finite field has irreducible polynomials of every degree")


def _times(
    a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], prime: int
) -> tuple[int, ...]:
    """Return the product of two polynomials, low coefficients first, modulo another and a prime."""
    degree = len(modulus)
    full = [0] * (2 * degree - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            full[i + j] += x * y
    for power in range(len(full) - 1, degree - 1, -1):
        for i, c in enumerate(modulus):
            full[power - degree + i] -= full[power] * c
        full[power] = 0
    return tuple(value % prime for value in full[:degree])


def mean_basis(size: int) -> Tensor:
    """Return an orthogonal matrix whose first column is constant: float64 ``[size, size]``."""
    # A reflection.
    v = torch.full((size,), size**-0.5, dtype=torch.float64)
    v[0] -= 1
    norm = v @ v
    one = torch.eye(size, dtype=torch.float64)
    return one - 2 * torch.outer(v, v) / norm if float(norm) > 0 else one
