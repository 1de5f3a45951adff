"""What second moments cost beside one matrix product of their size.

    OMP_NUM_THREADS=1 python benchmarks/moments.py [--width 4096] [--tokens 40000] [--repeats 3]

Both in one process and in turns, float32: ``X Xᵀ [width, tokens] × [tokens, width]`` as one product
of torch, and :class:`~aimet_ext.data.moments.MomentSum` from the rows to the mean, checks
included, fed in batches of 512 tokens. Medians. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from aimet_ext.core.objective import SecondMoment
from aimet_ext.data.moments import MomentSum

BATCH = 512


def second_moment_cost(
    width: int = 4096, tokens: int = 40000, repeats: int = 3
) -> dict[str, float]:
    """Seconds of both, their ratio, and the largest difference relative to the largest moment."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, width, generator=generator)

    def product() -> Tensor:
        return rows.T @ rows

    def moments() -> SecondMoment:
        total = MomentSum(width)
        for batch in rows.unsqueeze(0).split(BATCH, 1):
            total.add(batch)
        return total.result()

    seconds: dict[Callable[[], object], list[float]] = {product: [], moments: []}
    for _ in range(repeats):
        for task, times in seconds.items():
            begin = time.process_time()
            task()
            times.append(time.process_time() - begin)
    expected = product().div_(tokens)
    difference = (moments().second - expected).abs().max() / expected.abs().max()
    of_product, of_moments = (statistics.median(times) for times in seconds.values())
    return {
        "width": width,
        "tokens": tokens,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "product_seconds": of_product,
        "moments_seconds": of_moments,
        "ratio": of_moments / of_product,
        "difference": float(difference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=40000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(second_moment_cost(options.width, options.tokens, options.repeats)))


if __name__ == "__main__":
    main()
