"""Perplexity of ONNX graphs: of a session and of a simulation, with and without a mask."""

from __future__ import annotations

import pathlib

import pytest
import torch

from aimet_ext.evaluation.perplexity import evaluate_perplexity
from aimet_ext.models.huggingface import prepare_model

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def session(model: torch.nn.Module, folder: pathlib.Path, *names: str) -> object:
    """A session of a model exported with these inputs, ids first."""
    path = folder / f"{len(names)}.onnx"
    ids = torch.randint(3, 128, (2, 8))
    axes = {name: {0: "batch", 1: "seq"} for name in (*names, "logits")}
    torch.onnx.export(
        prepare_model(model).eval(),
        tuple([ids, torch.ones_like(ids)][: len(names)]),
        str(path),
        dynamo=False,
        input_names=list(names),
        output_names=["logits"],
        dynamic_axes=axes,
        opset_version=17,
    )
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))


def test_a_session_scores_as_its_module(tiny_llama, tmp_path, ids):
    expected = evaluate_perplexity(tiny_llama, [ids])
    exported = session(tiny_llama, tmp_path, "input_ids")
    forms = (ids, (ids,), {"input_ids": ids, "labels": ids}, ids.numpy())
    for batch in forms:
        assert evaluate_perplexity(exported, [batch]) == pytest.approx(expected, rel=1e-5)


def test_values_beyond_inputs_and_a_label_are_refused(tiny_llama, tmp_path, ids):
    exported = session(tiny_llama, tmp_path, "input_ids")
    expected = evaluate_perplexity(tiny_llama, [ids])
    assert evaluate_perplexity(exported, [(ids, ids)]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"inputs \(input_ids\) and a label at most, got 3 values"):
        evaluate_perplexity(exported, [(ids, ids, ids)])


def test_the_name_of_a_single_input_does_not_matter(tiny_llama, tmp_path, ids):
    exported = session(tiny_llama, tmp_path, "tokens")
    expected = evaluate_perplexity(tiny_llama, [ids])
    assert evaluate_perplexity(exported, [ids]) == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_count(tiny_llama, tmp_path, ids):
    exported = session(tiny_llama, tmp_path, "input_ids", "attention_mask")
    expected = evaluate_perplexity(tiny_llama, [ids])
    assert evaluate_perplexity(exported, [ids]) == pytest.approx(expected, rel=1e-5)
    padded = torch.cat((ids, torch.full((3, 2), 2)), 1)
    batch = {"input_ids": padded, "attention_mask": (padded != 2).long()}
    assert evaluate_perplexity(exported, [batch]) == pytest.approx(expected, rel=1e-5)


def test_a_missing_input_is_named(tiny_llama, tmp_path, ids):
    exported = session(tiny_llama, tmp_path, "input_ids", "extra")
    with pytest.raises(ValueError, match=r"batch 0 must hold .* extra is missing"):
        evaluate_perplexity(exported, [ids])


def test_a_simulation_of_aimet_onnx(tiny_llama, tmp_path, ids):
    aimet_onnx = pytest.importorskip("aimet_onnx")
    session(tiny_llama, tmp_path, "input_ids")
    sim = aimet_onnx.QuantizationSimModel(onnx.load(tmp_path / "1.onnx"), param_type="int8")
    for quantizer in sim.qc_quantize_op_dict.values():
        quantizer.enabled = False
    expected = evaluate_perplexity(tiny_llama, [ids])
    assert evaluate_perplexity(sim, [ids]) == pytest.approx(expected, rel=1e-5)
