"""Seconds and memory of the layer-wise techniques on random models, AIMET's in turns with ours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import SEQ_MSE
from methods import ADAROUND, AIMET_ADAROUND_STEPS, COMPATIBLE, Effort, apply_method
from random_llama import random_batches, random_llama, weights_only_sim
from report import bar, in_own_process, named, print_table

import aimet_ext
from aimet_ext import LPBQ, QSpec
from aimet_ext.sim.protocol import adapt

LENGTH = 256
PER_CHANNEL, BLOCKS_OF_64 = QSpec(bitwidth=4), QSpec(bitwidth=4, granularity=LPBQ(64))
SPEED_HEAD = (
    "blocks",
    "grid",
    "tokens",
    "AIMET s",
    "ours s",
    "times faster",
    "runs AIMET / ours",
    "same winner",
)


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """What the command line says."""

    effort: Effort
    aimet_repeats: int = 1
    repeats: int = 3
    depths: Sequence[int] = (2, 4, 8, 16)
    adaround_windows: int = 64
    short_steps: tuple[int, int] = (20, 60)
    quick: bool = False


def seq_mse_cell(
    options: SpeedOptions, windows: int, spec: QSpec, least: float
) -> Callable[[], dict[str, Any]]:
    """a: one size and grid, 8 blocks, 512 wide."""

    def run() -> dict[str, Any]:
        row = _seq_mse_row(options, windows, spec, blocks=8)
        print_table("a. SeqMSE compatible against AIMET", SPEED_HEAD, [row])
        reached = bar(f"{row[5]:.1f} times faster, at least {least:.0f}", row[5] >= least)
        return {"rows": named(SPEED_HEAD, [row]), "bars": [reached]}

    return run


def seq_mse_depths(options: SpeedOptions) -> dict[str, Any]:
    """a: theirs grows with the square of the depth, ours linearly."""
    rows = []
    for blocks in options.depths:
        rows.append(_seq_mse_row(options, 16, PER_CHANNEL, blocks=blocks))
        print(f"  {blocks} blocks: AIMET {rows[-1][3]:.1f} s, ours {rows[-1][4]:.1f} s", flush=True)
    print_table("a. SeqMSE compatible against AIMET by depth", SPEED_HEAD, rows)
    first, last = rows[0], rows[-1]
    growth = [last[side] / last[0] / (first[side] / first[0]) for side in (3, 4)]
    text = "seconds a block, deepest over shallowest: AIMET {:.2f}, ours {:.2f}, at most 1.25"
    reached = bar(text.format(*growth), growth[1] <= 1.25)
    return {"rows": named(SPEED_HEAD, rows), "growth_a_block": growth, "bars": [reached]}


def memory(options: SpeedOptions) -> dict[str, Any]:
    """b: a process for each; with 2 candidates on both sides, for more change only the time."""
    size = ["--candidates", "2"]
    windows = 64
    if options.quick:
        windows, size = 8, [*size, "--hidden", "64", "--ffn", "128", "--length", "64"]
    runs = (
        ("aimet", windows, False),
        ("compatible", windows, False),
        ("best", windows, False),
        ("best", windows, True),
        ("best", 2 * windows, True),
    )
    rows = []
    head = ("side", "cache", "windows", "over MiB", "of AIMET", "hidden MiB", "seconds")
    for side, count, cache in runs:
        arguments = [side, "--windows", str(count), *size, *(["--cache"] if cache else [])]
        got = in_own_process("layerwise_memory.py", *arguments)
        over, hidden = (round(got[f"{key}_bytes"] / 2**20, 1) for key in ("over", "hidden_states"))
        name = "AIMET SeqMSE" if side == "aimet" else f"ours {side}"
        share = over / rows[0][3] if rows else 1.0
        row = [name, "disk" if cache else "RAM", count, over, share, hidden, got["seconds"]]
        rows.append(row)
        print(
            f"  {name}, {row[1]}, {count} windows: {over} MiB, {got['seconds']:.0f} s", flush=True
        )
    print_table("b. Peak memory over the simulation, 2 blocks", head, rows)
    growth = rows[4][3] / rows[3][3] - 1
    most = max(row[4] for row in rows[1:4])
    bars = [
        bar(f"{most:.2f} of AIMET's at most, bar 0.25", most <= 0.25),
        bar(f"twice the tokens with cache_dir: {growth:+.1%}, below 5 %", growth < 0.05),
    ]
    return {"rows": named(head, rows), "bars": bars}


def adaround_time(options: SpeedOptions) -> dict[str, Any]:
    """c: ours in full; AIMET's 15,000 steps extrapolated from two short runs, and said so."""
    size = {"hidden": 64, "ffn": 128} if options.quick else {"hidden": 512, "ffn": 1408}
    model = aimet_ext.prepare_model(random_llama(blocks=2, **size))
    windows = 8 if options.quick else options.adaround_windows
    batches = random_batches(windows, 32 if options.quick else LENGTH)
    ours = "ours: adaround"
    for method in (ADAROUND, ours):  # neither side is timed cold
        effort = replace(options.effort, aimet_steps=1, steps=1)
        apply_method(method, weights_only_sim(model), model, batches[:1], effort)

    def seconds(method: str, steps: int = 0) -> float:
        sim = weights_only_sim(model)
        effort = replace(options.effort, aimet_steps=steps)
        started = time.process_time()
        apply_method(method, sim, model, batches, effort)
        return time.process_time() - started

    few, more = options.short_steps
    rounds = [
        (seconds(ADAROUND, few), seconds(ours), seconds(ADAROUND, more))
        for _ in range(options.aimet_repeats)
    ]
    of_few, of_ours, of_more = (statistics.median(each) for each in zip(*rounds, strict=True))
    step = (of_more - of_few) / (more - few)
    whole = of_few + step * (AIMET_ADAROUND_STEPS - few)
    head = ("side", "steps a layer", "seconds", "how")
    rows = [
        [ADAROUND, few, of_few, "measured"],
        [ADAROUND, more, of_more, "measured"],
        [ADAROUND, AIMET_ADAROUND_STEPS, whole, f"EXTRAPOLATED, {step:.3f} s a step of 14 layers"],
        [ours, options.effort.steps or "default", of_ours, "measured"],
    ]
    tokens = sum(batch.numel() for batch in batches)
    print_table(f"c. AdaRound, 2 blocks {size['hidden']} wide, {tokens} tokens", head, rows)
    faster = whole / of_ours
    reached = bar(f"{faster:.0f} times faster (AIMET's extrapolated), at least 50", faster >= 50)
    return {
        "rows": named(head, rows),
        "runs": rounds,
        "aimet_seconds_a_step": step,
        "bars": [reached],
    }


