"""Olive's ``AimetQuantization`` with its shipped techniques and with ours, a process for each.

    python benchmarks/onnx_olive.py shipped|ours PASS_AS_JSON [--windows 16]

runs the pass on the packaged model and prints one JSON line. A process each, because ours takes the
shipped pass's place for as long as the process lives.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from common import Bench, Options, quiet
from onnx_methods import output_error
from onnx_models import (
    as_inputs,
    export_llm,
    float_session,
    perplexity,
    run,
)
from report import ASSETS, bar, in_own_process, named, print_table

CALIBRATION, HELD_OUT = 16, 16
BATCH = 4
EXCLUDED = ["/model/lm_head/MatMul"]


def documented(steps: int) -> dict[str, dict[str, Any]]:
    """The examples of Olive's page, the fewer steps apart, and what only ours has.

    The page's ``/lm_head/MatMul`` is called as in this graph.
    """
    adaround = {"name": "adaround", "num_iterations": steps, "nodes_to_exclude": EXCLUDED}
    lpbq = {"name": "lpbq", "block_size": 64}
    seqmse = {"name": "seqmse", "num_candidates": 20}
    omniquant = {"name": "omniquant", "num_iterations": min(steps, 800)}
    int4 = {"precision": "int4"}
    return {
        "no technique": {},
        "lpbq": {"techniques": [lpbq]},
        "seqmse": {**int4, "techniques": [seqmse]},
        "adaround": {"techniques": [adaround]},
        "adaround int4": {**int4, "techniques": [adaround]},
        "lpbq + seqmse": {"techniques": [lpbq, seqmse]},
        "lpbq + adaround": {"techniques": [lpbq, adaround]},
        "omniquant": {**int4, "techniques": [omniquant]},
        "gptq": {**int4, "techniques": [{"name": "gptq"}]},
    }


def examples(quick: bool, steps: int = 0) -> dict[str, Any]:
    """l: every documented example with both, and omniquant, gptq and lpbq + adaround."""
    head = (
        "example",
        "activations",
        "shipped error",
        "ours",
        "shipped perplexity",
        "ours perplexity",
        "shipped s",
        "ours s",
    )
    rows: list[list[Any]] = []
    bars = []
    cells = documented(steps or (2 if quick else 10_000))
    for activations in ("uint8", "uint16"):
        for name, config in cells.items():
            settings = {"activation_type": activations, **config}
            sides = {}
            for side in ("shipped", "ours"):
                arguments = [side, json.dumps(settings), *(["--quick"] if quick else [])]
                sides[side] = in_own_process("onnx_olive.py", *arguments)
            shipped, ours = sides["shipped"], sides["ours"]
            keys = ("error", "perplexity", "seconds")
            figures = [side.get(key) for key in keys for side in (shipped, ours)]
            rows.append([name, activations, *figures])
            print(f"  {name} {activations}: {figures} {shipped.get('failed', '')}", flush=True)
            if "failed" in ours:
                bars.append(bar(f"{name} {activations}: ours failed, {ours['failed']}", False))
            elif config and shipped.get("error") is not None:
                text = f"{name} {activations}: error {ours['error']:.5f} of {shipped['error']:.5f}"
                bars.append(bar(text, ours["error"] < shipped["error"]))
    print_table("l. Olive's pass on the packaged model", head, rows)
    return {"rows": named(head, rows), "bars": bars}


def measure(side: str, settings: dict[str, Any], quick: bool) -> dict[str, Any]:
    """The pass on the packaged model: how far its output is from the float graph's."""
    import onnx

    subject = Bench(Options(assets=ASSETS, quick=quick)).subject("box")
    count = 4 if quick else CALIBRATION
    subject = replace(subject, calibration=subject.calibration[:count])
    graph = export_llm(subject.model, mask_value=-100.0)
    inputs = as_inputs(subject.scored[: 4 if quick else HELD_OUT].split(BATCH))
    expected = run(float_session(graph), inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.onnx"
        onnx.save(graph, path)
        started = time.process_time()
        try:
            with quiet():
                written = quantize(side, path, settings, subject.calibration)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        seconds = time.process_time() - started
        session = _session(written)
        windows = torch.cat([torch.from_numpy(each["input_ids"]) for each in inputs])
        return {
            "error": output_error(session, inputs, expected),
            "perplexity": perplexity(session, windows, BATCH),
            "float_perplexity": perplexity(float_session(graph), windows, BATCH),
            "seconds": seconds,
        }


def quantize(
    side: str, path: pathlib.Path, settings: dict[str, Any], windows: torch.Tensor
) -> pathlib.Path:
    """Run the pass; where the QDQ graph is."""
    from olive.data.component.dataset import BaseDataset
    from olive.data.registry import Registry
    from olive.hardware import DEFAULT_CPU_ACCELERATOR
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    if side == "ours":
        from aimet_ext.integrations.olive import AimetQuantization
    else:
        from olive.passes.onnx.aimet_quantization import AimetQuantization

    @Registry.register_dataset("windows")
    def windows_of_ids(**_: Any) -> Any:
        return BaseDataset([{"input_ids": window} for window in windows])

    skip = {"type": "skip_pre_process"}
    config = {
        "data_config": {
            "name": "calibration",
            "type": "DataContainer",
            "load_dataset_config": {"type": "windows"},
            "pre_process_data_config": skip,
            "dataloader_config": {"batch_size": BATCH},
        },
        **settings,
    }
    olive_pass = create_pass_from_dict(
        AimetQuantization, config, disable_search=True, accelerator_spec=DEFAULT_CPU_ACCELERATOR
    )
    done = olive_pass.run(ONNXModelHandler(str(path)), str(path.parent / "quantized"))
    return pathlib.Path(done.model_path)


def _session(path: pathlib.Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # The fused kernels behind this level round activations once more.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=("shipped", "ours"))
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(options.side, options.settings, options.quick)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
