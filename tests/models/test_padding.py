"""Zero-padding of an MLP's inner width leaves its function; routers beside it are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aimet_ext.models.padding import pad_mlp
from aimet_ext.models.topology import BlockTopology


class Mlp(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(8, 20)
        else:
            self.gate, self.up = nn.Linear(8, 10), nn.Linear(8, 10)
        self.router = nn.Linear(8, 3)
        self.down = nn.Linear(10, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(nn.functional.gelu(gate) * up) * self.router(x).softmax(-1)[..., :1]


@pytest.mark.parametrize("fused", [False, True])
def test_function_is_unchanged(fused):
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": Mlp(fused)}).double()
    inputs = ("gate_up", "router") if fused else ("gate", "up", "router")
    mlp = tuple(name for name in inputs if name != "router"), "down"
    topology = BlockTopology("block", (*inputs, "down"), (inputs, ("down",)), (), mlp=mlp)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = model["block"](x)
    assert pad_mlp(model, topology, 16) == 16
    assert model["block"].down.weight.shape == (8, 16)
    assert model["block"].router.weight.shape == (3, 8)
    torch.testing.assert_close(model["block"](x), expected, rtol=1e-14, atol=1e-14)
    assert pad_mlp(model, topology, 8) == 16  # nothing left to pad


def test_other_layers_are_named():
    model = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Identity()})})
    mlp = ("up",), "down"
    topology = BlockTopology("block", ("up", "down"), (("up",), ("down",)), (), mlp=mlp)
    with pytest.raises(TypeError, match=r"block\.down: a torch\.nn\.Linear is required.*Identity"):
        pad_mlp(model, topology, 4)
