"""Divergence from the likeliest classes of a row: its bounds, its limits, its gradients."""

from __future__ import annotations

import pytest
import torch

from aimet_ext.core.divergence import Divergence, TopProbabilities


def logits(seed: int, rows: int = 40, classes: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, dtype=torch.float64, generator=generator)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.softmax(-1), q.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def test_the_rest_counts_as_one_class() -> None:
    """Against the sums written out, for few classes kept and for all."""
    own, other = logits(0), logits(1)
    for k in (1, 7, 49):
        found = TopProbabilities.of(own, k).divergence(other)
        p, q, expected = own.softmax(-1), other.softmax(-1), []
        for row in range(len(own)):
            top = p[row].argsort(descending=True)[:k]
            ps = torch.cat([p[row, top], 1 - p[row, top].sum(0, keepdim=True)])
            qs = torch.cat([q[row, top], 1 - q[row, top].sum(0, keepdim=True)])
            expected.append((ps * (ps / qs).log()).sum())
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-8, atol=1e-12)
        assert bool((found <= kl(own, other) + 1e-12).all()) and bool((found > 0).all())
    for k in (None, 50, 99):
        found = TopProbabilities.of(own, k).divergence(other)
        torch.testing.assert_close(found, kl(own, other), rtol=1e-10, atol=1e-12)


def test_equal_logits_have_none_and_no_gradient() -> None:
    own = logits(0)
    moved = (own + 5.0).requires_grad_()
    found = TopProbabilities.of(own, 7).divergence(moved)
    found.sum().backward()
    assert float(found.detach().abs().max()) < 1e-12
    assert float(moved.grad.abs().max()) < 1e-12


def test_the_gradient_is_that_of_the_sums() -> None:
    own, other = TopProbabilities.of(logits(0, 3, 9), 4), logits(1, 3, 9).requires_grad_()
    assert torch.autograd.gradcheck(own.divergence, (other,))


def test_a_rest_without_mass_is_nothing() -> None:
    """Classes that a model masks out have probability 0, and no logarithm."""
    own = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf]])
    other = torch.tensor([[2.0, 0.5, 0.0, 0.0]], requires_grad=True)
    found = TopProbabilities.of(own, 2).divergence(other)
    found.sum().backward()
    p, q = own[:, :2].softmax(-1), other.detach().softmax(-1)[:, :2]
    torch.testing.assert_close(found.detach(), (p * (p / q).log()).sum(-1))
    assert bool(other.grad.isfinite().all())


def test_the_summary_of_rows() -> None:
    losses = torch.arange(2000, dtype=torch.float32)
    found = Divergence.of(losses, losses < 500)
    assert (found.kl, found.kl_high, found.flips, found.rows) == (999.5, 1997.0, 0.25, 2000)
    assert "25.00%" in str(found)
    own = logits(0)
    assert torch.equal(TopProbabilities.of(own, 3).likeliest, own.argmax(-1))
    assert torch.equal(TopProbabilities.of(own).likeliest, own.argmax(-1))


@pytest.mark.parametrize("top_k", [3, None])
def test_rows_are_counted(top_k: int | None) -> None:
    assert len(TopProbabilities.of(logits(0, 11), top_k)) == 11
