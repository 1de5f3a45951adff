"""Output folders are complete or absent, and nobody else's files are touched."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from aimet_ext.errors import CorruptFileError
from aimet_ext.files import folders, manifest, scratch
from aimet_ext.files.folders import check_output, replace_file, replace_folder
from aimet_ext.files.manifest import MANIFEST, is_ours, read_manifest, write_manifest


def write(path: pathlib.Path, text: str) -> None:
    with replace_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)
        write_manifest(folder, "test", note="x")


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_written_and_replaced(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out, "one")
    write(out, "two")
    assert (out / "sub" / "a.txt").read_text() == "two"
    assert names(out.parent) == ["out"]
    assert read_manifest(out)["files"].keys() == {"sub/a.txt"}


def test_an_empty_folder_is_taken(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "one")
    assert is_ours(tmp_path)


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_works_without_an_exchange_in_one_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    write(tmp_path / "out", "one")
    write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_a_foreign_folder_is_refused_untouched(tmp_path: pathlib.Path) -> None:
    thesis = tmp_path / "out" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        check_output(tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds other files"):
        write(tmp_path / "out", "one")
    assert thesis.read_text() == "years of work"
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["thesis.txt"]


def test_a_foreign_manifest_does_not_make_a_folder_ours(tmp_path: pathlib.Path) -> None:
    (tmp_path / MANIFEST).write_text('{"name": "a web app"}')
    with pytest.raises(FileExistsError):
        check_output(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError, match="a file of that name"):
        check_output(tmp_path / "out")


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="choose another path"):
        check_output(tmp_path / "file" / "out")
    if pathlib.Path("/proc/self").is_dir():
        with pytest.raises(PermissionError, match="choose another path"):
            check_output("/proc/out")


def test_checking_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    check_output(tmp_path / "a" / "b")
    assert names(tmp_path) == []


def test_an_exception_leaves_the_old_folder(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "out", "one")

    def fail() -> None:
        with replace_folder(tmp_path / "out") as folder:
            (folder / "half.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["out"]


def test_a_killed_process_leaves_the_old_folder(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "out", "one")
    script = f"""
        import os, signal
        from aimet_ext.files.folders import replace_folder
        with replace_folder({str(tmp_path / "out")!r}) as folder:
            (folder / "half.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode
    assert code == -9
    assert read_manifest(tmp_path / "out")["kind"] == "test"
    assert names(tmp_path / "out") == [MANIFEST, "sub"]


def test_a_failed_move_puts_the_old_folder_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "one")
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    rename = pathlib.Path.rename

    def fail_second(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if self.suffix == ".scratch":
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_second)
    with pytest.raises(OSError, match="disk on fire"):
        write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "one"


def test_a_replaced_file_is_whole(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "a", b"one")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        replace_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("fault", ["absent", "shorter", "changed"])
def test_a_manifest_names_the_file_that_differs(tmp_path: pathlib.Path, fault: str) -> None:
    write(tmp_path, "content")
    file = tmp_path / "sub" / "a.txt"
    if fault == "absent":
        file.unlink()
    else:
        file.write_text({"shorter": "conten", "changed": "Content"}[fault])
    with pytest.raises(CorruptFileError, match=r"sub/a\.txt"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, verify=False)["note"] == "x"


@pytest.mark.parametrize("change", [("x", "y"), ("{", "["), ("/1", "/2")])
def test_a_changed_manifest_is_noticed(tmp_path: pathlib.Path, change: tuple[str, str]) -> None:
    write(tmp_path, "content")
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace(f'"{change[0]}"', f'"{change[1]}"').replace(*change))
    with pytest.raises(CorruptFileError):
        read_manifest(tmp_path)


def test_a_folder_without_manifest_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="written by aimet_ext"):
        read_manifest(tmp_path)


# ------------------------------------------------------------------------- files of others


