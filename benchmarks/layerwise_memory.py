"""Most memory that SeqMSE takes beyond the simulation itself, AIMET's or ours.

    python benchmarks/layerwise_memory.py aimet|compatible|best [--windows 64] [--cache]

prints one JSON line. A process of its own, for the high-water mark is the process's. A small model
goes through everything first, so that libraries loaded late are not counted.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time
import warnings
from typing import Any

import torch
from common import apply_seq_mse
from memory import status
from random_llama import random_batches, random_llama, weights_only_sim

import aimet_ext


def search(side: str, sim: Any, batches: list[torch.Tensor], candidates: int, cache: bool) -> None:
    if side == "aimet":
        apply_seq_mse(sim, batches, candidates)
        return
    with tempfile.TemporaryDirectory() as folder:
        aimet_ext.apply_seq_mse(
            sim,
            batches,
            num_candidates=candidates,
            mode=side,
            progress=False,
            cache_dir=folder if cache else None,
        )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    small = weights_only_sim(random_llama(blocks=1, hidden=64, ffn=128))
    search(options.side, small, random_batches(4, 16), 2, options.cache)
    del small
    sim = weights_only_sim(
        random_llama(blocks=options.blocks, hidden=options.hidden, ffn=options.ffn)
    )
    batches = random_batches(options.windows, options.length, batch_size=1)
    with torch.no_grad():
        sim.model(batches[0])
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, started = status("VmRSS"), time.perf_counter()
    search(options.side, sim, batches, options.candidates, options.cache)
    seconds = time.perf_counter() - started
    peak = status("VmHWM")
    return {
        **vars(options),
        "model_bytes": sum(p.numel() * p.element_size() for p in sim.model.parameters()),
        "hidden_states_bytes": options.windows * options.length * options.hidden * 4,
        "before_bytes": before,
        "over_bytes": peak - before,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=("aimet", "compatible", "best"))
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--cache", action="store_true", help="give ours a cache_dir")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
