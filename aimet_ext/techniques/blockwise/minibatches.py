"""The order in which a block's sequences are learnt from."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from aimet_ext.techniques.blockwise.block import Block


def minibatches(
    block: Block, batch_size: int | None, seed: int
) -> Iterator[tuple[int, list[int] | None]]:
    """Yield minibatches without end: a batch's number and some sequences, each once an epoch.

    :param batch_size: Most sequences; None for whole batches of the dataloader.
    """
    generator = torch.Generator().manual_seed(seed)
    stream = block.quantized_stream
    pieces: list[tuple[int, list[int] | None]] = []
    for index in range(len(stream)):
        count = stream.shape(index)[0]
        if batch_size is None or batch_size >= count:
            pieces.append((index, None))
            continue
        rows = torch.randperm(count, generator=generator).tolist()
        pieces += [(index, rows[at : at + batch_size]) for at in range(0, count, batch_size)]
    while True:
        for place in torch.randperm(len(pieces), generator=generator).tolist():
            yield pieces[place]
