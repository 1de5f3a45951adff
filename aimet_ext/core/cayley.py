"""Gradient descent over orthogonal matrices by Cayley transforms.

Li et al., "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform",
arXiv 2002.01113, as SpinQuant uses it (arXiv 2405.16406). With the momentum ``M`` of a matrix ``R``
and its gradient ``G``,

    M ← β M − G,   W = Ŵ − Ŵᵀ  with  Ŵ = M Rᵀ − ½ R Rᵀ M Rᵀ,   M ← W R,
    R ← (1 − α/2 W)⁻¹ (1 + α/2 W) R.

The Cayley transform of a skew matrix is orthogonal, so ``R`` stays so. Here the equation is solved
in float64, where the paper iterates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aimet_ext.core.hadamard import nearest_orthogonal


class CayleySGD:
    """Moves orthogonal matrices along their gradients.

    ``matrices`` and ``moments`` are all of its state; they are replaced, never written to.

    :param matrices: Orthogonal matrices ``[n, n]``, float64.
    :param learning_rate: Mean angle in radians by which a step turns, before momentum adds up.
    :param momentum: Share of the momentum that a step keeps.
    """

    def __init__(
        self, matrices: Sequence[Tensor], *, learning_rate: float, momentum: float = 0.9
    ) -> None:
        self.matrices = [matrix.detach().clone() for matrix in matrices]
        self.learning_rate, self.momentum = learning_rate, momentum
        self.moments = [torch.zeros_like(matrix) for matrix in self.matrices]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], share: float = 1.0) -> None:
        """Take a step.

        :param gradients: Of each matrix; None leaves it where it is.
        :param share: Share of the learning rate.
        """
        for number, gradient in enumerate(gradients):
            if gradient is None or not bool(torch.isfinite(gradient).all()):
                continue
            matrix = self.matrices[number]
            moment = self.momentum * self.moments[number] - normalised(matrix, gradient)
            skew = skew_part(matrix, moment)
            self.moments[number] = skew @ matrix
            # In the layout in which files hold it: products in another one have other last bits.
            self.matrices[number] = cayley(matrix, skew, share * self.learning_rate).contiguous()

    def restored(self) -> list[Tensor]:
        """Return the matrices, orthogonal to the last digit."""
        return [nearest_orthogonal(matrix) for matrix in self.matrices]


def skew_part(matrix: Tensor, direction: Tensor) -> Tensor:
    """Return the skew ``W`` for which ``W R`` is the part of a direction along the manifold."""
    half = direction @ matrix.T
    half = half - 0.5 * matrix @ (matrix.T @ half)
    return half - half.T


def cayley(matrix: Tensor, skew: Tensor, length: float) -> Tensor:
    """Return ``(1 − α/2 W)⁻¹ (1 + α/2 W) R`` for a step ``α``."""
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    turned = matrix + 0.5 * length * (skew @ matrix)
    return torch.linalg.solve(one - 0.5 * length * skew, turned)


def normalised(matrix: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient in the measure in which its part along the manifold turns by 1 radian.

    On average over all planes: a loss of another size, or a matrix of another width, turns as far.
    """
    gradient = gradient.to(matrix)
    size = skew_part(matrix, gradient).norm() / len(matrix) ** 0.5
    return gradient / size.clamp_min(1e-30)