def with_others(out: pathlib.Path) -> dict[str, bytes]:
    write(out, "one")
    (out / "notes.txt").write_text("mine")
    (out / "sub" / "mine.txt").write_text("mine too")
    (out / "empty").mkdir()
    (out / "link").symlink_to("notes.txt")
    return {"notes.txt": b"mine", "sub/mine.txt": b"mine too", "link": b"mine"}


@pytest.mark.parametrize("way", ["exchanged", "renamed", "current", "mounted", "closed parent"])
def test_files_of_others_are_kept(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    out = tmp_path / "out"
    theirs = with_others(out)
    inode = out.stat().st_ino
    if way == "renamed":
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    if way == "current":
        monkeypatch.chdir(out / "sub")
    if way == "mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: pathlib.Path(path) == out)
    if way == "closed parent":
        monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != tmp_path)
    write(out, "two")
    assert {name: (out / name).read_bytes() for name in theirs} == theirs
    assert (out / "link").is_symlink() and (out / "empty").is_dir()
    assert read_manifest(out)["files"].keys() == {"sub/a.txt"}
    assert (out / "sub" / "a.txt").read_text() == "two" and names(tmp_path) == ["out"]
    assert names(out) == ["empty", "link", MANIFEST, "notes.txt", "sub"]
    if way not in ("exchanged", "renamed"):
        assert out.stat().st_ino == inode
    if way == "current":
        assert pathlib.Path.cwd() == out / "sub"


@pytest.mark.parametrize("current", [False, True])
def test_files_that_are_not_written_again_are_removed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, current: bool
) -> None:
    out = tmp_path / "out"
    write(out, "one")
    if current:
        monkeypatch.chdir(out)
    with replace_folder(out) as folder:
        (folder / "b.txt").write_text("two")
        write_manifest(folder, "test")
    assert names(out) == ["b.txt", MANIFEST]


def test_a_file_of_others_is_not_overwritten(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    write(out, "one")
    (out / "b.txt").write_text("mine")

    def again() -> None:
        with replace_folder(out) as folder:
            (folder / "b.txt").write_text("two")
            write_manifest(folder, "test")

    with pytest.raises(FileExistsError, match=r"b\.txt would be replaced.*did not write"):
        again()
    assert (out / "b.txt").read_text() == "mine" and read_manifest(out)


@pytest.mark.parametrize("path", [".", "./"])
def test_the_current_folder_stays_current(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write(path, "one")  # type: ignore[arg-type]
    assert pathlib.Path().stat().st_ino == pathlib.Path.cwd().stat().st_ino
    assert names(tmp_path / "work") == [MANIFEST, "sub"] and read_manifest(".")


def test_a_failure_leaves_the_current_folder_as_it_was(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "one")
    monkeypatch.chdir(tmp_path)

    def failing() -> None:
        with replace_folder(".") as folder:
            (folder / "b.txt").write_text("two")
            raise RuntimeError("none")

    with pytest.raises(RuntimeError, match="none"):
        failing()
    assert names(tmp_path) == [MANIFEST, "sub"] and read_manifest(tmp_path)


def test_an_empty_path_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r'output path must name a folder, got ""'):
        check_output("")
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.manifest import write_manifest

with replace_folder(sys.argv[1]) as folder:
    (folder / "a.txt").write_text("two")
    write_manifest(folder, "test")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("current", [False, True])
def test_what_a_killed_run_left_goes_with_the_next(tmp_path: pathlib.Path, current: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    where = {"cwd": out, "path": "."} if current else {"cwd": tmp_path, "path": "out"}
    command = [sys.executable, "-c", KILLED, where["path"]]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(folders.__file__).parents[2])}
    subprocess.run(command, cwd=where["cwd"], env=environment, check=False)
    assert len(list(tmp_path.rglob("*.scratch"))) == 1
    write(out, "one")
    assert names(tmp_path) == ["out"] and names(out) == [MANIFEST, "sub"]


def test_what_another_process_writes_is_left_to_it(tmp_path: pathlib.Path) -> None:
    with replace_folder(tmp_path / "out") as folder:
        (folder / "b.txt").write_text("two")
        write_manifest(folder, "test")
        code = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "")
        command = [sys.executable, "-c", code, str(tmp_path / "out")]
        environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(folders.__file__).parents[2])}
        subprocess.run(command, env=environment, check=True)
        assert (folder / "b.txt").is_file()
    assert names(tmp_path / "out") == ["b.txt", MANIFEST]


