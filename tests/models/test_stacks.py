"""Matrices that a module keeps in one parameter and multiplies by itself become layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext.models.hidden import Unpacked, expose_weights, packed
from aimet_ext.walk.routing import StackedLayers

HEADS, WIDTH, OUT = 3, 4, 5
PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "baddbmm": lambda x, weight, bias: torch.baddbmm(bias[:, None], x, weight),
    "bmm": lambda x, weight, bias: torch.bmm(x, weight) + bias[:, None],
    "matmul": lambda x, weight, bias: torch.matmul(x, weight) + bias[:, None],
    "@": lambda x, weight, bias: x @ weight + bias[:, None],
}


class Gates(nn.Module):
    """A matrix for each head; how it is multiplied is given."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.randn(HEADS, WIDTH, OUT))
        self.bias = nn.Parameter(torch.randn(HEADS, OUT))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HEADS, WIDTH).transpose(0, 1)
        out = self.product(rows, self.weight, self.bias)
        return out.transpose(0, 1).reshape(*x.shape[:-1], HEADS * OUT)


class Model(nn.Module):
    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gates = nn.Linear(WIDTH, HEADS * WIDTH), Gates(product)
        self.last = nn.Linear(HEADS * OUT, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.gates(self.first(x))))


def data(*seeds: int) -> list[Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.randn(4, 10, WIDTH, generator=g).cumsum(1) / 2 for g in generators]


DATA, HELD_OUT = data(*range(6)), data(*range(100, 104))


def known(module: nn.Module) -> bool:
    return False


@torch.no_grad()
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_they_compute_the_same_and_are_packed_as_they_were(product: Any) -> None:
    model = Model(product).eval()
    before = copy.deepcopy(model.state_dict())
    exposed = expose_weights(model, known, DATA[0])
    layers = exposed.get_submodule("gates.weight")
    assert isinstance(layers, StackedLayers) and len(layers) == HEADS
    torch.testing.assert_close(exposed(DATA[1]), model(DATA[1]))
    ours = packed(exposed, exposed.state_dict())
    assert ours.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in ours.items())
    again = Unpacked(exposed, before)
    assert all(torch.equal(value, again[n]) for n, value in exposed.state_dict().items())
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize(
    "product",
    [
        lambda x, weight, bias: torch.einsum("hri,hio->hro", x, weight) + bias[:, None],
        lambda x, weight, bias: torch.bmm(x, weight / weight.norm()) + bias[:, None],
        lambda x, weight, bias: torch.bmm(x, torch.flip(weight, [0])),
    ],
)
def test_other_uses_leave_the_parameter_as_it_is(product: Any) -> None:
    model = Model(product).eval()
    exposed = expose_weights(model, known, DATA[0])
    assert isinstance(exposed.gates.weight, nn.Parameter)
    with torch.no_grad():
        assert torch.equal(exposed(DATA[1]), model(DATA[1]))


@pytest.mark.filterwarnings("ignore")  # AIMET uses what torch and AIMET deprecated
@pytest.mark.parametrize("name", ["gptq", "adaround"])
def test_they_are_quantized_and_decided(name: str, tmp_path: Any) -> None:
    pytest.importorskip("aimet_torch")
    model = Model(PRODUCTS["baddbmm"]).eval()
    sim = aimet_ext.create_sim(model, DATA[0], activations=16, lm_head=aimet_ext.QSpec(bitwidth=4))
    assert not sim.aimet_ext_settings["left_float"]  # nor is the bias a matrix

    @torch.no_grad()
    def error() -> float:
        return float(sum((sim.model(x) - model(x)).square().sum() for x in HELD_OUT))

    def calibrate() -> None:
        sim.compute_encodings(lambda module: [module(x) for x in DATA])

    calibrate()
    plain = error()
    settings = {"num_iterations": 50} if name == "adaround" else {}
    report = getattr(aimet_ext, f"apply_{name}")(sim, DATA, progress=False, **settings)
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert [tokens[f"gates.weight.{n}"] for n in range(HEADS)] == [tokens["first"]] * HEADS
    calibrate()
    assert error() < plain
    aimet_ext.export(sim, tmp_path / "out", "model", DATA[0], progress=False)
    again = aimet_ext.load(
        tmp_path / "out", sim=aimet_ext.create_sim(model, DATA[0]), progress=False
    )
    with torch.no_grad():
        assert torch.equal(again.model(HELD_OUT[0]), sim.model(HELD_OUT[0]))
