"""SeqMSE, AdaRound and GPTQ from second moments beside AIMET's own, in one process and in turns.

    python benchmarks/layerwise.py [--only a16,d] [--quick] [--output FILE]

Sections, each alone if need be; ``--only a`` is all that start with an a:

    a16 a64          SeqMSE in compatible mode, seconds: random Llama, 512 wide, 8 blocks,
                     per channel, 16 and 64 × 256 tokens
    a16lpbq a64lpbq  the same with LPBQ, blocks of 64
    adepth           2, 4, 8 and 16 blocks, 16 × 256 tokens
    acheck           that compatible mode chooses what AIMET chooses, on a trained model
    b                peak memory, a process each
    ctime            AdaRound, 512 wide, 2 blocks; AIMET's 15,000 steps are extrapolated from two
                     short runs
    cquality         AdaRound on two blocks of a trained model, AIMET's with --aimet-adaround-steps
    d e              all stacks of techniques on a trained Llama, 4 and 3 bits
    f                ResNet-20
    g                second moments beside one matrix product of their size
    h                GPTQ, AdaRound and AutoRound on the same Llama at 4, 3 and 2 bits

Seconds are those of the processor, one thread on both sides: another process on the machine
disturbs them less than the clock's.

acheck, cquality, d, e, f and h need the folders of ``--assets``. A section with AIMET in it takes
minutes, cquality and f half an hour and more with AIMET's default steps. Results are added to the
output file section by section.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Options, quiet_warnings
from layerwise_quality import (
    LayerBench,
    adaround_quality,
    compatible,
    resnet,
    roundings,
    stacks_at_3_bits,
    stacks_at_4_bits,
)
from layerwise_speed import (
    BLOCKS_OF_64,
    PER_CHANNEL,
    SpeedOptions,
    adaround_time,
    memory,
    seq_mse_cell,
    seq_mse_depths,
)
from methods import AIMET_ADAROUND_STEPS, STACKS, Effort
from report import ASSETS, HERE, add_section, bar, machine, pairs, print_table

NEED_ASSETS = ("acheck", "cquality", "d", "e", "f", "h")
Section = Callable[[], dict[str, Any]]


def second_moments(quick: bool) -> dict[str, Any]:
    """g: gathering them against one matrix product."""
    from moments import second_moment_cost

    cost = second_moment_cost(256, 1000, 1) if quick else second_moment_cost()
    print_table(
        "g. Second moments beside one product of their size", list(cost), [[*cost.values()]]
    )
    ratio = cost["ratio"]
    return {"rows": [cost], "bars": [bar(f"{ratio:.2f} times, at most 1.3", ratio <= 1.3)]}


def sections(bench: LayerBench, speed: SpeedOptions) -> dict[str, Section]:
    """Every section by its key."""
    return {
        "a16": seq_mse_cell(speed, 16, PER_CHANNEL, 8),
        "a64": seq_mse_cell(speed, 64, PER_CHANNEL, 14),
        "a16lpbq": seq_mse_cell(speed, 16, BLOCKS_OF_64, 20),
        "a64lpbq": seq_mse_cell(speed, 64, BLOCKS_OF_64, 40),
        "adepth": lambda: seq_mse_depths(speed),
        "acheck": lambda: compatible(bench),
        "b": lambda: memory(speed),
        "ctime": lambda: adaround_time(speed),
        "cquality": lambda: adaround_quality(bench),
        "d": lambda: stacks_at_4_bits(bench),
        "e": lambda: stacks_at_3_bits(bench),
        "f": lambda: resnet(bench),
        "g": lambda: second_moments(speed.quick),
        "h": lambda: roundings(bench),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="sections, for example a16,d")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test")
    parser.add_argument("--repeats", type=int, default=3, help="of ours in a")
    parser.add_argument("--aimet-repeats", type=int, default=1, help="of AIMET in a and ctime")
    parser.add_argument("--depths", default="2,4,8,16", help="of adepth")
    parser.add_argument("--candidates", type=int, default=20, help="of SeqMSE, both sides")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a batch of ours")
    parser.add_argument("--steps", type=int, default=0, help="of our AdaRound; 0: its default")
    parser.add_argument("--aimet-adaround-steps", type=int, default=AIMET_ADAROUND_STEPS)
    parser.add_argument("--aimet-scheme", default=Effort.aimet_scheme, help="or min_max")
    parser.add_argument("--short-steps", default="20,60", help="of ctime's two short runs")
    parser.add_argument("--adaround-windows", type=int, default=64, help="of ctime")
    parser.add_argument("--draws", type=int, default=3, help="of f")
    parser.add_argument("--aimet-draws", type=int, help="of f for AIMET's AdaRound; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="TECHNIQUE.SETTING=JSON",
        help="settings of ours wherever the technique is used, for example gptq.act_order=true",
    )
    parser.add_argument("--output", type=Path, help="default: results/layerwise.json beside this")
    return parser.parse_args()


def _changes(texts: list[str]) -> dict[str, dict[str, Any]]:
    techniques = {technique for stack in STACKS.values() for technique, _ in stack}
    changes: dict[str, dict[str, Any]] = {}
    for key, value in pairs(texts):
        technique, _, setting = key.partition(".")
        if technique not in techniques or not setting:
            raise SystemExit(
                f"--set takes TECHNIQUE.SETTING=JSON, a technique of {sorted(techniques)}, "
                f"got {key!r}"
            )
        changes.setdefault(technique, {})[setting] = json.loads(value)
    return changes


def _options(arguments: argparse.Namespace) -> tuple[LayerBench, SpeedOptions]:
    quick = arguments.quick
    effort = Effort(
        candidates=3 if quick else arguments.candidates,
        steps=2 if quick else arguments.steps,
        aimet_steps=2 if quick else arguments.aimet_adaround_steps,
        aimet_scheme=arguments.aimet_scheme,
        changes=_changes(arguments.set),
    )
    few, more = (int(text) for text in arguments.short_steps.split(","))
    speed = SpeedOptions(
        effort=effort,
        aimet_repeats=1 if quick else arguments.aimet_repeats,
        repeats=1 if quick else arguments.repeats,
        depths=(1, 2) if quick else [int(text) for text in arguments.depths.split(",")],
        adaround_windows=arguments.adaround_windows,
        short_steps=(1, 3) if quick else (few, more),
        quick=quick,
    )
    options = Options(
        assets=arguments.assets,
        candidates=effort.candidates,
        batch_size=arguments.batch_size,
        quick=quick,
    )
    draws = 1 if quick else arguments.draws
    return LayerBench(options, effort, draws, min(arguments.aimet_draws or draws, draws)), speed


def main() -> int:
    """Run the sections asked for; 1 if a bar was missed."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    bench, speed = _options(arguments)
    table = sections(bench, speed)
    asked = arguments.only.split(",")
    keys = [
        key
        for key in table
        if any(key == start or (start not in table and key.startswith(start)) for start in asked)
    ]
    if not keys:
        raise SystemExit(f"--only takes some of {', '.join(table)}, got {arguments.only!r}")
    made_on = machine()
    print(", ".join(f"{name} {value}" for name, value in made_on.items()))
    output = arguments.output
    if output is None and not arguments.quick:
        output = HERE / "results" / "layerwise.json"
    missed = 0
    for key in keys:
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


if __name__ == "__main__":
    sys.exit(main())