BETWEEN = """
import os, signal, sys
from pathlib import Path
from aimet_ext.files import folders
from aimet_ext.files.manifest import write_manifest

def rename_and_die(path, target, rename=Path.rename):
    rename(path, target)
    if target.suffix == ".old":
        os.kill(os.getpid(), signal.SIGKILL)

folders._exchange = lambda one, other: False
Path.rename = rename_and_die
with folders.replace_folder(sys.argv[1]) as folder:
    (folder / "a.txt").write_text("two")
    write_manifest(folder, "test")
"""


def run_killed(code: str, *arguments: str) -> None:
    """Run code in another process, which kills itself."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(folders.__file__).parents[2])}
    command = [sys.executable, "-c", code, *arguments]
    assert subprocess.run(command, env=environment, check=False).returncode == -9


def test_a_run_killed_between_two_renames_loses_nothing(tmp_path: pathlib.Path) -> None:
    """Where the file system cannot exchange two names: the next run puts the old folder back."""
    write(tmp_path / "out", "one")
    run_killed(BETWEEN, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match=r"a killed run moved it to .*\.scratch\.old$"):
        read_manifest(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "out") as folder:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "one"
    assert read_manifest(tmp_path / "out")["kind"] == "test"
    assert names(tmp_path) == ["out"]


KILLED_IN_SCRATCH = """
import os, signal, sys
from pathlib import Path
from aimet_ext.files import scratch

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

scratch.shutil.rmtree = die
{}
"""


@pytest.mark.parametrize(
    "work",
    [
        "from aimet_ext.files.folders import replace_file; replace_file(Path(sys.argv[1]), b'two')",
        "from aimet_ext.files.folders import check_writable; check_writable(sys.argv[1])",
        "scratch.tempfile.tempdir = os.path.dirname(sys.argv[1])\nwith scratch.temporary(): pass",
    ],
    ids=["file", "check", "temporary"],
)
def test_scratch_folders_of_killed_runs_go_with_the_next(tmp_path: pathlib.Path, work: str) -> None:
    code = KILLED_IN_SCRATCH.format(work)
    for _ in range(2):
        run_killed(code, str(tmp_path / "out.json"))
        assert len(list(tmp_path.glob("*.scratch"))) == 1  # its own; that of the first is gone


def test_a_scratch_folder_taken_for_abandoned_is_made_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may remove it in the moment before it is held."""
    hold, removed = scratch.hold, []

    def late(folder: pathlib.Path) -> bool:
        if not removed:
            removed.append(folder)
            folder.rmdir()
        return hold(folder)

    monkeypatch.setattr(scratch, "hold", late)
    with scratch.scratch(tmp_path, "x") as folder:
        assert list(tmp_path.iterdir()) == [folder] != removed
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["../a.txt", "/etc/passwd", "sub/../../a.txt", "..\\a.txt", ""])
@pytest.mark.parametrize("field", ["files", "prefix"])
def test_a_manifest_names_files_of_its_folder_alone(
    tmp_path: pathlib.Path, name: str, field: str
) -> None:
    write(tmp_path / "out", "one")
    content = json.loads((tmp_path / "out" / MANIFEST).read_text())
    entry = content["files"]["sub/a.txt"]
    content |= {"files": {name: entry}} if field == "files" else {"prefix": name}
    content["sha256"] = manifest._digest(content)
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="a file below the folder is required"):
        read_manifest(tmp_path / "out")


def test_links_out_of_a_folder_are_refused(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "out", "one")
    file = tmp_path / "out" / "sub" / "a.txt"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptFileError, match=r"sub/a\.txt is a link to another place"):
        read_manifest(tmp_path / "out")
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(CorruptFileError, match=r"sub/a\.txt is absent"):
        read_manifest(tmp_path / "out")
