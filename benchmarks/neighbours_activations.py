"""Weights and activations of 8 bits on a graph, static and per tensor: plain, rotated, smoothed.

    python benchmarks/neighbours_activations.py --model SmolLM2-135M-Instruct [--windows 16]

Perplexity of windows of 512 tokens: the first ones calibrate, the last ones score. ``--inputs``
quantizes the inputs of linear layers alone, as Quark and most papers do; without it the outputs of
all operators are quantized, the residual stream among them, as on an NPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import quiet
from report import HERE, add_section, machine, named, print_table
from subjects import TEXTS, Subject, read_subject

import aimet_ext

HEAD = ("techniques", "perplexity", "above float %", "processor s")
# Techniques in order, with their settings.
STEPS: dict[str, Sequence[tuple[str, dict[str, Any]]]] = {
    "plain": (),
    "R1": (("rotation", {"r2": False}),),
    "R1 + SmoothQuant": (("rotation", {"r2": False}), ("smoothquant", {})),
    "SmoothQuant": (("smoothquant", {}),),
    "R1 + R2 + SmoothQuant": (("rotation", {}), ("smoothquant", {})),
}


def exported(this: Subject, folder: Path) -> Path:
    """Return the file of a model's graph, with the mask that a grid of 8 bits holds."""
    graph = folder / "float.onnx"
    with quiet():
        torch.onnx.export(
            aimet_ext.prepare_model(this.model, mask_value=-100.0),
            (this.calibration[:1, :8],),
            str(graph),
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_axes={"input_ids": {0: "batch", 1: "seq"}, "logits": {0: "batch", 1: "seq"}},
            dynamo=False,
        )
    return graph


def quantized(
    graph: Path, this: Subject, steps: Sequence[tuple[str, dict[str, Any]]], *, inputs_alone: bool
) -> Any:
    """Return a simulation after some techniques, its activations calibrated."""
    import onnx
    from aimet_onnx import QuantizationSimModel, int8

    model = onnx.load(graph)
    stored = {tensor.name for tensor in model.graph.initializer}
    read = {
        node.input[0]
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in stored
    }
    with quiet():
        sim = QuantizationSimModel(
            model, param_type=int8, activation_type=int8, config_file="default"
        )
    if inputs_alone:
        for name, quantizer in sim.qc_quantize_op_dict.items():
            if name not in stored | read:
                quantizer.enabled = False
    inputs = [{"input_ids": window.numpy()} for window in this.calibration.split(1)]
    for name, settings in steps:
        apply = getattr(aimet_ext, f"apply_{name}")
        apply(sim, *([] if name == "rotation" else [inputs]), progress=False, **settings)
    with quiet():
        sim.compute_encodings(inputs)
    return sim


def main() -> None:
    """Run the steps and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", choices=TEXTS, default="wikitext")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--scored", type=int, default=40)
    parser.add_argument("--inputs", action="store_true")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "neighbours.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    this = read_subject(
        options.model,
        [options.text],
        windows=options.windows,
        length=512,
        scored=options.scored,
    )
    scored = list(this.scored[options.text].split(1))
    exact = aimet_ext.evaluate_perplexity(this.model, scored)
    print(f"float: perplexity {exact:.3f}", flush=True)
    rows: list[Sequence[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        graph = exported(this, Path(folder))
        for name in options.steps:
            started = time.process_time()
            sim = quantized(graph, this, STEPS[name], inputs_alone=options.inputs)
            seconds = time.process_time() - started
            score = aimet_ext.evaluate_perplexity(sim, scored)
            rows.append((name, score, 100 * (score / exact - 1), seconds))
            print(f"  {name}: perplexity {score:.3f}, {seconds:.0f} s", flush=True)
            del sim
    where = "inputs of linear layers" if options.inputs else "all operators"
    title = (
        f"W8A8 per tensor, {where}, {options.model.name}, {options.windows} windows, "
        f"float {exact:.3f}"
    )
    print_table(title, HEAD, rows)
    add_section(
        options.output,
        f"activations, {where}, {options.model.name}",
        {"machine": machine(), "title": title, "rows": named(HEAD, rows)},
    )


if __name__ == "__main__":
    main()
