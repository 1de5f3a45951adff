"""Does an export take the same time for each block, however deep the model?

    python benchmarks/export_depth.py [--blocks 8 16 32] [--repeats 3] [--only torch onnx]

exports simulations of random llamas of several depths, every tensor quantized, and prints the
median processor time of an export for each block. Processor time, so that other work on the machine
disturbs less; run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from common import quiet
from random_llama import random_batches, random_llama
from report import HERE, add_section, bar, machine, named, print_table

import aimet_ext

TOLERANCE = 0.2
IDS = random_batches(2, 16, 2)[0]


def model(blocks: int) -> Any:
    """Return a narrow llama, ready to be traced."""
    llama = random_llama(blocks=blocks, hidden=64, ffn=128, length=64)
    return aimet_ext.prepare_model(llama, mask_value=-100.0)


def torch_sim(blocks: int) -> tuple[Any, Any]:
    """Return a simulation of the torch model with ranges everywhere, and an input."""
    sim = aimet_ext.create_sim(model(blocks), IDS)
    sim.compute_encodings(lambda module: module(IDS))
    return sim, IDS


def onnx_sim(blocks: int) -> tuple[Any, Any]:
    """Return a simulation of the model's ONNX graph with ranges everywhere, and an input."""
    import onnx
    from aimet_onnx import QuantizationSimModel

    feed = {"input_ids": IDS.numpy()}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/float.onnx"
        torch.onnx.export(
            model(blocks), (IDS,), path, input_names=[*feed], output_names=["logits"], dynamo=False
        )
        graph = onnx.load(path)
    sim = QuantizationSimModel(
        graph, param_type="int4", activation_type="int16", config_file="htp_v81"
    )
    sim.compute_encodings([feed])
    return sim, feed


def seconds(kind: str, blocks: int, repeats: int) -> float:
    """Return the median processor time of an export."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sim, sample = {"torch": torch_sim, "onnx": onnx_sim}[kind](blocks)
        taken = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                started = time.process_time()
                aimet_ext.export(sim, pathlib.Path(folder) / "out", "model", sample)
                taken.append(time.process_time() - started)
    return statistics.median(taken)


def main() -> None:
    """Print the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["torch", "onnx"], choices=["torch", "onnx"])
    parser.add_argument(
        "--output", type=pathlib.Path, default=HERE / "results" / "export_depth.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    head, rows, bars = ["simulation", "blocks", "seconds", "seconds a block"], [], []
    for kind in options.only:
        taken = {n: seconds(kind, n, options.repeats) for n in options.blocks}
        rows += [[kind, n, total, total / n] for n, total in taken.items()]
        each = [total / n for n, total in taken.items()]
        growth = max(each) / min(each) - 1
        bars.append(bar(f"{kind}: seconds a block within {growth:.0%}", growth <= TOLERANCE))
    print_table("Processor time of an export", head, rows)
    result = {"exports": named(head, rows), "bars": bars, "machine": machine("onnx")}
    add_section(options.output, "export_depth", result)


if __name__ == "__main__":
    main()
