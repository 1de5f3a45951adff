"""Roundings where the data says little: what is decided has to hold on other data of the kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext.core.affine import Grid, fake_quantize
from aimet_ext.core.objective import SecondMoment
from aimet_ext.specs import QSpec

pytest.importorskip("aimet_torch")

WIDTH, ROWS = 64, 48
TECHNIQUES = {"gptq": aimet_ext.apply_gptq, "adaround": aimet_ext.apply_adaround}


def rows_of(count: int, seed: int) -> Tensor:
    """Correlated inputs, the last of them always 0, ``[1, count, WIDTH]``."""
    base = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)) / WIDTH**0.5
    base = base @ torch.diag(torch.logspace(0, -1.5, WIDTH))
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) @ base
    rows[:, -1] = 0
    return rows[None]


def rounded(apply: Any, model: nn.Module, tokens: int, **settings: Any) -> Tensor:
    """Its first weight, rounded by that many tokens."""
    from aimet_ext.sim.torch.setup import build_sim

    sim = build_sim(copy.deepcopy(model), rows_of(4, 0), {"0": QSpec(bitwidth=3)}, None, "htp_v79")
    apply(sim, [rows_of(tokens, 1)], progress=False, **settings)
    return sim.model[0].weight.detach().clone()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, ROWS))


def unseen(weight: Tensor, values: Tensor, activation: Any = lambda x: x) -> float:
    """Error on rows that were not seen."""
    other = rows_of(4096, 2)[0]
    return float((activation(other @ values.T) - activation(other @ weight.T)).square().mean())


def plain(weight: Tensor) -> Tensor:
    scale = 2 * weight.abs().amax(1, keepdim=True) / 7
    return fake_quantize(weight, Grid(scale, torch.zeros_like(scale), -4, 3))


@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize("tokens", [1, 4, 16, 48, 160])
def test_few_tokens_are_not_fitted_to(name: str, tokens: int, model: Any) -> None:
    """On other rows no more error than by rounding, and less the more tokens there are."""
    weight = model[0].weight.detach()
    found = rounded(TECHNIQUES[name], model, tokens)
    assert unseen(weight, found) < (1.02 if tokens < 16 else 0.9) * unseen(weight, plain(weight))


@pytest.mark.parametrize("name", TECHNIQUES)
def test_noise_in_moments_is_taken_out(name: str, model: Any, monkeypatch: Any) -> None:
    """With few tokens that helps, with many it changes next to nothing."""
    weight = model[0].weight.detach()
    few, many = (rounded(TECHNIQUES[name], model, tokens) for tokens in (32, 40_000))
    assert unseen(weight, few) < unseen(weight, plain(weight))
    monkeypatch.setattr(SecondMoment, "shrunk", lambda self, strength: self)
    fitted = rounded(TECHNIQUES[name], model, 32)
    assert unseen(weight, few) < 0.9 * unseen(weight, fitted)
    same = rounded(TECHNIQUES[name], model, 40_000)
    assert (same != many).float().mean() < 0.05


def test_few_tokens_in_front_of_a_relu(model: Any) -> None:
    """AdaRound does not learn on samples that few."""
    model.append(nn.ReLU())
    weight = model[0].weight.detach()
    found = rounded(aimet_ext.apply_adaround, model, 12)
    bias = model[0].bias.detach()

    def behind(x: Tensor) -> Tensor:
        return torch.relu(x + bias)

    assert unseen(weight, found, behind) < 1.02 * unseen(weight, plain(weight), behind)
