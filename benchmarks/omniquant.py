"""OmniQuant beside plain rounding and AIMET's own methods, in one process.

    python benchmarks/omniquant.py [--only b,d] [--quick] [--seeds 3] [--output FILE]

Sections, each alone if need be:

    a  float function after folding random scales, every family, head layout and bias
    b  a trained Llama, W4 per-channel: share of the rounding loss recovered
    c  its multi-head twin, where AIMET's value scale is right
    d  a fifth of the time of AIMET's OmniQuant
    e  3 bits, blockwise, LPBQ and 2 bits on all linears
    f  peak memory with cache_dir, 2, 4 and 8 blocks
    g  the model in the box

b, c, d and e need ``stories260K-hf`` and ``tinystories`` in the folder that ``--assets`` names.
Sections that share runs share them in one process: ``--only b,d`` costs hardly more than ``b``.
Results are added to the output file section by section.
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
from common import (
    AIMET,
    OURS,
    SEQ_MSE,
    SIMPLE,
    Bench,
    Options,
    Run,
    label,
    mean,
    quiet_warnings,
)
from random_families import FAMILIES, change_by_folding, random_model
from report import (
    ASSETS,
    HERE,
    add_section,
    bar,
    in_own_process,
    machine,
    named,
    pairs,
    print_table,
)

from aimet_ext import LPBQ, Blockwise, QSpec

W4, W3 = QSpec(bitwidth=4), QSpec(bitwidth=3)
FAST = ((10, 2), (25, 2))  # steps and sweeps
GRIDS = (
    W3,
    QSpec(bitwidth=3, granularity=Blockwise(32)),
    QSpec(bitwidth=4, granularity=LPBQ(32)),
    QSpec(bitwidth=2, granularity=Blockwise(16)),
)


def float_function(bench: Bench) -> dict[str, Any]:
    """a: max|Δ|/max|logits| of whole models after all scale pairs of all blocks."""
    from aimet_ext.models.proof import BOUNDS

    rows, worst = [], dict.fromkeys(BOUNDS, 0.0)
    for family, changes in FAMILIES:
        for heads, kv_heads in (("multi-head", 4), ("grouped", 2), ("multi-query", 1)):
            model = random_model(family, num_key_value_heads=kv_heads, **changes)
            change = {dtype: change_by_folding(model, dtype) for dtype in BOUNDS}
            biases = any(name.endswith("bias") for name, _ in model.named_parameters())
            rows.append([family, heads, biases, *change.values()])
            worst = {dtype: max(worst[dtype], change[dtype]) for dtype in BOUNDS}
    rows.append(["largest of all", "", None, *worst.values()])
    bounds = [f"{bound:.0e}" for bound in BOUNDS.values()]
    rows.append(["bar", "", None, *bounds])
    head = ("family", "heads", "biases", "float64", "float32")
    print_table("a. Change of the float function by random scales in [1/4, 4]", head, rows)
    reached = all(worst[dtype] <= bound for dtype, bound in BOUNDS.items())
    return {"rows": named(head, rows[:-1]), "bars": [bar("float function unchanged", reached)]}


def recovered(bench: Bench) -> dict[str, Any]:
    """b: W4 per-channel on the trained Llama."""
    runs = bench.compare("stories260K", W4, (SIMPLE, SEQ_MSE, AIMET))
    result = _table(bench, "b. stories260K, W4 per-channel, block linears", "stories260K", runs)
    share = _share(bench, "stories260K", runs[OURS], runs[SIMPLE])
    result["bars"] = [bar(f"recovered {share:.1%}, at least 45 %", share >= 0.45)]
    return result


def twin(bench: Bench) -> dict[str, Any]:
    """c: the same with key-value heads repeated."""
    ids = bench.subject("twin").scored[:2]
    with torch.no_grad():
        ours, theirs = (bench.subject(name).model(ids).logits for name in ("twin", "stories260K"))
    same = float((ours - theirs).abs().max() / theirs.abs().max())
    runs = bench.compare("twin", W4, (SIMPLE, AIMET))
    result = _table(bench, "c. Multi-head twin, W4 per-channel", "twin", runs)
    print(f"logits of the twin differ by {same:.1e} of the largest")
    better = _perplexity(runs[OURS]) < _perplexity(runs[AIMET])
    result["logits_differ"] = same
    result["bars"] = [
        bar("the twin computes the same", same < 1e-5),
        bar("below AIMET's OmniQuant", better),
    ]
    return result


def fast(bench: Bench) -> dict[str, Any]:
    """d: fewer steps, within a fifth of the time of AIMET's OmniQuant."""
    name = "stories260K"
    seconds = bench.run(name, W4, AIMET).seconds
    goal = bench.run(name, W4, SEQ_MSE)
    rows: list[list[Any]] = [[SEQ_MSE, None, goal.perplexity, goal.seconds, None]]
    reached = False
    for steps, sweeps in ((1, 1),) if bench.options.quick else FAST:
        runs = bench.seeds(name, W4, steps=steps, search_sweeps=sweeps)
        perplexity, mine = _perplexity(runs), mean([run.seconds for run in runs])
        rows.append([f"{OURS}, {sweeps} sweeps", steps, perplexity, mine, mine / seconds])
        reached |= perplexity < goal.perplexity and mine <= seconds / 5
    rows.append([AIMET, bench.options.aimet_steps, bench.run(name, W4, AIMET).perplexity, seconds])
    rows[-1].append(1.0)
    head = ("method", "steps", "perplexity", "seconds", "of AIMET OmniQuant's time")
    print_table("d. Within a fifth of the time, stories260K, W4 per-channel", head, rows)
    reached_bar = bar("a row of ours within a fifth of the time and below AIMET's SeqMSE", reached)
    return {"rows": named(head, rows), "bars": [reached_bar]}


