"""Olive's AimetQuantization on language models, calibrated on a text file."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

import aimet_ext
from aimet_ext import examples

for module in ("olive", "aimet_onnx", "onnx", "onnxruntime", "transformers"):
    pytest.importorskip(module)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from olive.workflows import run as olive_run  # noqa: E402
from onnx_models import exported_llama, genai_inputs, genai_llama  # noqa: E402

from aimet_ext.integrations import olive as ours  # noqa: E402
from aimet_ext.integrations.olive_config import package_config  # noqa: E402

# Olive's imports warn, and AIMET about read-only arrays.
pytestmark = pytest.mark.filterwarnings("default")

# What the README of such a workflow shows: a text file as a data set of Olive's.
SCRIPT = """
import torch
from olive.data.registry import Registry
from transformers import AutoTokenizer

import aimet_ext

class Windows(torch.utils.data.Dataset):
    def __init__(self, windows):
        self.windows = windows

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        ids = self.windows[index][0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids

@Registry.register_dataset()
def aimet_ext_test_text(path, model_path, seq_length=32, count=16):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return Windows(aimet_ext.calibration_batches(tokenizer, path, seq_length, count))
"""
VOCABULARY = 1024


@pytest.fixture(scope="module")
def data_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("text")
    script, text = folder / "aimet_ext_test_text.py", folder / "text.jsonl"
    script.write_text(SCRIPT, "utf-8")
    lines = [json.dumps({"text": document}) for document in examples.documents("calibration")]
    text.write_text("\n".join(lines), "utf-8")
    return {
        "name": "calib_data_config",
        "user_script": str(script),
        "load_dataset_config": {
            "type": "aimet_ext_test_text",
            "path": str(text),
            "model_path": str(examples.model_dir()),
        },
        "dataloader_config": {"batch_size": 4},
    }


def quantized(
    folder: pathlib.Path, model: onnx.ModelProto, data: dict[str, Any], **settings: Any
) -> pathlib.Path:
    """Folder of what the pass makes of a model, 4-bit weights."""
    onnx.save(model, folder / "float.onnx")
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": str(folder / "float.onnx")},
        "data_configs": [data],
        "passes": {
            "quantize": {
                "type": "AimetQuantization",
                "data_config": "calib_data_config",
                "precision": "int4",
                "activation_type": "uint16",
                **settings,
            }
        },
        "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"),
        "log_severity_level": 3,
    }
    olive_run(workflow, package_config=package_config())
    return folder / "output"


def logits(path: pathlib.Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], feeds)[0])


def prompt() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (4, 24))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def error(folder: pathlib.Path, feeds: dict[str, np.ndarray]) -> float:
    expected = logits(folder / "float.onnx", feeds)
    got = logits(folder / "output" / "model.onnx", feeds)
    return float(np.square(got - expected).mean() / np.square(expected).mean())


STACKS: dict[str, list[dict[str, Any]]] = {
    "omniquant": [{"name": "omniquant", "num_iterations": 4, "search_sweeps": 1}],
    "omniquant, gptq": [
        {"name": "omniquant", "num_iterations": 4, "search_sweeps": 1},
        {"name": "gptq"},
    ],
    "smoothquant, gptq": [{"name": "smoothquant", "alpha": 0.5}, {"name": "gptq"}],
    "lpbq, awq": [{"name": "lpbq", "block_size": 16}, {"name": "awq", "num_grid": 6}],
    "seqmse, gptq": [{"name": "seqmse"}, {"name": "gptq"}],
    "lpbq, seqmse": [{"name": "lpbq", "block_size": 16}, {"name": "seqmse"}],
    "lpbq, gptq": [{"name": "lpbq", "block_size": 16}, {"name": "gptq"}],
    "lpbq, adaround": [
        {"name": "lpbq", "block_size": 16},
        {"name": "adaround", "num_iterations": 20},
    ],
}


@pytest.fixture(scope="module")
def plain(data_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> float:
    """Error of plain rounding."""
    folder = tmp_path_factory.mktemp("plain")
    quantized(folder, llama(), data_config, save_encodings=False)
    return error(folder, prompt())


def llama() -> onnx.ModelProto:
    return exported_llama(1, vocab_size=VOCABULARY).model


@pytest.mark.parametrize("stack", STACKS)
def test_techniques_stack_in_one_pass(
    stack: str, plain: float, data_config: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """On real text, each better than plain rounding, with all that belongs to it beside it."""
    output = quantized(tmp_path, llama(), data_config, techniques=STACKS[stack])
    assert error(tmp_path, prompt()) < plain
    reports = json.loads((output / ours.REPORT).read_text("utf-8"))
    assert [report["technique"] for report in reports] == stack.split(", ")
    sim = aimet_ext.load(output)
    (simulated,) = sim.session.run(None, prompt())
    got = logits(output / "model.onnx", prompt())
    assert np.square(got - simulated).mean() < 1e-4 * np.square(simulated).mean()
    if "omniquant" in stack:  # learnt scales lie beside the model
        assert aimet_ext.load_scales(output)


def test_a_graph_of_genai_gets_its_cache_from_olive(
    data_config: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """The model has inputs for keys and values, which the text does not give."""
    model, _ = genai_llama(vocab_size=VOCABULARY, num_hidden_layers=1)
    quantized(tmp_path, model, data_config, save_encodings=False)
    feeds = genai_inputs(model, prompt()["input_ids"])
    plain = error(tmp_path, feeds)
    output = quantized(tmp_path, model, data_config, techniques=STACKS["omniquant, gptq"])
    assert error(tmp_path, feeds) < plain
    assert aimet_ext.load(output) is not None
