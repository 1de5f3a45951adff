"""Seconds and peak memory on ONNX graphs of random models, AIMET's in turns with ours."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
from common import SEQ_MSE, SIMPLE
from layerwise_speed import LENGTH, PER_CHANNEL, SpeedOptions
from methods import ADAROUND, COMPATIBLE
from onnx_methods import AIMET_ONNX_STEPS, Inputs, apply_onnx, output_error
from onnx_models import as_inputs, export_llm, float_session, llm_sim, run, weights_of
from random_llama import random_batches, random_llama
from report import bar, in_own_process, named, print_table

OURS = "ours: seq_mse"
OUR_ADAROUND = "ours: adaround"
HEAD = ("side", "steps or candidates", "seconds", "output error", "how")


class Subject:
    """A random Llama as a graph, inputs, and the float graph's outputs on others."""

    def __init__(self, options: SpeedOptions, windows: int, blocks: int = 8) -> None:
        size, length = {"hidden": 512, "ffn": 1408}, LENGTH
        if options.quick:
            size, length, windows, blocks = {"hidden": 64, "ffn": 128}, 16, 4, 2
        self.blocks, self.tokens = blocks, windows * length
        self.model = export_llm(random_llama(blocks=blocks, **size))
        cold = random_llama(blocks=1, **size)
        self.cold = export_llm(cold)
        batches = random_batches(windows + 4, length)
        self.inputs = as_inputs(batches[:-1])
        self.others = as_inputs(batches[-1:])  # nobody calibrates on these
        self.expected = run(float_session(self.model), self.others)

    def warm(self, options: SpeedOptions, method: str, steps: int = 2) -> None:
        """Neither side is timed cold."""
        effort = replace(options.effort, candidates=2, steps=steps, aimet_steps=steps)
        apply_onnx(method, llm_sim(self.cold, PER_CHANNEL), self.inputs[:1], effort)

    def time(
        self, options: SpeedOptions, method: str, inputs: Inputs | None = None, **changes: Any
    ) -> tuple[float, Any]:
        """Processor seconds, and the simulation."""
        sim = llm_sim(self.model, PER_CHANNEL)
        effort = replace(options.effort, **changes)
        started = time.process_time()
        apply_onnx(method, sim, self.inputs if inputs is None else inputs, effort)
        return time.process_time() - started, sim

    def error(self, sim: Any) -> float:
        """Of the outputs on inputs that nobody calibrated on."""
        return output_error(sim, self.others, self.expected)


def seq_mse_time(options: SpeedOptions, windows: int) -> dict[str, Any]:
    """s: SeqMSE, 8 blocks, 512 wide, windows of 256 tokens."""
    subject = Subject(options, windows)
    wanted = {SEQ_MSE: options.aimet_repeats, COMPATIBLE: options.repeats, OURS: options.repeats}
    seconds: dict[str, list[float]] = {method: [] for method in wanted}
    errors = {SIMPLE: subject.error(llm_sim(subject.model, PER_CHANNEL))}
    weights = {}
    for method in wanted:
        subject.warm(options, method)
    for turn in range(max(wanted.values())):
        for method, times in seconds.items():
            if turn < wanted[method]:
                spent, sim = subject.time(options, method)
                times.append(spent)
                errors[method], weights[method] = subject.error(sim), weights_of(sim)
                print(f"  {method}: {spent:.1f} s, error {errors[method]:.5f}", flush=True)
    rows: list[list[Any]] = [[SIMPLE, None, None, errors[SIMPLE], ""]]
    for method, times in seconds.items():
        how = f"median of {len(times)}"
        count = options.effort.candidates
        rows.append([method, count, statistics.median(times), errors[method], how])
    print_table(f"s. SeqMSE, {subject.blocks} blocks, {subject.tokens} tokens", HEAD, rows)
    bars = []
    for _, _, spent, error, _ in rows[2:]:
        faster = rows[1][2] / spent
        bars.append(bar(f"{faster:.1f} times faster, at least 10", faster >= 10))
        bars.append(
            bar(f"output error {error:.5f} of {rows[1][3]:.5f}", error <= rows[1][3] * 1.01)
        )
    same = same_rows(weights[COMPATIBLE], weights[SEQ_MSE])
    print(f"{same:.2%} of rows as AIMET's in compatible mode")
    return {"rows": named(HEAD, rows), "runs": seconds, "same_rows": same, "bars": bars}


