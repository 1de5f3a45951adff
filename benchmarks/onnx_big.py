"""A graph of more than 2 GiB, which protobuf cannot serialize, the whole way of a user.

    python benchmarks/onnx_big.py [--blocks 9] [--hidden 2048] [--ffn 8192] [--windows 2]

prints one JSON line: seconds of each step, and the most memory it took beyond what the process held
when it began. Every layer-wise technique walks the whole graph and decides layers of its first and
its last block; the others compute on their grids. Mapped files count, so the folder for temporary
files may be on a disk. A process of its own, for the high-water mark is the process's.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from layerwise_speed import SpeedOptions
from memory import status
from onnx_memory import through_external_data
from onnx_models import as_inputs, export_llm, weight_names
from random_llama import random_batches, random_llama
from report import bar, in_own_process, named, print_table

import aimet_ext

GIB = 2**30


def export(options: argparse.Namespace, folder: str) -> None:
    """Write the graph; gains of norms differ, or the exporter would store them once for all."""
    model = random_llama(blocks=options.blocks, hidden=options.hidden, ffn=options.ffn)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + torch.rand_like(parameter) / 10)
    through_external_data(export_llm(model), folder)


class Way:
    """The steps, each measured."""

    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        self.options, self.folder = options, folder
        self.inputs = as_inputs(random_batches(options.windows, options.length, batch_size=1))
        self.steps: dict[str, dict[str, float]] = {}
        self.sim: Any = None

    def step(self, name: str, call: Callable[[], Any]) -> Any:
        gc.collect()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, started = status("VmRSS"), time.perf_counter()
        found = call()
        self.steps[name] = {
            "seconds": time.perf_counter() - started,
            "before": before,
            "over": status("VmHWM") - before,
        }
        print(name, self.steps[name], file=sys.stderr, flush=True)
        return found

    def build(self) -> None:
        import onnx
        from aimet_onnx import QuantizationSimModel

        settings = {"param_type": "int4", "activation_type": "int16", "config_file": "htp_v81"}
        model = self.step("onnx.load", lambda: onnx.load(self.folder / "model.onnx"))
        self.initializers = sum(len(each.raw_data) for each in model.graph.initializer)
        self.nodes = list(weight_names(model))
        self.sim = self.step("AIMET's sim", lambda: QuantizationSimModel(model, **settings))

    def but(self, *wanted: str) -> list[str]:
        """All layers but those of the first and last block that are named so."""
        ends = [f"layers.{number}/" for number in (0, self.options.blocks - 1)]
        every = [*self.nodes, "/model/model/embed_tokens/Gather"]
        return [
            node
            for node in every
            if not any(end in node for end in ends) or not any(f"/{w}/" in node for w in wanted)
        ]

    def quantize(self) -> None:
        sim, inputs, quiet = self.sim, self.inputs, {"progress": False}
        keep, other = self.but("q_proj", "k_proj", "v_proj", "o_proj"), self.but("o_proj")
        middle = f"*layers.{self.options.blocks // 2}/self_attn/k_proj*"
        with tempfile.TemporaryDirectory() as cache:
            quiet["cache_dir"] = cache
            few = {**quiet, "num_candidates": 2}
            self.step(
                "apply_lpbq", lambda: aimet_ext.apply_lpbq(sim, inputs, 64, layers=[middle], **few)
            )
            self.step(
                "apply_seq_mse",
                lambda: aimet_ext.apply_seq_mse(sim, inputs, modules_to_exclude=keep, **few),
            )
            first = self.but("q_proj", "k_proj", "v_proj")
            self.step(
                "apply_gptq",
                lambda: aimet_ext.apply_gptq(sim, inputs, modules_to_exclude=first, **quiet),
            )
            steps = {**quiet, "num_iterations": 20}
            self.step(
                "apply_adaround",
                lambda: aimet_ext.apply_adaround(sim, inputs, modules_to_exclude=other, **steps),
            )
        self.step("sim.compute_encodings", lambda: sim.compute_encodings(inputs))

    def hand_over(self) -> dict[str, Any]:
        out, first = self.folder / "out", self.inputs[0]
        perplexity = self.step(
            "evaluate_perplexity", lambda: aimet_ext.evaluate_perplexity(self.sim, self.inputs)
        )
        manifest = self.step("export", lambda: aimet_ext.export(self.sim, out, "big", first))
        (expected,) = self.sim.session.run(None, first)
        self.sim = None
        loaded = self.step("load", lambda: aimet_ext.load(out))
        sizes = {path.name: path.stat().st_size for path in out.iterdir()}
        return {
            "perplexity": perplexity,
            "files": sizes,
            "checks": manifest["checks"],
            "same": bool(np.array_equal(loaded.session.run(None, first)[0], expected)),
        }


def go(options: argparse.Namespace, folder: str) -> tuple[Way, dict[str, Any]]:
    way = Way(options, pathlib.Path(folder))
    way.build()
    way.quantize()
    return way, way.hand_over()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:  # so that libraries loaded late do not count
        small = argparse.Namespace(**{**vars(options), "blocks": 4, "hidden": 64, "ffn": 128})
        export(small, folder)
        go(small, folder)
    with tempfile.TemporaryDirectory() as folder:
        # Apart, so that the module's memory does not count.
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--export", folder], check=True)
        way, found = go(options, folder)
    widest = max(options.hidden, options.ffn)
    return {
        **vars(options),
        "graph": way.initializers,
        "group": 4 * 2 * options.hidden * options.ffn,  # gate and up, which read one input
        "moments": 4 * widest * widest,
        "hidden_states": 4 * options.windows * options.length * options.hidden,
        "steps": way.steps,
        **found,
    }


def big(options: SpeedOptions) -> dict[str, Any]:
    """b: a graph of more than 2 GiB from its file to the folder, and back."""
    small = ["--blocks", "4", "--hidden", "64", "--ffn", "128"] if options.quick else []
    got = in_own_process("onnx_big.py", *small)
    head = ("step", "seconds", "held before GiB", "over GiB", "over / graph")
    rows = [
        [name, each["seconds"], *(each[k] / GIB for k in ("before", "over")), each["over"] / whole]
        for name, each in got["steps"].items()
        for whole in (got["graph"],)
    ]
    print_table(f"b. A graph of {got['graph'] / GIB:.2f} GiB", head, rows)
    techniques = [row for row in rows if row[0].startswith("apply_")]
    most = max(row[4] for row in techniques)
    return {
        **got,
        "rows": named(head, rows),
        "bars": [
            bar(f"read back: the same outputs: {got['same']}", got["same"]),
            bar(f"techniques over what was held: {most:.2f} graphs, below 1", most < 1),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--export", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    if options.export:
        export(options, options.export)
    else:
        print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
