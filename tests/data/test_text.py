"""Windows of token ids: documents joined, each after BOS, cut without overlap."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from aimet_ext import CorruptFileError, MissingExtraError
from aimet_ext.data.text import calibration_batches


class Letters:
    """A tokenizer of one token a letter; BOS is 0."""

    bos_token_id: int | None = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [99] * add_special_tokens + [ord(letter) - 96 for letter in text]


DOCUMENTS = ["abc", "de", "fghij"]
FORMS = (".jsonl", "s.json", "-2.json", ".csv")
IDS = [0, 1, 2, 3, 0, 4, 5, 0, 6, 7, 8, 9, 10]


def rows(batches: list[torch.Tensor]) -> list[list[list[int]]]:
    return [batch.tolist() for batch in batches]


def test_documents_are_joined_after_bos_and_cut():
    batches = calibration_batches(Letters(), DOCUMENTS, 4, 3)
    assert rows(batches) == [[IDS[0:4]], [IDS[4:8]], [IDS[8:12]]]
    assert all(batch.dtype == torch.long for batch in batches)


def test_batches_of_several_windows():
    assert rows(calibration_batches(Letters(), DOCUMENTS, 2, 3, 2)) == [
        [IDS[0:2], IDS[2:4]],
        [IDS[4:6], IDS[6:8]],
        [IDS[8:10], IDS[10:12]],
    ]


def test_none_takes_all_and_the_last_batch_may_be_smaller():
    assert rows(calibration_batches(Letters(), DOCUMENTS, 4, None, 2)) == [
        [IDS[0:4], IDS[4:8]],
        [IDS[8:12]],
    ]


def test_sources_are_the_same_text(tmp_path):
    entries = [{"text": text} for text in DOCUMENTS]
    lines, listed, strings, table = (tmp_path / f"text{end}" for end in FORMS)
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    listed.write_text(json.dumps(entries))
    strings.write_text(json.dumps(DOCUMENTS))
    table.write_text("number,text\n" + "".join(f'{n},"{t}"\n' for n, t in enumerate(DOCUMENTS)))
    plain = tmp_path / "text.txt"
    plain.write_text("abcdefgh")
    expected = rows(calibration_batches(Letters(), DOCUMENTS, 4, 3))
    for file in (lines, listed, strings, table):
        assert rows(calibration_batches(Letters(), file, 4, 3)) == expected
    assert rows(calibration_batches(Letters(), str(lines), 4, 3)) == expected
    assert rows(calibration_batches(Letters(), plain, 4, 2)) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert rows(calibration_batches(Letters(), "abcdefgh", 4, 2)) == rows(
        calibration_batches(Letters(), str(plain), 4, 2)
    )


def test_only_the_text_that_is_needed_is_read():
    def documents():
        yield from DOCUMENTS[:2]
        raise AssertionError("read too far")

    assert len(calibration_batches(Letters(), documents(), 3, 2)) == 2


def test_too_little_text_is_counted():
    with pytest.raises(ValueError, match=r"text for 4 windows of 4 tokens.*got enough for 3"):
        calibration_batches(Letters(), DOCUMENTS, 4, 4)
    with pytest.raises(ValueError, match="got enough for 0"):
        calibration_batches(Letters(), [], 4, None)


def test_documents_start_with_eos_or_nothing_where_there_is_no_bos():
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    assert rows(calibration_batches(tokenizer, DOCUMENTS, 4, 1)) == [[[1, 2, 3, 4]]]
    tokenizer.eos_token_id = 9
    assert rows(calibration_batches(tokenizer, DOCUMENTS, 4, 1)) == [[[9, 1, 2, 3]]]
    batches = calibration_batches(tokenizer, DOCUMENTS, 4, 1, bos_token_id=7)
    assert rows(batches) == [[[7, 1, 2, 3]]]


@pytest.mark.parametrize("name", ["seq_length", "num_batches", "batch_size"])
@pytest.mark.parametrize("number", [0, -1, True, 1.5, "2"])
def test_numbers_must_be_positive_integers(name, number):
    numbers = {"seq_length": 4, "num_batches": 1, "batch_size": 1, name: number}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
        calibration_batches(Letters(), DOCUMENTS, **numbers)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent\.jsonl"):
        calibration_batches(Letters(), tmp_path / "absent.jsonl", 4, 1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_in_the_encodings_of_editors(tmp_path, encoding):
    plain = tmp_path / "text.txt"
    plain.write_text("abcdefgh", encoding=encoding)
    assert rows(calibration_batches(Letters(), plain, 4, 2)) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"words": "b"}\n', r"bad\.jsonl, line 2: .*text.* required"),
        ("bad.jsonl", b"{", r"bad\.jsonl, line 1 is not JSON"),
        ("bad.json", b'{"text": "a"}', r"bad\.json: a list of documents"),
        ("bad.json", b'["a", 3]', r"bad\.json, \[1\]: .*text.* required, got '3'"),
        ("bad.json", b"[" * 100_000, r"bad\.json is nested too deeply"),
        ("bad.csv", b"words\nb\n", r"bad\.csv: a column 'text' is required, got \['words'\]"),
        ("bad.csv", b"id,text\n1,ab\n2\n", r"bad\.csv, line 3: 2 columns .* required, got 1; put"),
        ("bad.csv", b"id,text\n1,a,b\n", r"bad\.csv, line 2: 2 columns .* required, got 3; put"),
        ("bad.csv", b'id,text\n1,""\n2,\n', r"bad\.csv: a document .* required, all 2 are null"),
        ("bad.jsonl", b'{"text": null}\nnull\n', r"bad\.jsonl: a document .*, all 2 are null"),
        ("bad.txt", b"caf\xe9", r"bad\.txt: text in UTF-8 is required, but byte 3"),
        ("bad.parquet", b"PAR1\x80", r"bad\.parquet: a Parquet file is required"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=message):
        calibration_batches(Letters(), tmp_path / name, 2, 2)


# ----------------------------------------------------------------------- fields, chats and files


class Chatting(Letters):
    """Writes a chat as its contents, the user's in capitals."""

    chat_template = "…"

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        if messages[0]["role"] == "system":
            raise RuntimeError("no system role")
        texts = [m["content"].upper() if m["role"] == "user" else m["content"] for m in messages]
        return "".join(texts).lower()


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": each} for n, each in enumerate(contents)]