def _seq_mse_row(options: SpeedOptions, windows: int, spec: QSpec, *, blocks: int) -> list[Any]:
    length = LENGTH
    size = {"hidden": 512, "ffn": 1408}
    if options.quick:
        size, length, windows, blocks = {"hidden": 64, "ffn": 128}, 16, 4, min(blocks, 2)
    batches = random_batches(windows, length)
    cold = random_llama(blocks=1, **size)
    model = random_llama(blocks=blocks, **size)
    seconds: dict[str, list[float]] = {COMPATIBLE: [], SEQ_MSE: []}
    for method in seconds:
        effort = replace(options.effort, candidates=1)
        apply_method(method, weights_only_sim(cold, spec), cold, batches[:1], effort)
    ranges: dict[str, dict[str, torch.Tensor]] = {}
    wanted = {COMPATIBLE: options.repeats, SEQ_MSE: options.aimet_repeats}
    for turn in range(max(wanted.values())):
        for method, times in seconds.items():
            if turn >= wanted[method]:
                continue
            sim = weights_only_sim(model, spec)
            started = time.process_time()
            apply_method(method, sim, model, batches, options.effort)
            times.append(time.process_time() - started)
            ranges[method] = weight_ranges(sim)
    ours, theirs = (statistics.median(seconds[method]) for method in (COMPATIBLE, SEQ_MSE))
    return [
        blocks,
        type(spec.granularity).__name__,
        windows * length,
        theirs,
        ours,
        theirs / ours,
        f"{len(seconds[SEQ_MSE])} / {len(seconds[COMPATIBLE])}",
        same_winner(ranges[COMPATIBLE], ranges[SEQ_MSE]),
    ]


def weight_ranges(sim: Any) -> dict[str, torch.Tensor]:
    """Upper ends of all weight ranges as the quantizers store them."""
    model = adapt(sim).model
    return {
        name: model.get_submodule(name).param_quantizers["weight"].max.detach().clone()
        for name in adapt(sim).weight_quantizers()
    }


def same_winner(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Share of rows (or blocks) whose range is the same; candidates are 5 % apart."""
    same = [torch.isclose(ours[name], theirs[name], rtol=1e-4, atol=0) for name in theirs]
    return float(torch.cat([each.flatten() for each in same]).double().mean())
