"""A graph whose weights are written behind it is the one that the exporters alone write."""

from __future__ import annotations

import contextlib
import json
import pathlib
import warnings
from typing import Any

import onnx
import pytest
import torch

from aimet_ext.artifact.inputs import positional_inputs
from aimet_ext.artifact.torch_export import float32_model, write_onnx
from aimet_ext.grids.create import create_sim
from aimet_ext.onnx import apart
from aimet_ext.specs import LPBQ, Blockwise, QSpec

pytest.importorskip("aimet_torch")
IDS = torch.arange(8)[None]


def by_aimet(sim: Any, path: pathlib.Path) -> None:
    """Write the float weights with AIMET's exporter, which holds all of them."""
    sim._apply_qdq_to_model_parameters = lambda model: contextlib.nullcontext()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sim.onnx.export(
            (IDS,),
            str(path),
            input_names=["input_ids"],
            output_names=["logits"],
            opset_version=17,
            encoding_version="2.0.0",
            export_int32_bias=False,
            dynamo=False,
        )
    del sim._apply_qdq_to_model_parameters


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"weights": QSpec(bitwidth=4, granularity=LPBQ(16))}),
        ("llama", {"weights": QSpec(bitwidth=4, symmetric=False, granularity=Blockwise(16))}),
        ("llama", {"weights": None, "lm_head": None, "embedding": None, "activations": None}),
    ],
)
def test_the_file_is_the_same(
    family: str, options: dict[str, Any], tiny_model: Any, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(apart, "SMALLEST", 0)
    tied = {k: options.pop(k) for k in ("tie_word_embeddings",) if k in options}
    sim = create_sim(tiny_model(family, **tied), IDS, **options)
    sim.compute_encodings(lambda model: model(IDS))
    sim.model.eval()
    by_aimet(sim, tmp_path / "expected.onnx")
    with float32_model(sim.model):
        inputs = positional_inputs(sim.model, IDS)
        write_onnx(sim, tmp_path, "ours", inputs, opset_version=17, dynamic_axes=None)
    expected, found = (onnx.load(tmp_path / f"{name}.onnx") for name in ("expected", "ours"))
    assert list(found.graph.node) == list(expected.graph.node)
    assert list(found.graph.input) == list(expected.graph.input)
    two = [{t.name: t for t in model.graph.initializer} for model in (found, expected)]
    assert two[0] == two[1]
    encodings = [
        json.loads((tmp_path / name).read_text())
        for name in ("ours.2.0.0.encodings", "expected.encodings")
    ]
    assert encodings[0] == encodings[1]
