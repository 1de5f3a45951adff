"""Text cut into batches of token ids, for calibration and for perplexity."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimet_ext.data.documents import SUFFIXES, read_documents

_log = logging.getLogger(__name__)


def calibration_batches(
    tokenizer: Any,
    text_or_path: str | Path | Iterable[str | Path],
    seq_length: int,
    num_batches: int | None,
    batch_size: int = 1,
    *,
    bos_token_id: int | None = None,
    text_field: str | None = None,
) -> list[Tensor]:
    """Join documents, each after a start token, and cut them into windows that do not overlap.

    Of several files each gives the same number of windows, in turn.

    :param tokenizer: the model's tokenizer, from transformers.
    :param text_or_path: one text, an iterable of documents, a file or a list of files: ``.jsonl``
        holds one document a line, ``.json`` a list of them, ``.csv`` and ``.parquet`` one a row,
        any other file is one document. A document is a text, or a chat: a list of messages
        ``{"role": …, "content": …}``, which the tokenizer's chat template writes. UTF-8, or UTF-16
        with a byte order mark.
    :param seq_length: tokens of a window.
    :param num_batches: batches wanted, None for all that the text gives.
    :param batch_size: windows of a batch; only with ``num_batches=None`` may the last have fewer.
    :param bos_token_id: token that starts each document. None: the tokenizer's BOS, or its EOS if
        it has no BOS, as Qwen's; documents follow each other directly if it has neither.
    :param text_field: field or column with the documents of a file; None for ``text``, or else
        ``content``, ``messages``, ``conversations`` or ``conversation``.
    :returns: tensors of ids ``[batch_size, seq_length]``.
    :raises ValueError: too little text, of one of the files too, a number that is not positive, or
        a chat and a tokenizer without a template for it.
    :raises FileNotFoundError: a file that does not exist.
    :raises CorruptFileError: a file that does not hold documents in its form; the line is named.
    :raises MissingExtraError: a Parquet file, and pyarrow is not installed.

    >>> batches = calibration_batches(tokenizer, "text.txt", seq_length=256, num_batches=64)
    """
    numbers = {"seq_length": seq_length, "batch_size": batch_size, "num_batches": num_batches}
    for name, number in numbers.items():
        optional = name == "num_batches" and number is None
        if not optional and (type(number) is not int or number < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
    start = _start(tokenizer) if bos_token_id is None else bos_token_id
    wanted = None if num_batches is None else num_batches * batch_size
    files = _files(text_or_path)
    if wanted is not None and wanted < len(files):
        raise ValueError(
            f"a window of each file is required at least, got {wanted} windows for {len(files)} "
            "files; ask for more, or give fewer files"
        )
    parts: list[Tensor] = []
    sources: list[Path | None] = [*files] or [None]
    counts = [None] * len(sources) if wanted is None else shares(wanted, len(sources))
    for file, share in zip(sources, counts, strict=True):
        documents: Any = text_or_path if file is None else _read(tokenizer, file, text_field)
        documents = [documents] if isinstance(documents, str) else documents
        windows = _windows(tokenizer, documents, start, seq_length, share)
        if not len(windows) or (share is not None and len(windows) < share):
            raise too_little(len(windows), share, seq_length, file if len(files) > 1 else None)
        parts.append(windows)
    if len(files) > 1:
        parts = parts if wanted else [part[: min(map(len, parts))] for part in parts]
        taken = (f"{len(part)} of {file}" for part, file in zip(parts, files, strict=True))
        _log.info("windows of %d tokens: %s", seq_length, ", ".join(taken))
    return list(in_turn(parts).split(batch_size))


def file_windows(
    tokenizer: Any, file: Path, seq_length: int, most: int, *, text_field: str | None = None
) -> Tensor:
    """Return the first windows of a file as :func:`calibration_batches` cuts it.

    :param most: Most windows; fewer where the file has no more, none too.
    :returns: ids, shape [windows, seq_length].
    """
    documents = _read(tokenizer, file, text_field)
    return _windows(tokenizer, documents, _start(tokenizer), seq_length, most)


def shares(wanted: int, files: int) -> list[int]:
    """Return how many windows each of several files gives, in turn."""
    return [len(range(number, wanted, files)) for number in range(files)]


def in_turn(parts: Sequence[Tensor]) -> Tensor:
    """Join windows [windows, seq]: the first of each part, then the second."""
    order = [
        (part, row) for row in range(max(map(len, parts))) for part in parts if row < len(part)
    ]
    return torch.stack([part[row] for part, row in order]) if order else parts[0]


def too_little(got: int, wanted: int | None, length: int, file: Path | None) -> ValueError:
    """Return the error of a text that has fewer windows than are wanted."""
    place = "" if file is None else f"{file}, whose share is equal to that of each other file: "
    return ValueError(
        f"{place}text for {wanted or 1} windows of {length} tokens is required "
        f"(num_batches × batch_size), got enough for {got}; "
        "give more text, or ask for fewer or shorter windows"
    )


def _start(tokenizer: Any) -> int | None:
    """Return the token before each document."""
    own = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((token for token in own if token is not None), None)


def _files(source: Any) -> list[Path]:
    """Return the files that are meant, none where the source is text itself."""
    if isinstance(source, str | Path):
        return [Path(source)] if _is_file(source) else []
    if not isinstance(source, list | tuple) or not any(isinstance(e, Path) for e in source):
        named = isinstance(source, list | tuple) and source and all(map(_is_file, source))
        return [Path(each) for each in source] if named else []
    if not all(map(_is_file, source)):
        raise TypeError("text_or_path must hold files or documents, got both in one list")
    return [Path(each) for each in source]


def _is_file(source: Any) -> bool:
    if isinstance(source, str):
        return "\n" not in source and source.endswith(SUFFIXES)
    return isinstance(source, Path)


def _read(tokenizer: Any, file: Path, field: str | None) -> Iterable[str]:
    def render(messages: list[dict[str, str]]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "a tokenizer with a chat template is required for messages, this one has none; "
                "give texts, or set tokenizer.chat_template"
            )
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # of the template: jinja2 has many
            raise ValueError(f"the chat template takes no such messages: {error}") from error
        # The start token is that of every document, which some templates write too.
        return text.removeprefix(getattr(tokenizer, "bos_token", None) or "")

    return read_documents(file, render, field)


def _windows(
    tokenizer: Any, documents: Iterable[str], start: int | None, length: int, wanted: int | None
) -> Tensor:
    """Return at most ``wanted`` windows ``[windows, length]``."""
    ids: list[int] = []
    for document in documents:
        if start is not None:
            ids.append(start)
        ids.extend(tokenizer.encode(document, add_special_tokens=False))
        if wanted is not None and len(ids) >= wanted * length:
            break
    count = len(ids) // length if wanted is None else min(wanted, len(ids) // length)
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)
