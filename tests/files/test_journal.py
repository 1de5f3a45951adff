"""Undo journal and checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.tensors import Checkpoints, UndoJournal, environment, hash_tensors

TENSORS = {
    "self_attn.q_proj.weight": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "flag": torch.tensor(True),
    "nothing": torch.empty(0, 3),
}
META = {"frozen": {"a": True}, "bits": [2, 3], "loss": 0.1}
RUN = {"settings": {"steps": 800, "rates": [0.01]}, "weights": "aa", "data": "bb", "threads": 1}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


@pytest.fixture(params=["memory", "disk"])
def journal(request, tmp_path):
    return UndoJournal(tmp_path / "undo" if request.param == "disk" else None)


def test_journal_gives_back_what_it_was_given(journal):
    """Later changes of the tensors, of the metadata and of what came out do not reach it."""
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    tensors["tied"] = tensors["half"]
    meta = json.loads(json.dumps(META))
    journal.save("model.layers.0", tensors, meta)
    journal.save("a/b c", {}, {})
    tensors["half"].zero_()
    meta["bits"].clear()
    for _ in range(2):
        restored, restored_meta = journal.restore("model.layers.0")
        assert_equal(restored, {**TENSORS, "tied": TENSORS["half"]})
        assert restored_meta == META
        restored["half"].zero_()
        restored_meta.clear()
    assert journal.keys() == ("model.layers.0", "a/b c")


def test_journal_keeps_the_first_original(journal):
    """A second save would store what a transform made, so that nothing could be undone."""
    journal.save("block", TENSORS, META)
    with pytest.raises(ValueError, match="original of 'block'"):
        journal.save("block", {}, {})
    assert_equal(journal.restore("block")[0], TENSORS)


def test_journal_clears_only_its_own(journal, tmp_path):
    """Files of the user in the same folder stay."""
    journal.save("block", TENSORS, META)
    folder = tmp_path / "undo"
    if folder.is_dir():
        (folder / "notes.txt").touch()
    journal.clear()
    assert journal.keys() == ()
    assert "block" not in journal
    with pytest.raises(KeyError):
        journal.restore("block")
    if folder.is_dir():
        assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_journal_entry_that_failed_is_absent(tmp_path, monkeypatch):
    """Ctrl-C while an entry is written leaves neither the key nor a file."""

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    journal = UndoJournal(tmp_path)
    monkeypatch.setattr("aimet_ext.files.tensors.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        journal.save("block", TENSORS, META)
    assert journal.keys() == ()
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_resume(tmp_path):
    """The same run finds its blocks, and no others."""
    first = Checkpoints(tmp_path / "run", RUN)
    assert 0 not in first
    for index in (0, 1, 3):
        first.save(index, TENSORS, {**META, "block": index})
    again = Checkpoints(tmp_path / "run", RUN)
    assert 0 in again
    assert 1 in again
    assert 3 in again
    assert 2 not in again
    tensors, meta = again.load(1)
    assert_equal(tensors, TENSORS)
    assert meta == {**META, "block": 1}
    assert (tmp_path / "run" / "block_00001.safetensors").exists()
    with pytest.raises(FileNotFoundError):
        again.load(2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": "cc"}, "weights was 'aa' and is 'cc'"),
        ({"data": "cc"}, "data was 'bb' and is 'cc'"),
        ({"settings": {"steps": 9, "rates": [0.01]}}, "settings.steps was 800 and is 9"),
        ({"settings": {"steps": 800}}, r"settings.rates was \[0.01\] and is 'absent'"),
        ({"seed": 3}, "seed was 'absent' and is 3"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path, change, named):
    """Nothing of the folder is touched."""
    Checkpoints(tmp_path, RUN).save(0, TENSORS, META)
    with pytest.raises(ValueError, match=named):
        Checkpoints(tmp_path, {**RUN, **change})
    assert 0 in Checkpoints(tmp_path, RUN)


def test_another_environment_warns(tmp_path):
    """Versions and threads decide the last bits only: a warning that names them."""
    run = {**RUN, **environment()}
    Checkpoints(tmp_path, run).save(0, TENSORS, META)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Checkpoints(tmp_path, {**RUN, **environment()})
    other = {**run, "threads": 99, "versions": {**run["versions"], "torch": "0.1"}}
    with pytest.warns(UserWarning, match=r"threads was .* is 99; versions.torch was .* is '0.1'"):
        moved = Checkpoints(tmp_path, other)
    assert_equal(moved.load(0)[0], TENSORS)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 30, -1])
def test_every_flipped_bit_is_found(tmp_path, position):
    """In the length, in the header and in the values."""
    checkpoints = Checkpoints(tmp_path, RUN)
    checkpoints.save(0, TENSORS, META)
    flip(tmp_path / "block_00000.safetensors", position)
    with pytest.raises(CorruptFileError, match=r"block_00000\.safetensors"):
        checkpoints.load(0)


def test_truncated_foreign_and_moved_files_are_refused(tmp_path):
    """Each by the name of the file."""
    checkpoints = Checkpoints(tmp_path / "a", RUN)
    checkpoints.save(0, TENSORS, META)
    path = tmp_path / "a" / "block_00000.safetensors"
    content = path.read_bytes()
    path.with_name("block_00001.safetensors").write_bytes(content)
    with pytest.raises(
        CorruptFileError, match=r"00001.* not the checkpoint of block 1 of this run"
    ):
        checkpoints.load(1)
    other = Checkpoints(tmp_path / "b", {**RUN, "data": "cc"})
    (tmp_path / "b" / path.name).write_bytes(content)
    with pytest.raises(CorruptFileError, match="block 0 of this run"):
        other.load(0)
    for damaged in (content[:-1], content[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"00000\.safetensors is damaged"):
            checkpoints.load(0)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(CorruptFileError, match=r"00000\.safetensors must be a file of format"):
        checkpoints.load(0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "else"}', "\xff"])
def test_a_damaged_record_is_refused(tmp_path, text):
    """Without the record nobody can tell which run the checkpoints belong to."""
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptFileError, match=r"run\.json"):
        Checkpoints(tmp_path, RUN)


def test_a_missing_record_is_refused(tmp_path):
    """Checkpoints that nobody vouches for are not taken for this run's."""
    Checkpoints(tmp_path, RUN).save(0, TENSORS, META)
    (tmp_path / "run.json").unlink()
    with pytest.raises(CorruptFileError, match=r"run.json is missing"):
        Checkpoints(tmp_path, RUN)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """The parameter, the path and the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="checkpoint_dir must be a folder"):
        Checkpoints(tmp_path / "file" / "inside", RUN)


KILLED = """
import itertools, sys, torch
from aimet_ext.files.tensors import Checkpoints

