"""Does each block of a model cost the same, however many there are?

    python benchmarks/scale.py [--blocks 8 16 32 64] [--repeats 2] [--only create_sim export ...]

builds simulations of random narrow llamas of several depths, applies techniques with few steps and
exports, and prints the processor time of each by depth. What a block costs is told from the two
deepest models and from the two shallowest ones, so that fixed costs cancel; the bar is that the
former is at most a tenth more. Processor time, so that other work on the machine disturbs less; run
it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import tempfile
import time
import warnings
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


JOBS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "create_sim": create,
    "gptq": technique("gptq"),
    "seq_mse": technique("seq_mse"),
    "awq": technique("awq"),
    "omniquant": technique("omniquant", num_iterations=4, search_sweeps=1),
    "autoround": technique("autoround", num_iterations=4),
    "spinquant": technique("spinquant"),
    "dwq": technique("dwq", num_iterations=2),
    "gptq of ONNX": technique("gptq", onnx_sim),
    "omniquant of ONNX": technique("omniquant", onnx_sim, num_iterations=4, search_sweeps=1),
    "export": export(calibrated, IDS),
    "export without AIMET's exporter": export(calibrated, IDS, own=True),
    "export of ONNX": export(onnx_sim, {"input_ids": IDS.numpy()}),
}


def seconds(name: str, blocks: int, repeats: int) -> float:
    """Return the smallest processor time of a job, each time on a new simulation."""
    taken = []
    with _silent():
        for _ in range(repeats):
            job = JOBS[name](blocks)
            started = time.process_time()
            left_out = job()
            if not isinstance(left_out, float):
                left_out = 0.0
            taken.append(time.process_time() - started - left_out)
    return min(taken)


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
        seconds(name, depths[0], 1)  # libraries are loaded
        taken = [seconds(name, n, options.repeats) for n in depths]
        steps = [
            (taken[k + 1] - taken[k]) / (depths[k + 1] - depths[k]) for k in (0, len(depths) - 2)
        ]
        ratio = steps[1] / steps[0]
        rows.append([name, *taken, *steps, ratio])
        print_table(name, head, rows[-1:])
        text = f"{name}: a block costs {ratio:.2f} of the first ones"
        bars.append(bar(text, ratio <= 1 + TOLERANCE))
    print_table("Processor seconds", head, rows)
    result = {"jobs": named(head, rows), "bars": bars, "machine": machine("onnx")}
    add_section(options.output, "scale", result)


if __name__ == "__main__":
    main()
