"""Documents read from files: plain text, JSON, CSV and Parquet, with texts or chats in them."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aimet_ext.errors import CorruptFileError, require, some
from aimet_ext.files.reading import check_regular, naming, parse_json, read_text

_log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".csv", ".parquet")
"""Ends of names of files with documents."""

FIELDS = ("text", "content", "messages", "conversations", "conversation")
"""Fields in which documents are looked for, in this order."""

Render = Callable[[list[dict[str, str]]], str]
"""Function that writes a chat, a list of messages with role and content, as one text."""

_LONGEST_CELL = 2**31 - 1  # documents are longer than cells usually are; a C long on Windows


def read_documents(path: Path, render: Render, field: str | None = None) -> Iterator[str]:
    """Yield the documents of a file.

    :param path: ``.jsonl`` with one document a line, ``.json`` with a list of them, ``.csv`` and
        ``.parquet`` with one a row. A document is a text, a chat, or a mapping with one of them.
        Those that are null, in CSV empty, are left out, which a warning says. Any other file is
        one text.
    :param render: Function that writes a chat as one text.
    :param field: Name of the field or column; None for the first of :data:`FIELDS` that is there.
    :raises FileNotFoundError: there is no such file.
    :raises CorruptFileError: a document is none, and its place is named; or all are null.
    :raises MissingExtraError: a Parquet file, and pyarrow is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"a text file ({', '.join(SUFFIXES)}) is required, and there is no {path}"
        )
    check_regular(path)
    kind = path.suffix.lower()
    records = {".jsonl": _lines, ".json": _entries, ".csv": _rows, ".parquet": _columns}.get(kind)
    if records is None:
        yield read_text(path)
        return
    given = left_out = 0
    try:
        for place, record in records(path, field):
            text = _text(record, place, render, field)
            if text is None:
                left_out += 1
            else:
                given += 1
                yield text
    finally:  # also where the reader wants no more
        if given and left_out:
            _log.warning("%s: %d documents are null and left out", path, left_out)
    if left_out and not given:
        raise CorruptFileError(f"{path}: a document with text is required, all {left_out} are null")


def _lines(path: Path, _: str | None) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse_json(line, place)


def _entries(path: Path, _: str | None) -> Iterator[tuple[str, Any]]:
    documents = parse_json(read_text(path), path)
    if not isinstance(documents, list):
        raise CorruptFileError(f"{path}: a list of documents is required")
    for number, document in enumerate(documents):
        yield f"{path}, [{number}]", document


def _rows(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        rows = csv.reader(io.StringIO(read_text(path), newline=""))
        names = next(rows, [])
        at = names.index(_column(path, names, field))
        found = []
        for row in filter(None, rows):  # blank lines are none
            place = f"{path}, line {rows.line_num}"
            if len(row) != len(names):
                raise CorruptFileError(
                    f"{place}: {len(names)} columns as in the first line are required, got "
                    f"{len(row)}; put texts with commas or ends of lines in quotes"
                )
            found.append((place, row[at] or None))
    except csv.Error as error:
        raise CorruptFileError(f"{path}, line {rows.line_num}: CSV is required: {error}") from error
    finally:
        csv.field_size_limit(before)  # before the first is passed on: it is the process's own
    yield from found


def _columns(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    parquet: Any = require("pyarrow.parquet", "parquet")
    number = 0
    with naming(path, problem="a Parquet file is required"):
        file = parquet.ParquetFile(check_regular(path))
        column = _column(path, file.schema_arrow.names, field)
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield f"{path}, row {number}", value
                number += 1


def _column(path: Path, names: Iterable[str], field: str | None) -> str:
    """Return the column that holds the documents."""
    wanted = (field,) if field is not None else FIELDS
    found = next((name for name in wanted if name in list(names)), None)
    if found is None:
        raise CorruptFileError(
            f"{path}: a column {wanted[0]!r} is required, got {list(names)}{_choose(field)}"
        )
    return found


def _text(entry: Any, place: str, render: Render, field: str | None) -> str | None:
    """Return the text of an entry, None if it is null.

    An entry is a string, a chat, or a mapping that holds one of them.
    """
    value = entry
    if isinstance(entry, Mapping):
        wanted = (field,) if field is not None else FIELDS
        name = next((name for name in wanted if name in entry), None)
        if name is None:
            raise CorruptFileError(
                f"{place}: a field {wanted[0]!r} is required, got {some([*map(repr, entry)])}"
                f"{_choose(field)}"
            )
        value = next((entry[each] for each in wanted if entry.get(each) is not None), None)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(map(_is_message, value)):
        try:
            return render([{key: each[key] for key in ("role", "content")} for each in value])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    raise CorruptFileError(
        f'{place}: a text, or messages such as {{"role": "user", "content": "…"}}, is required, '
        f"got {str(value)[:80]!r}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _choose(field: str | None) -> str:
    if field is not None:
        return ""
    return f"; it may be {', '.join(FIELDS[1:])} too, or another by text_field (--text-field)"