checkpoints = Checkpoints(sys.argv[1], {"data": "bb"})
for step in itertools.count():
    checkpoints.save(step % 4, {"x": torch.full((1 << 18,), float(step))}, {"step": step})
    if step == 0:
        print("writing", flush=True)
"""


def test_a_run_killed_while_it_writes_leaves_whole_files(tmp_path):
    """kill -9 at several moments: every file that is there loads, old or new, and no other."""
    for moment in (0.05, 0.13):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        with process:
            assert process.stdout.readline() == b"writing\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(moment)
            process.send_signal(signal.SIGKILL)
        checkpoints = Checkpoints(tmp_path, {"data": "bb"})
        files = {path.name for path in tmp_path.iterdir()}
        done = [index for index in range(4) if index in checkpoints]
        assert files == {"run.json", *(f"block_{index:05d}.safetensors" for index in done)}
        for index in done:
            tensors, meta = checkpoints.load(index)
            assert bool((tensors["x"] == meta["step"]).all())
        checkpoints.close()
    assert done


def test_a_folder_serves_one_process_at_a_time(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    first = Checkpoints(tmp_path, {"data": "bb"})
    second = Checkpoints(tmp_path, {"data": "bb"})  # of this process, as after an error
    for still in (first, second):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "is in use by another process" in refused.stderr
        still.close()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(ValueError, match=r"checkpoint_dir .* is in use by another process"):
            Checkpoints(tmp_path, {"data": "bb"})
        process.kill()
    Checkpoints(tmp_path, {"data": "bb"})


CRASHED = """
import os, sys, torch
from pathlib import Path
from aimet_ext.files.tensors import Checkpoints

checkpoints = Checkpoints(sys.argv[1], {"data": "bb"})
checkpoints.save(0, {"x": torch.zeros(4)}, {})
for index in (0, 1):
    if (child := os.fork()) == 0:
        # What safetensors writes before it moves its file to the name it was given.
        Path.replace = lambda path, _: os._exit(9 + (path.parent / ".tmp123").write_bytes(b""))
        checkpoints.save(index, {"x": torch.ones(4)}, {})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
"""


def test_a_run_killed_before_the_last_step_of_a_write(tmp_path):
    """The old file counts, and the next run removes what was left beside it."""
    subprocess.run([sys.executable, "-c", CRASHED, str(tmp_path)], check=True)
    assert len(list(tmp_path.glob(".*.scratch"))) == 2
    checkpoints = Checkpoints(tmp_path, {"data": "bb"})
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "block_00000.safetensors"}
    assert 0 in checkpoints
    assert 1 not in checkpoints
    assert torch.equal(checkpoints.load(0)[0]["x"], torch.zeros(4))


def test_hash_tells_apart_what_differs():
    """Names, dtypes, shapes, values and order all count; strides do not."""
    x = torch.arange(6, dtype=torch.int32).view(2, 3)
    variants = [
        [("x", x)],
        [("y", x)],
        [("x", x.view(3, 2))],
        [("x", x.view(torch.float32))],
        [("x", x + 1)],
        [("x", x), ("y", x)],
        [("y", x), ("x", x)],
        [("x", x[:0])],
        [],
    ]
    assert len({hash_tensors(items) for items in variants}) == len(variants)
    assert hash_tensors([("x", x.T)]) == hash_tensors([("x", x.T.contiguous())])
    assert hash_tensors(iter([("x", torch.tensor(1.0, dtype=torch.bfloat16))]))


def test_what_a_checkpoint_leads_to_names_its_file(tmp_path):
    """Its hash is right, and its content is not what the run can take."""
    checkpoints = Checkpoints(tmp_path, RUN)
    checkpoints.save(0, {"x": torch.tensor([1.0, float("nan")])}, {})
    checkpoints.save(1, {"x": torch.ones(2)}, {"reports": 3})
    with pytest.raises(CorruptFileError, match=r"block_00000.*finite numbers are required, but x"):
        checkpoints.resuming(0).__enter__()
    problem = pytest.raises(CorruptFileError, match=r"block_00001\.safetensors: .*TypeError")
    with problem, checkpoints.resuming(1) as (_, meta):
        list(meta["reports"])
