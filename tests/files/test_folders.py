"""Output folders are complete or absent, and nobody else's files are touched."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from aimet_ext.errors import CorruptFileError
from aimet_ext.files import folders
from aimet_ext.files.folders import (
    MANIFEST,
    check_output,
    is_ours,
    read_manifest,
    replace_file,
    replace_folder,
    write_manifest,
)


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
        if self.suffix == ".partial":
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
