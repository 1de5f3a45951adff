"""Does an export take the same time for each block, however deep the model?

    python benchmarks/export_depth.py [--blocks 8 16 32] [--repeats 3] [--only torch onnx]

exports simulations of random llamas of several depths, every tensor quantized, and prints the
median processor time of an export for each block, with and without the time in the ONNX exporter
of aimet_torch. Processor time, so that other work on the machine disturbs less; run it with
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

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


@contextlib.contextmanager
def timed_exporter() -> Iterator[list[float]]:
    """Yield a list that collects the processor time of each call of aimet_torch's exporter."""
    from aimet_torch.quantsim.quantsim import QuantizationSimModelOnnxExporter as Exporter

    taken: list[float] = []
    original = Exporter.export

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return original(self, *args, **kwargs)
        finally:
            taken.append(time.process_time() - started)

    with mock.patch.object(Exporter, "export", timed):
        yield taken


def seconds(kind: str, blocks: int, repeats: int) -> tuple[float, float]:
    """Return the median processor time of an export, and of its part outside AIMET's exporter."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sim, sample = {"torch": torch_sim, "onnx": onnx_sim}[kind](blocks)
        taken, rest = [], []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder, timed_exporter() as inside:
                started = time.process_time()
                aimet_ext.export(sim, pathlib.Path(folder) / "out", "model", sample)
                taken.append(time.process_time() - started)
                rest.append(taken[-1] - sum(inside))
    return statistics.median(taken), statistics.median(rest)


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
    head = ["simulation", "blocks", "seconds", "seconds a block", "without AIMET's exporter"]
    rows, bars = [], []
    for kind in options.only:
        taken = {n: seconds(kind, n, options.repeats) for n in options.blocks}
        rows += [[kind, n, total, total / n, rest / n] for n, (total, rest) in taken.items()]
        for part, place in (("", 0), (" without AIMET's exporter", 1)):
            each = [times[place] / n for n, times in taken.items()]
            growth = max(each) / min(each) - 1
            text = f"{kind}{part}: seconds a block within {growth:.0%}"
            bars.append(bar(text, growth <= TOLERANCE))
    print_table("Processor time of an export", head, rows)
    result = {"exports": named(head, rows), "bars": bars, "machine": machine("onnx")}
    add_section(options.output, "export_depth", result)


if __name__ == "__main__":
    main()
