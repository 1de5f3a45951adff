"""Windows of token ids: documents joined, each after BOS, cut without overlap."""

from __future__ import annotations

import json

import pytest
import torch

from aimet_ext import CorruptFileError
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
        ("bad.txt", b"caf\xe9", r"bad\.txt: text in UTF-8 is required, but byte 3"),
        ("bad.parquet", b"PAR1\x80", r"bad\.parquet: text in UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=message):
        calibration_batches(Letters(), tmp_path / name, 2, 2)
