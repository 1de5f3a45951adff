"""Does each block of a model cost the same, however many there are?

    python benchmarks/scale.py [--blocks 8 16 32 64] [--repeats 2] [--only create_sim export ...]
                               [--calls]

builds simulations of random narrow llamas of several depths, applies techniques with few steps,
exports and loads, and prints the processor time of each by depth. What a block costs is told from
the two deepest models and from the two shallowest ones, so that fixed costs cancel; the bar is that
the former is at most a tenth more. Processor time, the least of repetitions that take turns, so
that other work on the machine disturbs less; run it with OMP_NUM_THREADS=1. With --calls the
number of calls of functions takes the place of time: what grows there grows without noise, and the
functions of which a block calls more are named.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import pathlib
import pstats
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from common import quiet
from random_llama import random_batches, random_llama
from report import HERE, add_section, bar, machine, named, print_table

import aimet_ext

TOLERANCE = 0.1
BATCHES = random_batches(8, 32, 4)
IDS = BATCHES[0][:1]


def llama(blocks: int) -> Any:
    """Return a narrow model."""
    return random_llama(blocks=blocks, hidden=64, ffn=128, length=64)


def torch_sim(blocks: int) -> Any:
    """Return a simulation of the torch model; activations have no ranges."""
    return aimet_ext.create_sim(llama(blocks), IDS, in_place=True)


def calibrated(blocks: int) -> Any:
    """Return a simulation of the torch model with ranges everywhere."""
    sim = torch_sim(blocks)
    sim.compute_encodings(lambda module: module(IDS))
    return sim


def onnx_sim(blocks: int) -> Any:
    """Return a simulation of the model's ONNX graph with ranges everywhere."""
    import onnx
    from aimet_onnx import QuantizationSimModel

    model = aimet_ext.prepare_model(llama(blocks), mask_value=-100.0)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/float.onnx"
        names = {"input_names": ["input_ids"], "output_names": ["logits"]}
        torch.onnx.export(model, (IDS,), path, dynamo=False, **names)
        graph = onnx.load(path)
    sim = QuantizationSimModel(
        graph, param_type="int4", activation_type="int16", config_file="htp_v81"
    )
    sim.compute_encodings([{"input_ids": IDS.numpy()}])
    return sim


def create(blocks: int) -> Callable[[], Any]:
    """Return the job of building a simulation."""
    model = llama(blocks)
    return lambda: aimet_ext.create_sim(model, IDS)


def technique(
    name: str, build: Callable[[int], Any] = torch_sim, **settings: Any
) -> Callable[[int], Callable[[], Any]]:
    """Return a maker of jobs that apply a technique."""

    def prepared(blocks: int) -> Callable[[], Any]:
        sim, data = build(blocks), BATCHES
        if build is onnx_sim:
            data = [{"input_ids": row[None].numpy()} for batch in BATCHES for row in batch]
        extra: dict[str, Any] = {}
        if name == "dwq":
            aimet_ext.apply_gptq(sim, data, progress=False)
            extra = {"reference": llama(blocks)}
        apply = getattr(aimet_ext, f"apply_{name}")
        return lambda: apply(sim, data, progress=False, **settings, **extra)

    return prepared


def export(
    build: Callable[[int], Any], sample: Any, *, own: bool = False
) -> Callable[[int], Callable[[], Any]]:
    """Return a maker of jobs that export.

    :param own: Leave out the time in AIMET's exporter, and so in torch's.
    """

    def prepared(blocks: int) -> Callable[[], Any]:
        sim = build(blocks)

        def job() -> float:
            with tempfile.TemporaryDirectory() as folder, timed_exporter() as inside:
                path = pathlib.Path(folder) / "out"
                aimet_ext.export(sim, path, "model", sample, progress=False)
            return sum(inside) if own else 0.0

        return job

    return prepared


def load(build: Callable[[int], Any], sample: Any) -> Callable[[int], Callable[[], Any]]:
    """Return a maker of jobs that load an export."""

    def prepared(blocks: int) -> Callable[[], Any]:
        folder = tempfile.TemporaryDirectory()  # it lives as long as the job
        path = pathlib.Path(folder.name) / "out"
        aimet_ext.export(build(blocks), path, "model", sample, progress=False)
        return lambda: (aimet_ext.load(path, progress=False), folder)

    return prepared