@pytest.mark.parametrize("field", ["content", "messages", "conversations"])
def test_fields_are_found(tmp_path, field):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in DOCUMENTS))
    expected = rows(calibration_batches(Letters(), DOCUMENTS, 4, 3))
    assert rows(calibration_batches(Letters(), file, 4, 3)) == expected


@pytest.mark.parametrize("end", [".jsonl", ".json", ".csv", ".parquet"])
def test_fields_are_chosen(tmp_path, end):
    file, expected = tmp_path / f"text{end}", rows(calibration_batches(Letters(), DOCUMENTS, 4, 3))
    entries = [{"text": "zzz", "story": text} for text in DOCUMENTS]
    match end:
        case ".jsonl":
            file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        case ".json":
            file.write_text(json.dumps(entries))
        case ".csv":
            file.write_text("text,story\n" + "".join(f"zzz,{text}\n" for text in DOCUMENTS))
        case ".parquet":
            parquet = pytest.importorskip("pyarrow.parquet")
            table = importlib.import_module("pyarrow").Table.from_pylist(entries)
            parquet.write_table(table, file)
    assert rows(calibration_batches(Letters(), file, 4, 3, text_field="story")) == expected
    assert rows(calibration_batches(Letters(), file, 4, 2)) != expected[:2]
    with pytest.raises(CorruptFileError, match=r"'tale' is required, got .*text.*story"):
        calibration_batches(Letters(), file, 4, 3, text_field="tale")


