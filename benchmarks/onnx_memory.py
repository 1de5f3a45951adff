"""Most memory that a technique takes beyond the simulation of a graph with external data.

    python benchmarks/onnx_memory.py seq_mse|gptq|adaround [--windows 32]

prints one JSON line. A process of its own, for the high-water mark is the process's. A small model
goes through everything first, so that libraries loaded late are not counted.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
from layerwise_speed import PER_CHANNEL
from memory import status
from onnx_models import as_inputs, export_llm, llm_sim, weight_names
from random_llama import random_batches, random_llama

import aimet_ext


def through_external_data(model: Any, folder: str) -> Any:
    """The same graph as read from a file whose weights lie beside it."""
    import onnx

    path = pathlib.Path(folder) / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=1024)
    return onnx.load(path)


def apply(technique: str, sim: Any, inputs: list[dict[str, np.ndarray]], candidates: int) -> None:
    settings = {"num_candidates": candidates} if technique == "seq_mse" else {}
    if technique == "adaround":
        settings = {"num_iterations": 20}
    with tempfile.TemporaryDirectory() as folder:
        call = getattr(aimet_ext, f"apply_{technique}")
        call(sim, inputs, progress=False, cache_dir=folder, **settings)


def simulation(options: argparse.Namespace, **size: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        graph = export_llm(random_llama(length=max(512, options.length), **size))
        return llm_sim(through_external_data(graph, folder), PER_CHANNEL)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    small = simulation(options, blocks=1, hidden=64, ffn=128)
    apply(options.technique, small, as_inputs(random_batches(4, 16)), 2)
    del small
    sim = simulation(options, blocks=options.blocks, hidden=options.hidden, ffn=options.ffn)
    inputs = as_inputs(random_batches(options.windows, options.length, batch_size=1))
    sim.session.run(None, inputs[0])
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, started = status("VmRSS"), time.perf_counter()
    apply(options.technique, sim, inputs, options.candidates)
    # At once: protobuf tells a model's size by serializing it.
    peak, seconds = status("VmHWM"), time.perf_counter() - started
    widest = max(options.hidden, options.ffn)
    groups = (2 * options.hidden * options.hidden, 2 * options.hidden * options.ffn)
    return {
        **vars(options),
        "linears": sum("proj" in name for name in weight_names(sim.model.model)) or None,
        "graph": sum(len(each.raw_data) for each in sim.model.model.graph.initializer),
        "group": 4 * max(groups),  # gate and up, which read one input
        "moments": 4 * widest * widest,
        "before": before,
        "over": peak - before,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("technique", choices=("seq_mse", "gptq", "adaround"))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--candidates", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
