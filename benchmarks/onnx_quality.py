"""Three bits in files, and AdaRound's accuracy beside AIMET's, on trained models as graphs."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SIMPLE, quiet
from methods import ADAROUND
from onnx_methods import apply_onnx, output_error
from onnx_models import (
    as_inputs,
    float_session,
    in_blocks,
    onnx_sim,
    perplexity,
    run,
    weight_names,
    weights_of,
)
from onnx_pairs import W3, W4, OnnxBench
from report import bar, named, print_table

import aimet_ext

STORIES = "stories260K"
FUSED = "onnxruntime's fused kernel, its default"  # multiplies by 8-bit activations
RUNTIMES: dict[str, dict[str, str]] = {
    "onnxruntime, basic optimizations": {"level": "ORT_ENABLE_BASIC"},
    FUSED: {},
    "the same in float32": {"qdq_matmulnbits_accuracy_level": "1"},
}
OURS = ("ours: adaround", "ours: seq_mse + adaround")


def adaround(bench: OnnxBench) -> dict[str, Any]:
    """AdaRound, the linears of the first two blocks of a trained model, 4 bits per channel."""
    subject, graph = bench.subject(STORIES), bench.graph(STORIES)
    first = ("/layers.0/", "/layers.1/")
    wanted = [
        node for node in weight_names(graph) if in_blocks(node) and any(b in node for b in first)
    ]
    specs = dict.fromkeys(wanted, W4)
    inputs = as_inputs(subject.calibration.split(bench.options.batch_size))
    held_out = as_inputs(subject.scored.split(20))
    expected = run(float_session(graph), held_out)
    head = ("method", "perplexity", "output error", "seconds")
    rows: list[list[Any]] = [["float", perplexity(float_session(graph), subject.scored), 0.0, None]]
    for method in (SIMPLE, *OURS, ADAROUND):
        cold = onnx_sim(graph, specs)
        small = replace(bench.effort, candidates=2, steps=2, aimet_steps=2)
        apply_onnx(method, cold, inputs[:1], small)
        sim = onnx_sim(graph, specs)
        torch.manual_seed(0)
        started = time.process_time()
        apply_onnx(method, sim, inputs, bench.effort)
        seconds = None if method == SIMPLE else time.process_time() - started
        error = output_error(sim, held_out, expected)
        rows.append([method, perplexity(sim, subject.scored), error, seconds])
        print(f"  {rows[-1]}", flush=True)
    print_table(f"AdaRound on the graph of {STORIES}, linears of blocks 0 and 1", head, rows)
    theirs = rows[-1]
    good = [theirs[3] / row[3] for row in rows[2:-1] if row[2] <= theirs[2]]
    fastest = max(good, default=0.0)
    text = f"at AIMET's output error or below, {fastest:.0f} times faster, at least 30"
    steps = bench.effort.aimet_steps
    return {
        "rows": named(head, rows),
        "aimet_steps": steps,
        "bars": [bar(text, fastest >= 30)],
    }


def three_bits(bench: OnnxBench) -> dict[str, Any]:
    """3 bits: what a file holds, read back by AIMET and by us, against the simulation."""
    import aimet_onnx
    import onnx

    subject, graph = bench.subject(STORIES), bench.graph(STORIES)
    sim = onnx_sim(graph, {node: W3 for node in weight_names(graph) if in_blocks(node)})
    inputs = as_inputs(subject.calibration.split(bench.options.batch_size))
    aimet_ext.apply_gptq(sim, inputs, progress=False)
    held_out = as_inputs(subject.scored[:4].split(4))
    wanted, weights = run(sim, held_out), weights_of(sim)
    head = ("file", "read by", "largest deviation of weights", "of the output")
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        exported = Path(folder) / "exported"
        aimet_ext.export(sim, exported, "model", inputs[0])
        again = aimet_ext.load(exported)
        apart = _deviation(list(weights_of(again).values()), list(weights.values()))
        rows.append(["folder", "aimet_ext.load", apart, _deviation(run(again, held_out), wanted)])
        read = aimet_onnx.QuantizationSimModel.from_onnx_qdq(onnx.load(_qdq(exported)))
        found = weights_of(read)  # and others: AIMET gives quantizers to all that has none
        apart = _deviation([found[name] for name in weights], list(weights.values()))
        rows.append(["QDQ", "aimet_onnx from_onnx_qdq", apart, None])
        for how, options in RUNTIMES.items():
            got = run(_session(_qdq(exported), **options), held_out)
            rows.append(["QDQ", how, None, _deviation(got, wanted)])
    print_table(f"w. {STORIES}, W3 per-channel by GPTQ, read back", head, rows)
    exact = [row for row in rows if row[1] != FUSED]
    bars = [
        bar(f"{row[0]} by {row[1]}: {row[2]}, {row[3]}", max(row[2] or 0, row[3] or 0) <= 1e-5)
        for row in exact
    ]
    return {"rows": named(head, rows), "bars": bars}


def _session(path: Path, **entries: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for key, value in entries.items():
        if key == "level":
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, value)
        else:
            options.add_session_config_entry(f"session.{key}", value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _qdq(folder: Path) -> Path:
    (found,) = folder.glob("*qdq*.onnx")
    return found


def _deviation(got: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(got, wanted, strict=True))