@pytest.mark.parametrize("end", [".jsonl", ".json", ".csv", ".parquet"])
def test_documents_that_are_null_are_left_out_and_counted(tmp_path, caplog, end):
    file = tmp_path / f"text{end}"
    texts = [None, *DOCUMENTS, None]
    match end:
        case ".jsonl":
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        case ".json":
            file.write_text(json.dumps(texts))
        case ".csv":
            file.write_text("id,text\n" + "".join(f"1,{text or ''}\n" for text in texts))
        case ".parquet":
            pa = pytest.importorskip("pyarrow")
            importlib.import_module("pyarrow.parquet").write_table(pa.table({"text": texts}), file)
    expected = rows(calibration_batches(Letters(), DOCUMENTS, 4, None))
    assert rows(calibration_batches(Letters(), file, 4, None)) == expected
    assert f"{file}: 2 documents are null and left out" in caplog.text


def test_a_field_that_is_null_leaves_the_word_to_another(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": None, "content": t}) + "\n" for t in DOCUMENTS))
    expected = rows(calibration_batches(Letters(), DOCUMENTS, 4, 3))
    assert rows(calibration_batches(Letters(), file, 4, 3)) == expected


def test_chats_go_through_the_template(tmp_path):
    file = tmp_path / "chats.jsonl"
    chats = [chat("ab", "cd"), chat("efgh")]
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in chats))
    expected = rows(calibration_batches(Letters(), ["abcd", "efgh"], 5, 2))
    assert rows(calibration_batches(Chatting(), file, 5, 2)) == expected
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 1: .*chat template is required"):
        calibration_batches(Letters(), file, 5, 2)
    file.write_text(json.dumps({"messages": [{"role": "system", "content": "a"}]}))
    with pytest.raises(ValueError, match=r"line 1: the chat template .*no system role"):
        calibration_batches(Chatting(), file, 5, 2)
    file.write_text(json.dumps({"messages": [{"from": "user", "value": "a"}]}))
    with pytest.raises(CorruptFileError, match=r'line 1: .*"role": "user", "content"'):
        calibration_batches(Chatting(), file, 5, 2)


def test_a_start_that_the_template_wrote_is_not_written_twice(tmp_path):
    """By its text; a document that happens to begin with the same token has a start too."""
    file, tokenizer = tmp_path / "chats.jsonl", Chatting()
    tokenizer.bos_token, tokenizer.bos_token_id = "a", 1
    file.write_text(json.dumps({"messages": chat("ab", "cd")}) + "\n")
    assert rows(calibration_batches(tokenizer, file, 4, 1)) == [[[1, 2, 3, 4]]]
    assert rows(calibration_batches(tokenizer, ["abcd"], 4, 1)) == [[[1, 1, 2, 3]]]


def test_files_give_equal_shares_in_turn(tmp_path, caplog):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("abcdefgh" * 2)
    two.write_text("hgfedcba")
    parts = [rows(calibration_batches(Letters(), file, 4, None)) for file in (one, two)]
    assert list(map(len, parts)) == [4, 2]
    turns = [parts[0][0], parts[1][0], parts[0][1], parts[1][1]]
    with caplog.at_level("INFO"):
        assert rows(calibration_batches(Letters(), [one, str(two)], 4, 4)) == turns
    assert f"2 of {one}, 2 of {two}" in caplog.text
    assert rows(calibration_batches(Letters(), [one, two], 4, 3)) == turns[:3]
    assert rows(calibration_batches(Letters(), [one, two], 4, None)) == turns
    with pytest.raises(ValueError, match=r"two\.txt, whose share .* 3 windows .* enough for 2"):
        calibration_batches(Letters(), [one, two], 4, 6)
    with pytest.raises(ValueError, match="a window of each file"):
        calibration_batches(Letters(), [one, two], 4, 1)
    with pytest.raises(TypeError, match="got both"):
        calibration_batches(Letters(), [one, "abc"], 4, 1)


def test_a_parquet_file_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    file = tmp_path / "text.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"aimet-ext\[parquet\]"):
        calibration_batches(Letters(), file, 4, 1)


def test_a_long_cell_is_read(tmp_path):
    file = tmp_path / "text.csv"
    file.write_text("text\n" + "abcd" * 50_000 + "\n")
    assert len(calibration_batches(Letters(), file, 1000, None)) == 200
