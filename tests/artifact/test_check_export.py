"""What torch's exporter cannot write is found before a technique runs."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import aimet_ext
from aimet_ext import examples
from aimet_ext.models.huggingface import PreparedCausalLM
from aimet_ext.recipes.recipe import Recipe

pytest.importorskip("aimet_torch")


class Bessel(nn.Module):
    """A layer beside an operator that the exporter has not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.special.i1e(x)


def test_the_operator_is_named(tmp_path: pathlib.Path) -> None:
    model, x = Bessel().eval(), torch.randn(2, 8)
    named = "special_i1e.*register_custom_op_symbolic"
    with pytest.raises(RuntimeError, match=named):
        aimet_ext.check_export(model, x)
    sim = aimet_ext.create_sim(model, (x,))
    before = [(parameter, parameter.clone()) for parameter in sim.model.parameters()]
    with pytest.raises(RuntimeError, match=named):  # activations have no ranges yet
        aimet_ext.check_export(sim, x)
    sim.compute_encodings(lambda module: module(x))
    with pytest.raises(RuntimeError, match=named):
        aimet_ext.export(sim, tmp_path / "out", "model", x, progress=False)
    weights = before[:2]  # ranges have been calibrated since
    assert all(torch.equal(now, was) for now, was in weights) and not list(tmp_path.iterdir())


def test_models_that_can_be_exported_pass_and_stay_as_they_are(tiny_llama: Any) -> None:
    ids = torch.arange(32)[None]
    aimet_ext.check_export(tiny_llama, ids)
    sim = aimet_ext.create_sim(tiny_llama, ids)
    state = [(parameter, parameter.clone()) for parameter in sim.model.parameters()]
    sim.model.train()
    aimet_ext.check_export(sim, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert sim.model.training
    assert all(torch.equal(now, was) for now, was in state)


@pytest.mark.parametrize("checked", [True, False])
def test_quantize_stops_before_the_techniques(
    checked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    from aimet_ext.cli.app import app

    forward, applied = PreparedCausalLM.forward, []

    def with_bessel(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        logits = forward(self, *args, **kwargs)
        return logits + 0 * torch.special.i1e(logits)

    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        applied.append(self)
        raise RuntimeError("a technique runs")

    monkeypatch.setattr(PreparedCausalLM, "forward", with_bessel)
    monkeypatch.setattr(Recipe, "apply", apply)
    text = tmp_path / "text.txt"
    text.write_text("What a function returns is what it is for. " * 40)
    done = CliRunner().invoke(
        app,
        [
            *("quantize", str(examples.model_dir()), "--calibration", str(text)),
            *("--output", str(tmp_path / "out"), "--technique", "gptq", "--seq-length", "16"),
            *("--num-batches", "1", "--batch-size", "1"),
            *([] if checked else ["--no-check-export"]),
        ],
    )
    assert done.exit_code == 1 and len(applied) == (0 if checked else 1)
    expected = "special_i1e.*--no-check-export" if checked else "a technique runs"
    assert re.search(expected, done.stderr, re.DOTALL), done.stderr
    assert not (tmp_path / "out").exists()