def other_grids(bench: Bench) -> dict[str, Any]:
    """e: harder grids, all linears, the MLP padded where a block does not divide it."""
    result: dict[str, Any] = {"rows": [], "bars": []}
    for spec in GRIDS:
        others = (SIMPLE, SEQ_MSE, AIMET) if spec == W3 else (SIMPLE, SEQ_MSE)
        runs = bench.compare("stories260K", spec, others)
        table = _table(bench, f"e. stories260K, {label(spec)}", "stories260K", runs)
        result["rows"] += [{"grid": label(spec), **row} for row in table["rows"]]
        mine, other = runs[OURS][0].extra, _perplexity(runs[SEQ_MSE])
        print(f"{mine['on_grid']} of {mine['linears']} linears have the grid")
        kept = all(run.extra["grid_kept"] for run in runs[OURS])
        result["bars"] += [
            bar(f"{label(spec)}: below AIMET's SeqMSE", _perplexity(runs[OURS]) < other),
            bar(f"{label(spec)}: every linear has it", mine["on_grid"] == mine["linears"]),
            bar(f"{label(spec)}: the grid is what it was", kept),
        ]
    return result


def memory(bench: Bench) -> dict[str, Any]:
    """f: resident memory over the simulation, a process for each size."""
    sizes, arguments = (2, 4, 8), []
    if bench.options.quick:
        sizes, arguments = (1, 2), ["--windows", "8", "--steps", "1"]
    rows, first = [], 0
    head = ("blocks", "cache", "model MiB", "before MiB", "over MiB", "growth", "hidden MiB", "s")
    for blocks, cache in [*((size, True) for size in sizes), (sizes[-1], False)]:
        ram = [] if cache else ["--no-cache"]
        got = in_own_process("memory.py", str(blocks), *arguments, *ram)
        first = first or got["over_bytes"]
        growth = got["over_bytes"] / first - 1
        sizes_mib = [
            round(got[f"{what}_bytes"] / 2**20, 1)
            for what in ("model", "before", "over", "hidden_states")
        ]
        rows.append(
            [
                str(blocks),
                "disk" if cache else "RAM",
                *sizes_mib[:3],
                f"{growth:+.1%}",
                sizes_mib[3],
                got["seconds"],
            ]
        )
    print_table("f. Peak memory over the simulation", head, rows)
    growths = [float(row[5].rstrip("%")) for row in rows if row[1] == "disk"]
    return {
        "rows": named(head, rows),
        "bars": [bar(f"grows by {max(growths):.1f} %, at most 5 %", max(growths) <= 5)],
    }


