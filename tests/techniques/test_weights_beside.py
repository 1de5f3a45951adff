"""Block-wise techniques beside weights that they do not decide: of recurrent layers, of kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from blockwise_reference import block_losses
from torch import Tensor, nn

import aimet_ext

pytest.importorskip("aimet_torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # AIMET uses what torch and AIMET deprecated

WIDTH = 12
MIX = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) * 0.3
SETTINGS = {
    "omniquant": {"num_iterations": 20, "batch_size": 2},
    "autoround": {"num_iterations": 20},
    "awq": {},
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.out(self.rnn(self.norm(hidden_states))[0])


class Convolved(nn.Module):
    """A convolution over tokens between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.up(self.norm(hidden_states)).transpose(1, 2)
        return hidden_states + self.out(torch.tanh(self.conv(x)).transpose(1, 2))


class Model(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def data(*seeds: int) -> list[Tensor]:
    """Sequences whose tokens resemble each other, ``[batch, seq, width]`` each."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.randn(4, 10, WIDTH, generator=g).cumsum(1) @ MIX / 2 for g in generators]


DATA = data(*range(6))


def simulated(model: nn.Module) -> Any:
    weights = aimet_ext.QSpec(bitwidth=3)
    return aimet_ext.create_sim(model, DATA[0], weights=weights, lm_head=weights, activations=None)


@pytest.mark.parametrize("block", [Recurrent, Convolved])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_is_that_of_the_block_as_it_is_deployed(block: Any, name: str) -> None:
    """All that is quantized in the block is in it, at nearest rounding where nothing decided it."""
    model = Model(block).eval()
    sim = simulated(model)
    report = getattr(aimet_ext, f"apply_{name}")(sim, DATA, progress=False, **SETTINGS[name])
    expected = block_losses(sim, model, DATA)
    alike = 1 if name == "awq" else len(expected)  # it gives each block the float model's inputs
    found = [each.loss_after for each in report.blocks]
    assert found[:alike] == pytest.approx(expected[:alike], rel=1e-4)
    assert all(each.loss_after < each.loss_nearest for each in report.blocks)


@pytest.mark.parametrize(("block", "beside"), [(Recurrent, "rnn"), (Convolved, "conv")])
def test_what_was_decided_before_stays_as_it_was_decided(block: Any, beside: str) -> None:
    """Rounded by GPTQ first, and seen so by AutoRound."""
    model = Model(block).eval()
    sim = simulated(model)
    linears = [n for n, m in sim.model.named_modules() if isinstance(m, nn.Linear)]
    aimet_ext.apply_gptq(sim, DATA, modules_to_exclude=linears, progress=False)
    before = {n: v.clone() for n, v in sim.model.named_parameters() if f".{beside}." in n}
    assert before
    report = aimet_ext.apply_autoround(sim, DATA, progress=False, **SETTINGS["autoround"])
    after = dict(sim.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    rounded = copy.deepcopy(model)  # what there was of a float model
    rounded.load_state_dict(before, strict=False)
    found = [each.loss_after for each in report.blocks]
    assert found == pytest.approx(block_losses(sim, rounded, DATA), rel=1e-4)
    assert all(each.loss_after < each.loss_nearest for each in report.blocks)