def adaround_time(options: SpeedOptions) -> dict[str, Any]:
    """t: AdaRound, 8 blocks, 512 wide; AIMET's 10,000 steps from two short runs."""
    subject = Subject(options, options.adaround_windows)
    few, more = options.short_steps
    for method in (ADAROUND, OUR_ADAROUND):
        subject.warm(options, method)
    rounds = []
    for _ in range(options.aimet_repeats):
        of_few, _ = subject.time(options, ADAROUND, aimet_steps=few)
        ours, sim = subject.time(options, OUR_ADAROUND)
        of_more, short = subject.time(options, ADAROUND, aimet_steps=more)
        rounds.append((of_few, ours, of_more))
        print(f"  AIMET {of_few:.1f} and {of_more:.1f} s, ours {ours:.1f} s", flush=True)
    of_few, of_ours, of_more = (statistics.median(each) for each in zip(*rounds, strict=True))
    step = (of_more - of_few) / (more - few)
    whole = of_few + step * (AIMET_ONNX_STEPS - few)
    plain = subject.error(llm_sim(subject.model, PER_CHANNEL))
    linears = 7 * subject.blocks
    how = f"EXTRAPOLATED, {step:.3f} s a step of {linears} layers"
    rows = [
        [SIMPLE, None, None, plain, ""],
        [ADAROUND, few, of_few, None, "measured"],
        [ADAROUND, more, of_more, subject.error(short), "measured"],
        [ADAROUND, AIMET_ONNX_STEPS, whole, None, how],
        [OUR_ADAROUND, options.effort.steps or "default", of_ours, subject.error(sim), "measured"],
    ]
    print_table(f"t. AdaRound, {subject.blocks} blocks, {subject.tokens} tokens", HEAD, rows)
    faster = whole / of_ours
    bars = [bar(f"{faster:.0f} times faster (AIMET's extrapolated), at least 30", faster >= 30)]
    return {"rows": named(HEAD, rows), "runs": rounds, "aimet_seconds_a_step": step, "bars": bars}


def same_rows(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = 1e-6
) -> float:
    """Share of output rows that are equal, relative to the row's largest weight."""
    return float(np.concatenate([equal_rows(ours[n], theirs[n], tolerance) for n in ours]).mean())


def equal_rows(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """For each output row whether it is the same."""
    first, second = (each.reshape(len(each), -1) for each in (ours, theirs))
    return abs(first - second).max(1) <= tolerance * abs(second).max(1)


def memory(options: SpeedOptions) -> dict[str, Any]:
    """m: graphs with external data, a process each."""
    size = ["--hidden", "64", "--ffn", "128", "--length", "32"] if options.quick else []
    windows = 4 if options.quick else 32
    runs = (("seq_mse", windows), ("seq_mse", 2 * windows), ("gptq", windows))
    head = ("technique", "windows", "over MiB", "largest group MiB", "moments MiB", "graph MiB")
    rows = []
    for technique, count in runs:
        got = in_own_process("onnx_memory.py", technique, "--windows", str(count), *size)
        sizes = [got[key] / 2**20 for key in ("over", "group", "moments", "graph")]
        rows.append([technique, count, *(round(each, 1) for each in sizes)])
        print(f"  {technique}, {count} windows: {rows[-1][2:]}, {got['seconds']:.0f} s", flush=True)
    print_table("m. Peak memory over the simulation, external data, cache on disk", head, rows)
    growth = rows[1][2] / rows[0][2] - 1
    return {
        "rows": named(head, rows),
        "bars": [bar(f"twice the tokens: {growth:+.1%}, below 5 %", growth < 0.05)],
    }
