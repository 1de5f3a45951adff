"""Exports checked on the simulator of Qualcomm's HTP, planted faults, and LoRA adapters.

    python benchmarks/edge.py [--only htp,faults] [--quick] [--output FILE]

Sections, each alone if need be:

    htp         Llama, Qwen2 with biases, Qwen3 (random weights, 4 blocks) and stories260K with its
                MLP padded: 4-bit LPBQ weights, 16-bit activations, every node on the HTP, its
                logits against the simulation's
    perplexity  stories260K on the HTP against the simulation, on more windows
    faults      faults planted into exports, each kind at 20 places, and 20 clean exports
    adapters    base and adapter against transformed base and folded adapter, in float64
    lora        a trained LoRA adapter of 8 bits on a base of 4 bits

htp and perplexity need onnxruntime-qnn; stories260K and lora the folders of ``--assets``. Results
are added to the output file section by section.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import quiet_warnings
from edge_models import MODELS, export_model, held_out
from report import ASSETS, HERE, add_section, bar, in_own_process, machine, named, print_table

import aimet_ext

HEAD = (
    "model",
    "target",
    "nodes elsewhere",
    "ONNX sim against sim dB",
    "HTP against sim dB",
    "sim against float dB",
    "top-1",
    "weakest layer dB",
    "seconds",
    "passed",
)
Section = Callable[[], dict[str, Any]]


def on_htp(arguments: argparse.Namespace) -> dict[str, Any]:
    """h: every family on the HTP."""
    rows, bars = [], []
    for name in MODELS:
        if name == "stories260K" and not arguments.assets.is_dir():
            print(f"  {name}: skipped, {arguments.assets} is absent")
            continue
        report, seconds = _verify(arguments, name, windows=1 if arguments.quick else 8)
        measures = report.measures
        weakest = min((layer.sqnr_db for layer in report.layers), default=None)
        figures = (
            len(report.fallbacks),
            measures.same_numbers_db,
            measures.device_sim_db,
            measures.sim_float_db,
            measures.top1,
            weakest,
        )
        rows.append([name, report.target, *figures, seconds, report.passed])
        print(f"  {rows[-1]}", flush=True)
        for finding in report.findings:
            print(f"    {finding}")
        away, _, device, lost, top1, _ = figures
        bars.append(bar(f"{name}: {away} nodes elsewhere", away == 0))
        enough = device is not None and lost is not None and device >= lost + 15
        bars.append(bar(f"{name}: {device} dB, the sim {lost} dB from float, 15 above", enough))
        bars.append(bar(f"{name}: top-1 {top1}, 0.99", top1 is not None and top1 >= 0.99))
    print_table("h. On the HTP against the simulation", HEAD, rows)
    return {"rows": named(HEAD, rows), "bars": bars}


def perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    """p: stories260K, on windows that were not calibrated on."""
    report, _ = _verify(arguments, "stories260K", windows=2 if arguments.quick else 16)
    measures = report.measures
    head = ("float", "sim", "HTP")
    device, sim = measures.perplexity_device, measures.perplexity_sim
    rows = [[measures.perplexity_float, sim, device]]
    print_table("p. Perplexity of stories260K", head, rows)
    if device is None or sim is None:
        return {"rows": named(head, rows), "bars": [bar(f"no figures: {report}", False)]}
    apart = device / sim - 1
    bars = [bar(f"{apart:+.4%} from the simulation's, within 0.5 %", abs(apart) <= 0.005)]
    return {"rows": named(head, rows), "bars": bars}


def _verify(arguments: argparse.Namespace, name: str, windows: int) -> tuple[Any, float]:
    """The report on a fresh export of a model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "exported"
        model, data = export_model(name, folder, arguments.assets, quick=arguments.quick)
        compared = held_out(name, arguments.assets, windows)
        started = time.perf_counter()
        report = aimet_ext.verify(
            folder,
            [*compared, *data],
            target=arguments.target,
            windows=windows,
            reference=model,
        )
    if report.backend != "HTP simulation" and not report.findings:
        raise SystemExit(f"the sections htp and perplexity need the HTP, got {report.backend}")
    return report, time.perf_counter() - started


def _script(name: str, key: str, *options: str) -> dict[str, Any]:
    """What a script of this folder measures, as it wrote it."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "results.json"
        command = [sys.executable, str(HERE / name), *options]
        if "--quick" not in options:
            command += ["--output", str(output)]
        done = subprocess.run(command, check=False)
        if not output.exists():
            return {"bars": [bar(f"{name} ran: {done.returncode}", done.returncode == 0)]}
        return json.loads(output.read_text(encoding="utf-8"))[key]


def _process(name: str, *options: str) -> dict[str, Any]:
    """What a script of this folder prints as its last line."""
    result = in_own_process(name, *options)
    for each in result["bars"]:
        bar(each["bar"], each["reached"])
    return result


def _sections(arguments: argparse.Namespace) -> dict[str, Section]:
    quick = ["--quick"] if arguments.quick else []
    assets = ["--assets", str(arguments.assets)]
    return {
        "htp": lambda: on_htp(arguments),
        "perplexity": lambda: perplexity(arguments),
        "faults": lambda: _script("planted_faults.py", "planted_faults", *quick),
        "adapters": lambda: _process("lora_equivalence.py", *quick),
        "lora": lambda: _script("lora_quality.py", "lora_quality", *assets, *quick),
    }


def main() -> int:
    """Run the sections asked for; 1 if a bar was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="sections, for example htp,faults")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test")
    parser.add_argument("--target", default="htp_v75", help="architecture of the HTP")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--output", type=Path, help="default: results/edge.json beside this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = _sections(arguments)
    asked = [key for key in arguments.only.split(",") if key]
    if unknown := set(asked) - set(table):
        raise SystemExit(f"--only takes some of {', '.join(table)}, got {sorted(unknown)}")
    made_on = machine("aimet-onnx", "onnx", "onnxruntime", "peft")
    output = arguments.output
    if output is None and not arguments.quick:
        output = HERE / "results" / "edge.json"
    missed = 0
    for key in asked or table:
        if key in ("perplexity", "lora") and not arguments.assets.is_dir():
            print(f"\n{key}. skipped: {arguments.assets} is absent")
            continue
        started = time.perf_counter()
        with quiet_warnings():
            result = table[key]()
        print(f"section {key}: {time.perf_counter() - started:.0f} s", flush=True)
        missed += sum(not each["reached"] for each in result["bars"])
        if output is not None:
            settings = {"quick": arguments.quick, "target": arguments.target}
            add_section(output, key, {"machine": made_on, "settings": settings, **result})
    return 1 if missed and not arguments.quick else 0


if __name__ == "__main__":
    sys.exit(main())
