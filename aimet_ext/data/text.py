"""Text cut into batches of token ids, for calibration and for perplexity."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.reading import parse_json, read_text

_SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".csv")
_COLUMN = "text"


def calibration_batches(
    tokenizer: Any,
    text_or_path: str | Path | Iterable[str],
    seq_length: int,
    num_batches: int | None,
    batch_size: int = 1,
    *,
    bos_token_id: int | None = None,
) -> list[Tensor]:
    """Join documents, each after a start token, and cut them into windows that do not overlap.

    :param tokenizer: the model's tokenizer, from transformers.
    :param text_or_path: one text, an iterable of documents, or a file: ``.jsonl`` holds one
        document a line as ``{"text": …}``, ``.json`` a list of them, ``.csv`` a column ``text``,
        any other file is one document. UTF-8, or UTF-16 with a byte order mark.
    :param seq_length: tokens of a window.
    :param num_batches: batches wanted, None for all that the text gives.
    :param batch_size: windows of a batch; only with ``num_batches=None`` may the last have fewer.
    :param bos_token_id: token that starts each document. None: the tokenizer's BOS, or its EOS if
        it has no BOS, as Qwen's; documents follow each other directly if it has neither.
    :returns: tensors of ids ``[batch_size, seq_length]``.
    :raises ValueError: too little text, or a number that is not positive.
    :raises FileNotFoundError: a file that does not exist.
    :raises CorruptFileError: a file that does not hold documents in its form.

    >>> batches = calibration_batches(tokenizer, "stories.jsonl", seq_length=256, num_batches=64)
    """
    numbers = {"seq_length": seq_length, "batch_size": batch_size, "num_batches": num_batches}
    for name, number in numbers.items():
        optional = name == "num_batches" and number is None
        if not optional and (type(number) is not int or number < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
    own = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    start = next((token for token in (bos_token_id, *own) if token is not None), None)
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
    tokenizer: Any, documents: Iterable[str], start: int | None, length: int, wanted: int | None
) -> Tensor:
    """Return at most ``wanted`` windows ``[windows, length]``."""
    ids: list[int] = []
    for document in documents:
        ids += [] if start is None else [start]
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
    text = read_text(path)
    match path.suffix.lower():
        case ".jsonl":
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield _document(parse_json(line, place), place)
        case ".json":
            documents = parse_json(text, path)
            if not isinstance(documents, list):
                raise CorruptFileError(f"{path}: a list of documents is required")
            for number, document in enumerate(documents):
                yield _document(document, f"{path}, [{number}]")
        case ".csv":
            rows = csv.DictReader(io.StringIO(text, newline=""))
            if _COLUMN not in (rows.fieldnames or ()):
                raise CorruptFileError(
                    f"{path}: a column {_COLUMN!r} is required, got {rows.fieldnames}"
                )
            yield from (row[_COLUMN] or "" for row in rows)
        case _:
            yield text


def _document(entry: Any, place: str) -> str:
    """Return the text of an entry, a string or a mapping with a text."""
    text = entry.get(_COLUMN) if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise CorruptFileError(f'{place}: {{"text": …}} is required, got {str(entry)[:80]!r}')
    return text
