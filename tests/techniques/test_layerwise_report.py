"""What layer-wise techniques report of their work."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest
from layerwise_reference import as_simulated, layer_inputs, weights
from torch import Tensor

pytest.importorskip("aimet_torch")

LAYER_WISE = pytest.mark.techniques(where=lambda t: t.on_moments)
BLOCK = "model.model.layers.0."


@LAYER_WISE
def test_report(
    technique: Any, make_sim: Any, batches: list[Tensor], tmp_path: pathlib.Path
) -> None:
    report = technique.apply(make_sim(), batches)
    assert report.technique == technique.name
    assert len(report.layers) == 14
    assert [layer.name for layer in report.layers][:4] == [
        BLOCK + f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    assert {layer.tokens for layer in report.layers} == {2 * 16 + 3 * 24 + 12}
    assert all(layer.storage == "memory" and layer.bitwidth == 4 for layer in report.layers)
    assert all(layer.signal > 0 and layer.seconds > 0 for layer in report.layers)
    assert report.settings == report.to_dict()["settings"]
    assert {name: report.settings[name] for name in technique.quick} == technique.quick
    assert report.cost["walk"] == "blocks" and report.cost["blocks"] == 2
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    text = str(report)
    assert text.startswith(f"{technique.name}:") and text.count("\n") == 17
    assert "-" not in text.replace("e-", "") and "%" in text  # shares of the signal, none negative
    assert BLOCK + "mlp.down_proj" in text


@LAYER_WISE
def test_too_few_tokens_are_said_with_numbers(
    technique: Any, make_sim: Any, ids: Any, caplog: pytest.LogCaptureFixture
) -> None:
    report = technique.apply(make_sim(layers=1), [ids(2, 64)])
    assert not any(layer.is_short_of_tokens for layer in report.layers if layer.inputs <= 32)
    few = technique.apply(make_sim(layers=1), [ids(1, 12)])
    assert all(layer.is_short_of_tokens for layer in few.layers)
    text = str(few)
    assert "too few tokens for 7 of 7 layers" in text and "saw 12 tokens; give at least 512" in text
    if few.technique != "seq_mse":  # which decides ranges alone
        assert "too few tokens for 7 of 7 layers" in caplog.text


@LAYER_WISE
def test_losses_of_the_report_are_output_errors(technique: Any, make_sim: Any, ids: Any) -> None:
    """Mean over tokens of the squared error of each layer's output, on the quantized stream."""
    data = [ids(2, 16, 1), ids(1, 12, 2)]
    sim = make_sim(layers=1)
    original = weights(sim)
    report = technique.apply(sim, data, inp_symmetry="symqt")
    inputs = layer_inputs(sim.model, [layer.name for layer in report.layers], data)
    for layer in report.layers:
        x, weight = inputs[layer.name][0], original[layer.name].double()
        error = as_simulated(sim, layer.name).double() - weight
        assert layer.loss_after == pytest.approx(
            float((x @ error.mT).square().sum() / len(x)), rel=1e-4
        )
        assert layer.signal == pytest.approx(
            float((x @ weight.mT).square().sum() / len(x)), rel=1e-4
        )
        ratio = 10 * math.log10(layer.signal / layer.loss_after)
        assert layer.sqnr_db == pytest.approx(ratio, abs=1e-6)


@LAYER_WISE
def test_moments_in_mapped_files(
    technique: Any,
    make_sim: Any,
    ids: Any,
    monkeypatch: pytest.MonkeyPatch,
    result_of: Any,
    tmp_path: pathlib.Path,
) -> None:
    """Where memory is short, with the same result, and said in the report."""
    from aimet_ext.data import moments

    plain, mapped = make_sim(layers=1), make_sim(layers=1)
    technique.apply(plain, [ids(2, 16, 1)])
    monkeypatch.setattr(moments, "available_bytes", lambda *args: 0)
    report = technique.apply(mapped, [ids(2, 16, 1)], cache_dir=tmp_path)
    assert {layer.storage for layer in report.layers} == {"mapped"}
    assert "second moments in mapped files" in str(report)
    assert result_of(plain) == result_of(mapped)
    assert list(tmp_path.iterdir()) == []
