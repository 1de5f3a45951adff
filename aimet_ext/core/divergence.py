"""The divergence of logits from reference probabilities, of which the largest of a row suffice.

Of a vocabulary of many thousands, a few hundred classes carry nearly all of a row's mass. The
others count as one class, the rest:

    KL = Σ_{i in top} p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)

That is a divergence of its own: never negative, 0 for equal logits, no larger than the one over
all classes, and equal to it where all of them are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopProbabilities:
    """Reference probabilities of some rows, the largest ones first where only some are kept.

    :param logs: Logarithms of the probabilities kept, ``[rows, k]`` or ``[rows, classes]``.
    :param classes: Their classes, ``[rows, k]``; None where all are kept, in their order.
    :param rest: Logarithm of the others' sum, ``[rows]``; None where all are kept.
    """

    logs: Tensor
    classes: Tensor | None = None
    rest: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, top_k: int | None = None) -> TopProbabilities:
        """Return the probabilities of logits ``[rows, classes]``.

        :param top_k: Classes to keep of each row, the likeliest ones; None for all.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if top_k is None or top_k >= logits.shape[-1]:
            return cls(logits.log_softmax(-1))
        whole = logits.logsumexp(-1)
        top = logits.topk(top_k)
        rest = logits.scatter(-1, top.indices, -math.inf).logsumexp(-1)
        return cls(top.values - whole[:, None], top.indices.int(), rest - whole)

    def __len__(self) -> int:
        return len(self.logs)

    @property
    def likeliest(self) -> Tensor:
        """The class of the largest probability of each row, ``[rows]``."""
        if self.classes is None:
            return self.logs.argmax(-1)
        return self.classes[:, 0].long()

    def divergence(self, logits: Tensor) -> Tensor:
        """Return KL(reference || other) of each row in nats, ``[rows]``; differentiable.

        :param logits: Those of the other model, ``[rows, classes]``.
        """
        logits = logits.to(self.logs.dtype)
        if self.classes is None or self.rest is None:
            found = logits.log_softmax(-1)
            terms = torch.nn.functional.kl_div(found, self.logs, reduction="none", log_target=True)
            return terms.sum(-1)
        whole, classes = logits.logsumexp(-1), self.classes.long()
        top = logits.gather(-1, classes) - whole[:, None]
        rest = logits.scatter(-1, classes, -math.inf).logsumexp(-1) - whole
        lost = torch.where(self.rest > -math.inf, self.rest - rest, 0.0)
        return (self.logs.exp() * (self.logs - top)).sum(-1) + self.rest.exp() * lost


def outcome_likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a sum whose gradient has the Fisher information of the outcomes for its covariance.

    Drawn outcomes do too: their gradient by a row of logits is ``1_c - p``, with the covariance
    ``diag p - p pᵀ``. Random signs ``z`` give ``a - p Σ a`` with ``a = √p z``, whose covariance is
    the same: ``(I - p 1ᵀ) diag p (I - 1 pᵀ)``. Its size hardly varies from draw to draw, where
    that of outcomes is near 0 most of the time and large now and then.

    :param logits: ``[rows, classes]``, differentiable.
    :returns: ``Σ a · log p`` over all rows, with ``a`` held.
    """
    logs = logits.log_softmax(-1)
    signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8)
    drawn = (logs.detach() / 2).exp() * (2 * signs - 1).to(logs)
    return (drawn * logs).sum()


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Distance of a model's outputs from the float model's.

    :param kl: Mean KL(float || other) over rows, in nats.
    :param kl_high: 99.9th percentile of the rows' KL: the worst ones.
    :param flips: Share of rows whose likeliest class is another one.
    :param rows: Rows that were compared: tokens, or images.
    """

    kl: float
    kl_high: float
    flips: float
    rows: int

    @classmethod
    def of(cls, losses: Tensor, flipped: Tensor) -> Divergence:
        """Return the summary of rows.

        :param losses: KL of each row, ``[rows]``, at least one.
        :param flipped: True where the likeliest class differs, ``[rows]``.
        """
        losses = losses.double()
        rank = max(0, math.ceil(0.999 * len(losses)) - 1)  # torch.quantile takes 2^24 rows at most
        return cls(
            kl=float(losses.mean()),
            kl_high=float(losses.sort().values[rank]),
            flips=float(flipped.double().mean()),
            rows=len(losses),
        )

    def __str__(self) -> str:
        return (
            f"KL to the float model {self.kl:.4g} nats, 99.9 % of rows below {self.kl_high:.4g}, "
            f"{self.flips:.2%} of top-1 changed ({self.rows} rows)"
        )