@contextlib.contextmanager
def timed_exporter() -> Iterator[list[float]]:
    """Yield a list that collects the processor time of each call of AIMET's exporter."""
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


SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "seq_mse": {},
    "adaround": {"num_iterations": 4},
    "awq": {},
    "smoothquant": {},
    "omniquant": {"num_iterations": 4, "search_sweeps": 1},
    "autoround": {"num_iterations": 4},
}
ARRAYS = {"input_ids": IDS.numpy()}
JOBS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "create_sim": create,
    **{name: technique(name, **settings) for name, settings in SETTINGS.items()},
    "spinquant": technique("spinquant"),
    "dwq": technique("dwq", num_iterations=2),
    **{f"{name} of ONNX": technique(name, onnx_sim, **own) for name, own in SETTINGS.items()},
    "export": export(calibrated, IDS),
    "export without AIMET's exporter": export(calibrated, IDS, own=True),
    "export of ONNX": export(onnx_sim, ARRAYS),
    "load": load(calibrated, IDS),
    "load of ONNX": load(onnx_sim, ARRAYS),
}


def seconds(name: str, depths: list[int], repeats: int) -> list[float]:
    """Return the smallest processor time of a job by depth, each time on a new simulation."""
    taken: dict[int, list[float]] = {blocks: [] for blocks in depths}
    with _silent():
        for blocks in depths * repeats:
            job = JOBS[name](blocks)
            started = time.process_time()
            left_out = job()
            if not isinstance(left_out, float):
                left_out = 0.0
            taken[blocks].append(time.process_time() - started - left_out)
    return [min(each) for each in taken.values()]


def calls(name: str, blocks: int) -> Counter[str]:
    """Return the number of calls of each function in a job."""
    with _silent():
        job = JOBS[name](blocks)
        gc.collect()
        profile = cProfile.Profile()
        profile.runcall(job)
    found: dict[tuple[str, int, str], Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return Counter({f"{pathlib.Path(k[0]).name}:{k[1]} {k[2]}": v[1] for k, v in found.items()})


def growing(counts: list[Counter[str]], depths: list[int]) -> list[str]:
    """Return the functions that a block of the deepest models calls more often, most first."""

    def by_block(name: str, place: int) -> float:
        return (counts[place + 1][name] - counts[place][name]) / (depths[place + 1] - depths[place])

    more = {n: by_block(n, len(depths) - 2) - by_block(n, 0) for n in counts[-1]}
    least = counts[-1].total() / depths[-1] / 500
    found = sorted((name for name, each in more.items() if each > least), key=lambda n: -more[n])
    return [f"{name} ({more[name]:+.0f} a block)" for name in found[:8]]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Print the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results" / "scale.json")
    options = parser.parse_args()
    depths = sorted(options.blocks)
    if len(depths) < 3:
        parser.error(f"at least three depths are required, got {depths}")
    torch.set_num_threads(1)
    head = ["job", *[f"{n} blocks" for n in depths], "a block at first", "at last", "ratio"]
    rows, bars = [], []
    for name in options.only:
        seconds(name, depths[:1], 1)  # libraries are loaded
        if options.calls:
            counts = [calls(name, n) for n in depths]
            taken: list[float] = [count.total() for count in counts]
        else:
            taken = seconds(name, depths, options.repeats)
        steps = [
            (taken[k + 1] - taken[k]) / (depths[k + 1] - depths[k]) for k in (0, len(depths) - 2)
        ]
        ratio = steps[1] / steps[0]
        rows.append([name, *taken, *steps, ratio])
        print_table(name, head, rows[-1:])
        text = f"{name}: a block costs {ratio:.2f} of the first ones"
        bars.append(bar(text, ratio <= 1 + TOLERANCE))
        if options.calls:
            print("\n".join(growing(counts, depths)))
    print_table("Calls" if options.calls else "Processor seconds", head, rows)
    result = {"jobs": named(head, rows), "bars": bars, "machine": machine("onnx")}
    add_section(options.output, "scale", result)


if __name__ == "__main__":
    main()
