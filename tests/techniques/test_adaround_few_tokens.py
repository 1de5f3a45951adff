"""AdaRound where the data says little: what it learns has to hold on other data of the kind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext.config import QSpec
from aimet_ext.core.affine import Grid, fake_quantize

WIDTH, ROWS = 64, 48


@pytest.fixture
def adaround():
    pytest.importorskip("aimet_torch")
    from aimet_ext.techniques import adaround

    return adaround


def rows_of(count: int, seed: int) -> Tensor:
    """Correlated inputs, the last of them always 0, ``[1, count, WIDTH]``."""
    base = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)) / WIDTH**0.5
    base = base @ torch.diag(torch.logspace(0, -1.5, WIDTH))
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) @ base
    rows[:, -1] = 0
    return rows[None]


def rounded(model: nn.Module, tokens: int) -> Tensor:
    """Its weight, rounded by that many tokens."""
    from aimet_ext.sim.torch.setup import build_sim

    spec = QSpec(bitwidth=3)
    sim = build_sim(copy.deepcopy(model), rows_of(4, 0), {"0": spec}, None, "htp_v79")
    aimet_ext.apply_adaround(sim, [rows_of(tokens, 1)], progress=False)
    return sim.model[0].weight.detach().clone()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, ROWS))


def test_few_tokens_are_not_fitted_to(adaround, model, monkeypatch) -> None:
    """On rows that were not seen, less error than by the moment as it is, and than by rounding."""
    weight, other = model[0].weight.detach(), rows_of(4096, 2)[0]

    def unseen(values: Tensor) -> float:
        return float((other @ (values - weight).T).square().mean())

    steady = unseen(rounded(model, 32))
    scale = 2 * weight.abs().amax(1, keepdim=True) / 7
    plain = unseen(fake_quantize(weight, Grid(scale, torch.zeros_like(scale), -4, 3)))
    monkeypatch.setattr(adaround, "_DOUBT", 0.0)
    fitted = unseen(rounded(model, 32))
    assert steady < 0.9 * fitted
    assert steady < plain


def test_many_tokens_are_believed(adaround, model, monkeypatch) -> None:
    """The same roundings, but for a few, as without any doubt."""
    found = rounded(model, 40_000)
    monkeypatch.setattr(adaround, "_DOUBT", 0.0)
    assert (rounded(model, 40_000) != found).float().mean() < 0.05
