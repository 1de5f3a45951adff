"""What torch cannot write to ONNX, or writes wrongly, is exported; else the error says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext

aimet_torch = pytest.importorskip("aimet_torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")  # with it each export is compared with the model

from aimet_ext.sim.torch.graph import SpeltOut  # noqa: E402

IDS = torch.arange(16).reshape(2, 8) * 7 % 125 + 3
OPERATORS = {
    "repeat_interleave": lambda x: x[..., :4].repeat_interleave(2, dim=-1) * x,
    "repeat_interleave_flat": lambda x: x[0, :2].repeat_interleave(4) + x,
    "diff": lambda x: torch.diff(x, n=2, dim=-1, append=x[:, :2]),
    "cumsum_of_truth_values": lambda x: (x.diff() > 0).cumsum(-1) / 4,
    "expm1": lambda x: torch.expm1(x / 4) + x.expm1(),
    "permute": lambda x: x[None].permute(-1, 0, -2).permute((1, -1, 0))[0] + x,
    "triangular": lambda x: torch.linalg.solve_triangular(
        (x.T @ x) / 8, x.T, upper=False, unitriangular=True
    ),
    "rms_norm": lambda x: nn.functional.rms_norm(x, (8,), torch.arange(1.0, 9.0)) + x,
}


class Net(nn.Module):
    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator = operator
        self.first, self.norm = nn.Linear(8, 8), nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self.first(self.norm(x)))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_written_as_others(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    sim = aimet_ext.create_sim(Net(OPERATORS[name]).eval(), x, activations=None)
    aimet_ext.export(sim, tmp_path / "out", "m", x)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_triangular_systems(size, upper):
    matrix = torch.randn(2, size, size, dtype=torch.float64) / 4
    right = torch.randn(2, size, 3, dtype=torch.float64)

    def solved() -> Tensor:
        return torch.linalg.solve_triangular(matrix, right, upper=upper, unitriangular=True)

    with SpeltOut():
        found = solved()
    torch.testing.assert_close(found, solved(), rtol=1e-9, atol=1e-9)


def test_permutations_that_count_from_the_end():
    x = torch.randn(2, 3, 4)
    with SpeltOut():
        assert torch.equal(x.permute(0, -1, 1), x.permute(0, 2, 1))
        assert torch.equal(torch.permute(x, (-1, 0, -2)), x.permute(2, 0, 1))


class Wrapper(nn.Module):
    """A wrapper as many write it."""

    def __init__(self, model: nn.Module, also: Any = torch.zeros_like) -> None:
        super().__init__()
        self.model, self.also = model, also

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        logits = self.model(*args, **kwargs, use_cache=False).logits
        return logits + self.also(logits).sum() * 0


def by_hand(model: nn.Module) -> Any:
    sim = aimet_torch.QuantizationSimModel(model, IDS, default_param_bw=8)
    sim.compute_encodings(lambda module: module(IDS))
    return sim


@pytest.mark.filterwarnings("ignore")  # what AIMET and tracing say of a model that is not prepared
def test_a_wrapper_that_hands_on_its_arguments_is_exported(tiny_llama, tmp_path):
    sim = by_hand(Wrapper(tiny_llama))
    aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    with torch.no_grad():
        expected = sim.model(IDS)
        again = aimet_ext.load(tmp_path / "out", sim=by_hand(Wrapper(tiny_llama)))
        assert torch.equal(again.model(IDS), expected)
    with pytest.raises(TypeError, match=r"by position, but Wrapper.forward takes input_ids"):
        aimet_ext.export(sim, tmp_path / "other", "m", {"input_ids": IDS})


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_written_is_to_be_prepared(tiny_llama, tmp_path):
    sim = by_hand(Wrapper(tiny_llama, torch.histc))
    with pytest.raises(RuntimeError, match=r"cannot write .*aten::histc.*; .* create_sim, or"):
        aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    assert not (tmp_path / "out").exists()
