"""``olive run`` from a shell: a workflow, the package config, and an evaluator of Olive's."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import aimet_ext
from aimet_ext.cli import app

for module in ("olive", "aimet_onnx", "onnx", "onnxruntime"):
    pytest.importorskip(module)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx_models import mlp_model  # noqa: E402

SCRIPT = """
import numpy as np
import onnxruntime
import torch
from olive.data.registry import Registry

class Labelled(torch.utils.data.Dataset):
    def __init__(self, labels_of, seed, count):
        values = np.random.default_rng(seed).standard_normal((count, 32)).astype(np.float32)
        session = onnxruntime.InferenceSession(labels_of, providers=["CPUExecutionProvider"])
        self.labels = session.run(None, {"x": values})[0].argmax(-1)
        self.values = torch.from_numpy(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"x": self.values[index]}, int(self.labels[index])

@Registry.register_dataset()
def aimet_ext_labelled(labels_of, seed, count, **unused):
    return Labelled(labels_of, seed, count)

@Registry.register_post_process()
def aimet_ext_largest(output, **unused):
    return output.argmax(-1)
"""
# Olive reports over the network whatever its switches say, and waits half a minute where it cannot.
SILENT = """
from olive.telemetry import Telemetry

silent = object.__new__(Telemetry)
silent._initialized, silent._logger, silent._cache_handler = True, None, None
Telemetry._instance = silent
"""
CLASSES, COUNT = 16, 128


def data(folder: pathlib.Path, name: str, seed: int) -> dict[str, Any]:
    """A data config; Olive asks for a type of each part where an evaluator reads it."""
    return {
        "name": name,
        "user_script": str(folder / "aimet_ext_labelled.py"),
        "load_dataset_config": {
            "type": "aimet_ext_labelled",
            "labels_of": str(folder / "model.onnx"),
            "seed": seed,
            "count": COUNT,
        },
        "post_process_data_config": {"type": "aimet_ext_largest"},
        "dataloader_config": {"type": "default_dataloader", "batch_size": 16},
    }


def workflow(folder: pathlib.Path) -> dict[str, Any]:
    accuracy = {"task": "multiclass", "num_classes": CLASSES}
    timing = {"warmup_num": 1, "repeat_test_num": 2}
    return {
        "input_model": {"type": "ONNXModel", "model_path": "model.onnx"},
        "data_configs": [data(folder, "calib_data_config", 1), data(folder, "held_out", 2)],
        "evaluators": {
            "judge": {
                "type": "OnnxEvaluator",
                "metrics": [
                    {
                        "name": "agreement",
                        "type": "accuracy",
                        "data_config": "held_out",
                        "sub_types": [
                            {"name": "accuracy_score", "priority": 1, "metric_config": accuracy}
                        ],
                    },
                    {
                        "name": "time",
                        "type": "latency",
                        "data_config": "held_out",
                        "sub_types": [{"name": "avg", "priority": 2, "metric_config": timing}],
                    },
                ],
            }
        },
        "evaluator": "judge",
        "passes": {
            "quantize": {
                "type": "AimetQuantization",
                "data_config": "calib_data_config",
                "precision": "int4",
                "techniques": [{"name": "seqmse"}, {"name": "gptq", "beams": 2}],
            }
        },
        "output_dir": "output",
        "cache_dir": "cache",
    }


def classes(model: pathlib.Path, values: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": values})[0]).argmax(-1)


@pytest.mark.slow
def test_olive_run_quantizes_and_evaluates(tmp_path: pathlib.Path) -> None:
    """With techniques that Olive does not have; what is judged is the quantized model.

    Olive starts in a folder with files that are called as its models are.
    """
    (tmp_path / "aimet_ext_labelled.py").write_text(SCRIPT, "utf-8")
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "sitecustomize.py").write_text(SILENT, "utf-8")
    onnx.save(mlp_model((32, 64, 64, CLASSES), bias="add"), tmp_path / "model.onnx")
    (tmp_path / "workflow.json").write_text(json.dumps(workflow(tmp_path)), "utf-8")
    package = pathlib.Path(aimet_ext.__file__).parents[1]
    paths = [str(tmp_path / "silent"), str(package), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    written = CliRunner().invoke(app, ["olive-config", "--output", str(tmp_path / "package.json")])
    assert written.exit_code == 0, written.output
    olive = str(pathlib.Path(sys.executable).with_name("olive"))
    options = ("--config", "workflow.json", "--package-config", "package.json")
    done = subprocess.run(
        [olive, "run", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    output = tmp_path / "output"
    reports = json.loads((output / "aimet_ext_report.json").read_text("utf-8"))
    assert [report["technique"] for report in reports] == ["seqmse", "gptq"]
    assert aimet_ext.load(output) is not None
    values = np.random.default_rng(2).standard_normal((COUNT, 32)).astype(np.float32)
    wanted, got = (classes(path / "model.onnx", values) for path in (tmp_path, output))
    metrics = json.loads((output / "metrics.json").read_text("utf-8"))
    agreement = float((wanted == got).mean())
    assert 0.5 < agreement < 1
    assert metrics["agreement-accuracy_score"]["value"] == pytest.approx(agreement, abs=0.02)
    assert metrics["time-avg"]["value"] > 0
