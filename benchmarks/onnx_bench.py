"""The command line of ``onnx.py``, which says what is measured."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_big
import onnx_olive
import onnx_pairs
import onnx_quality
import onnx_speed
import torch
from common import Options, quiet_warnings
from layerwise_speed import SpeedOptions
from methods import Effort
from onnx_methods import AIMET_ONNX_STEPS
from report import ASSETS, HERE, add_section, machine

NEED_ASSETS = ("graphs", "contract", "omniquant", "w3", "aquality")
Section = Callable[[], dict[str, Any]]


def _arguments(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="sections, for example graphs,stime")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test")
    parser.add_argument("--repeats", type=int, default=3, help="of ours in stime")
    parser.add_argument("--aimet-repeats", type=int, default=1, help="of AIMET in stime, atime")
    parser.add_argument("--candidates", type=int, default=20, help="of SeqMSE, both sides")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a batch")
    parser.add_argument("--steps", type=int, default=800, help="of OmniQuant, a block")
    parser.add_argument("--aimet-adaround-steps", type=int, default=AIMET_ONNX_STEPS)
    parser.add_argument("--short-steps", default="10,30", help="of atime's two short runs")
    parser.add_argument("--adaround-windows", type=int, default=16, help="of atime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--output", type=Path, help="default: results/onnx.json beside this")
    return parser.parse_args()


def _sections(arguments: argparse.Namespace) -> dict[str, Section]:
    quick = arguments.quick
    effort = Effort(
        candidates=3 if quick else arguments.candidates,
        steps=2 if quick else 0,
        aimet_steps=2 if quick else arguments.aimet_adaround_steps,
    )
    few, more = (int(text) for text in arguments.short_steps.split(","))
    speed = SpeedOptions(
        effort=effort,
        aimet_repeats=1 if quick else arguments.aimet_repeats,
        repeats=1 if quick else arguments.repeats,
        adaround_windows=arguments.adaround_windows,
        short_steps=(1, 3) if quick else (few, more),
        quick=quick,
    )
    options = Options(
        assets=arguments.assets,
        steps=2 if quick else arguments.steps,
        candidates=effort.candidates,
        batch_size=arguments.batch_size,
        quick=quick,
    )
    bench = onnx_pairs.OnnxBench(options, effort)
    return {
        "graphs": lambda: onnx_pairs.graphs(bench),
        "contract": lambda: onnx_pairs.contract(bench),
        "omniquant": lambda: onnx_pairs.omniquant(bench),
        "w3": lambda: onnx_quality.three_bits(bench),
        "stime": lambda: onnx_speed.seq_mse_time(speed, 64),
        "stime16": lambda: onnx_speed.seq_mse_time(speed, 16),
        "atime": lambda: onnx_speed.adaround_time(speed),
        "aquality": lambda: onnx_quality.adaround(bench),
        "olive": lambda: onnx_olive.examples(quick),
        "memory": lambda: onnx_speed.memory(speed),
        "big": lambda: onnx_big.big(speed),
    }


def main(text: str) -> int:
    """Run the sections asked for; 1 if a bar was missed."""
    arguments = _arguments(text)
    torch.set_num_threads(arguments.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    table = _sections(arguments)
    asked = [key for key in arguments.only.split(",") if key]
    if unknown := set(asked) - set(table):
        raise SystemExit(f"--only takes some of {', '.join(table)}, got {sorted(unknown)}")
    made_on = machine("aimet-onnx", "onnx", "onnxruntime", "olive-ai")
    print(", ".join(f"{name} {value}" for name, value in made_on.items()))
    output = arguments.output
    if output is None and not arguments.quick:
        output = HERE / "results" / "onnx.json"
    missed = 0
    for key in asked or table:
        if key in NEED_ASSETS and not arguments.assets.is_dir():
            print(f"\n{key}. skipped: {arguments.assets} is absent")
            continue
        started = time.perf_counter()
        with quiet_warnings():
            result = table[key]()
        print(f"section {key}: {time.perf_counter() - started:.0f} s", flush=True)
        missed += sum(not each["reached"] for each in result["bars"])
        if output is not None:
            away = ("assets", "output", "only")
            settings = {name: value for name, value in vars(arguments).items() if name not in away}
            add_section(output, key, {"machine": made_on, "settings": settings, **result})
    return 1 if missed and not arguments.quick else 0
