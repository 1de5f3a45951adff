"""Most memory that OmniQuant with ``cache_dir`` takes beyond the simulation itself.

    python benchmarks/memory.py BLOCKS [--windows 32] [--steps 4] [--no-cache]

prints one JSON line. A process of its own, for the high-water mark is the process's. A small model
goes through everything first, so that libraries loaded late are not counted.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import warnings

import torch

import aimet_ext

HIDDEN, LENGTH, VOCABULARY = 256, 256, 256


def simulation(blocks: int, hidden: int, length: int = LENGTH):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, 16))
    return aimet_ext.create_sim(
        LlamaForCausalLM(config).eval(), ids, lm_head=None, embedding=None, activations=None
    )


def batches(windows: int, length: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (windows, length), generator=generator)
    return list(ids.split(4))


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is required in /proc/self/status: this needs Linux")


def measure(blocks: int, windows: int, steps: int, *, cache: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        cache_dir = folder if cache else None
        small = simulation(1, 64)
        aimet_ext.apply_omniquant(small, batches(4), 1, progress=False, cache_dir=cache_dir)
        del small
        sim = simulation(blocks, HIDDEN)
        data = batches(windows)
        with torch.no_grad():
            sim.model(data[0])
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status("VmRSS")
        report = aimet_ext.apply_omniquant(
            sim, data, steps, progress=False, cache_dir=cache_dir, search_sweeps=1
        )
        peak = status("VmHWM")
    weights = sum(p.numel() * p.element_size() for p in sim.model.parameters())
    hidden = windows * LENGTH * HIDDEN * 4
    return {
        "blocks": blocks,
        "cache_dir": cache,
        "model_bytes": weights,
        "hidden_states_bytes": hidden,
        "before_bytes": before,
        "peak_bytes": peak,
        "over_bytes": peak - before,
        "seconds": report.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("blocks", type=int)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--no-cache", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = measure(options.blocks, options.windows, options.steps, cache=not options.no_cache)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