def box(bench: Bench) -> dict[str, Any]:
    """g: the model that comes with the package."""
    result: dict[str, Any] = {"rows": [], "bars": []}
    for spec in (W4, W3):
        runs = bench.compare("box", spec, (SIMPLE, SEQ_MSE, AIMET))
        table = _table(bench, f"g. The model in the box, {label(spec)}", "box", runs)
        result["rows"] += [{"grid": label(spec), **row} for row in table["rows"]]
        for method in (SEQ_MSE, AIMET):
            better = _perplexity(runs[OURS]) < _perplexity(runs[method])
            result["bars"].append(bar(f"{label(spec)}: below {method}", better))
    return result


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "a": float_function,
    "b": recovered,
    "c": twin,
    "d": fast,
    "e": other_grids,
    "f": memory,
    "g": box,
}
NEED_ASSETS = "bcde"


def _table(bench: Bench, title: str, name: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Perplexities of all methods with the share of the rounding loss that each recovers."""
    scored, headline = bench.float_perplexity(name)
    slowest = mean([run.seconds for run in runs[AIMET]]) if AIMET in runs else None
    rows: list[list[Any]] = [["float", None, scored, headline, None, None, None, None]]
    for method, group in runs.items():
        seconds = None if method == SIMPLE else mean([run.seconds for run in group])
        rows.append(
            [
                method,
                len(group),
                _perplexity(group),
                mean([run.headline for run in group]),
                _share(bench, name, group, runs[SIMPLE]),
                seconds,
                seconds / slowest if seconds and slowest else None,
                group[0].extra.get("float_change"),
            ]
        )
    windows = len(bench.subject(name).scored)
    all_windows = len(bench.subject(name).everything)
    head = (
        "method",
        "runs",
        f"{windows} windows",
        f"{all_windows} windows",
        "recovered",
        "seconds",
        "of AIMET",
        "float changed by",
    )
    print_table(title, head, rows)
    for group in runs.values():
        if len(group) > 1:
            each = ", ".join(f"{run.perplexity:.4f} ({run.seconds:.0f} s)" for run in group)
            print(f"{group[0].method}, seed by seed: {each}")
    raw = [{**vars(run)} for group in runs.values() for run in group]
    return {"rows": named(head, rows), "runs": raw}


def _share(bench: Bench, name: str, runs: list[Run], plain: list[Run]) -> float:
    loss = _perplexity(plain) - bench.float_perplexity(name)[0]
    return (_perplexity(plain) - _perplexity(runs)) / loss


def _perplexity(runs: list[Run]) -> float:
    return mean([run.perplexity for run in runs])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, for example b,d")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps and windows: a smoke test"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800, help="of ours, for each block")
    parser.add_argument("--aimet-steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a step of ours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=JSON", help="fields of OmniQuantParams"
    )
    parser.add_argument("--output", type=Path, help="default: results/omniquant.json beside this")
    return parser.parse_args()


def main() -> int:
    """Run the sections asked for; 1 if a bar was missed."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    quick = {"seeds": 1, "steps": 4, "aimet_steps": 4, "candidates": 3} if arguments.quick else {}
    given = {
        "seeds": arguments.seeds,
        "steps": arguments.steps,
        "aimet_steps": arguments.aimet_steps,
        "batch_size": arguments.batch_size,
        "changes": {key: json.loads(value) for key, value in pairs(arguments.set)},
    }
    options = Options(assets=arguments.assets, quick=arguments.quick, **{**given, **quick})
    bench, made_on = Bench(options), machine()
    print(", ".join(f"{name} {value}" for name, value in made_on.items()))
    output = arguments.output
    if output is None and not arguments.quick:
        output = HERE / "results" / "omniquant.json"
    missed = 0
    for key in arguments.only.split(","):
        if key in NEED_ASSETS and not options.assets.is_dir():
            print(f"\n{key}. skipped: {options.assets} is absent")
            continue
        started = time.perf_counter()
        with quiet_warnings():
            result = SECTIONS[key](bench)
        print(f"section {key}: {time.perf_counter() - started:.0f} s", flush=True)
        missed += sum(not each["reached"] for each in result["bars"])
        if output is not None:
            settings = {name: value for name, value in vars(options).items() if name != "assets"}
            add_section(output, key, {"machine": made_on, "settings": settings, **result})
    return 1 if missed and not arguments.quick else 0


if __name__ == "__main__":
    sys.exit(main())
