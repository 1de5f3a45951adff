"""Most memory of each step from a model to its export, beyond the model's own weights.

    python benchmarks/room.py MODEL_DIR [--copy] [--windows 4] [--length 128]

builds a simulation, in place unless ``--copy``, applies GPTQ with ``cache_dir``, calibrates and
exports. All of the process's memory counts, then without pages of files, which the kernel takes
back when it needs them: the export compares a file that is mapped into memory. The latter is
sampled, every few milliseconds. A small model goes through everything first, so that libraries
loaded late are not counted.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import load, quiet
from memory import status
from random_llama import random_batches, random_llama
from report import HERE, add_section, bar, machine, named, print_table
from torch import Tensor, nn

import aimet_ext

MOST = 1.2  # times the weights
EVERY = 0.005


class Meter:
    """Rows of a table, one for each step, in multiples of the weights.

    :param weights: Their bytes.
    :param base: Bytes of the process that count as nothing, all of them and those of no file.
    """

    def __init__(self, weights: int) -> None:
        self.weights = weights
        self.base = status("VmRSS"), status("RssAnon")
        self.rows: list[list[Any]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        done, found = threading.Event(), [status("RssAnon")]

        def sample() -> None:
            while not done.wait(EVERY):
                found[0] = max(found[0], status("RssAnon"))

        thread = threading.Thread(target=sample)
        thread.start()
        started = time.process_time()
        try:
            yield
        finally:
            done.set()
            thread.join()
        over = (status("VmHWM") - self.base[0], found[0] - self.base[1])
        left = status("RssAnon") - self.base[1]
        taken = time.process_time() - started
        self.rows.append([name, *[n / self.weights for n in (*over, left)], taken])


def steps(model: nn.Module, batches: list[Tensor], *, in_place: bool) -> Meter:
    """Go all the way with a model, which belongs to the simulation afterwards."""
    # Not mapped from the checkpoint's file: these are the weights that count once.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model(batches[0])
    meter = Meter(sum(p.numel() * p.element_size() for p in model.parameters()))
    with tempfile.TemporaryDirectory() as folder, quiet():
        with meter.step("create_sim"):
            sim = aimet_ext.create_sim(model, batches[0][:1], in_place=in_place)
        with meter.step("GPTQ"):
            aimet_ext.apply_gptq(sim, batches, cache_dir=folder, progress=False)
        with meter.step("ranges of activations"), torch.no_grad():
            sim.compute_encodings(lambda module: [module(batch) for batch in batches])
        with meter.step("export"):
            path = pathlib.Path(folder) / "out"
            aimet_ext.export(sim, path, "model", batches[0][:1], progress=False)
    return meter


def main() -> None:
    """Print the table and the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=pathlib.Path)
    parser.add_argument("--copy", action="store_true")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results" / "room.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps(random_llama(blocks=1, hidden=64, ffn=64), random_batches(2, 16, 1), in_place=True)
    model, _ = load(options.model_dir)
    batches = random_batches(options.windows, options.length, 2)
    meter = steps(model, batches, in_place=not options.copy)
    head = ["step", "most", "most of no file", "left of no file", "seconds"]
    print_table(f"Memory, times {meter.weights / 1e6:.0f} MB of weights", head, meter.rows)
    most, own = (max(row[place] for row in meter.rows) for place in (1, 2))
    bars = [
        bar(f"{what}: {found:.2f} times the weights at most", found <= MOST)
        for what, found in (("all memory", most), ("memory of no file", own))
    ]
    result = {"steps": named(head, meter.rows), "bars": bars, "machine": machine()}
    add_section(options.output, "copied" if options.copy else "in place", result)


if __name__ == "__main__":
    main()
