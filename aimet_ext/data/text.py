"""Text cut into batches of token ids, for calibration and for perplexity."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SUFFIXES = (".txt", ".raw", ".jsonl")


def calibration_batches(
    tokenizer: Any,
    text_or_path: str | Path | Iterable[str],
    seq_length: int,
    num_batches: int | None,
    batch_size: int = 1,
    *,
    bos_token_id: int | None = None,
) -> list[Tensor]:
    """Join documents, each after a BOS token, and cut them into windows that do not overlap.

    :param tokenizer: the model's tokenizer, from transformers.
    :param text_or_path: one text, an iterable of documents, or a file: ``.txt`` and ``.raw`` hold
        one document, ``.jsonl`` one a line as ``{"text": …}``.
    :param seq_length: tokens of a window.
    :param num_batches: batches wanted, None for all that the text gives.
    :param batch_size: windows of a batch; only with ``num_batches=None`` may the last have fewer.
    :param bos_token_id: token that starts each document, the tokenizer's own BOS if None.
    :returns: tensors of ids ``[batch_size, seq_length]``.
    :raises ValueError: too little text, no BOS token, or a number that is not positive.
    :raises FileNotFoundError: a file that does not exist.

    >>> batches = calibration_batches(tokenizer, "stories.jsonl", seq_length=256, num_batches=64)
    """
    numbers = {"seq_length": seq_length, "batch_size": batch_size, "num_batches": num_batches}
    for name, number in numbers.items():
        optional = name == "num_batches" and number is None
        if not optional and (type(number) is not int or number < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
    start = getattr(tokenizer, "bos_token_id", None) if bos_token_id is None else bos_token_id
    if start is None:
        raise ValueError(
            "a token that starts each document is required and the tokenizer has no BOS token; "
            "pass bos_token_id, for example tokenizer.eos_token_id"
        )
    wanted = None if num_batches is None else num_batches * batch_size
    windows = _windows(tokenizer, _documents(text_or_path), start, seq_length, wanted)
    if not len(windows) or (wanted is not None and len(windows) < wanted):
        raise ValueError(
            f"text for {wanted or 1} windows of {seq_length} tokens is required "
            f"(num_batches × batch_size), got enough for {len(windows)}; "
            "give more text, or ask for fewer or shorter windows"
        )
    return list(windows.split(batch_size))


def _windows(
    tokenizer: Any, documents: Iterable[str], start: int, length: int, wanted: int | None
) -> Tensor:
    """Return at most ``wanted`` windows ``[windows, length]``."""
    ids: list[int] = []
    for document in documents:
        ids.append(start)
        ids.extend(tokenizer.encode(document, add_special_tokens=False))
        if wanted is not None and len(ids) >= wanted * length:
            break
    count = len(ids) // length if wanted is None else min(wanted, len(ids) // length)
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


def _documents(source: str | Path | Iterable[str]) -> Iterable[str]:
    if isinstance(source, str) and "\n" not in source and source.endswith(_SUFFIXES):
        source = Path(source)
    if isinstance(source, Path):
        return _read(source)
    return [source] if isinstance(source, str) else source


def _read(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"a text file ({', '.join(_SUFFIXES)}) is required, and there is no {path}"
        )
    if path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8")
        return
    lines = (line for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: a line {{"text": …}} is required, got {line[:80]!r}'
            ) from error
