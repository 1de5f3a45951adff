"""What commands write, and where: results on stdout, all else on stderr and in a log file."""

from __future__ import annotations

import json
import logging
import math
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from aimet_ext import cli, progress
from aimet_ext.artifact import inspect

TEXT, OUT = ("--text", "text.txt"), ("--output", "out")
REQUIRED: dict[str, tuple[str, ...]] = {
    "quantize": (".", *OUT),
    "recipes": (),
    "assign-widths": (".", "--calibration", "text.txt", "--budget", "4", *OUT),
    "evaluate": (".", *TEXT),
    "analyze": (".", *TEXT),
    "inspect": (".",),
    "olive-config": (),
    "report": (".",),
    "verify": (".",),
    "demo": (),
    "lora fold": (".", "--scales", "text.txt", *OUT),
    "lora quantize": (".", ".", "--calibration", "text.txt", *OUT),
}
"""Arguments without which a command does not begin."""

OPTIONS = ("--json", "--quiet", "--verbose", "--log-file")
SAID = {
    "debug": "ours, in detail",
    "info": "ours, of use",
    "warning": "ours, a warning",
    "error": "ours, an error",
}
CHATTER = {
    *("theirs, of use", "theirs, a warning", "theirs, printed", "theirs, warned"),
    "theirs, with a handler",
}


def run(*arguments: str | pathlib.Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def commands(group: Any, *before: str) -> Iterator[tuple[str, ...]]:
    for name, each in group.commands.items():
        if hasattr(each, "commands"):
            yield from commands(each, *before, name)
        else:
            yield (*before, name)


ALL = list(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_command_has_the_options_of_output(command: tuple[str, ...]) -> None:
    shown = run(*command, "--help")
    assert shown.exit_code == 0
    for option in OPTIONS:
        assert option in shown.stdout, option


def test_completion_is_offered() -> None:
    shown = run("--help").stdout
    assert "--install-completion" in shown and "--show-completion" in shown
    assert {"quantize", "verify", "lora"} <= completed("aimet-ext ", 1)
    assert completed("aimet-ext quantize --technique gp", 3) == {"gptq"}
    assert "w4a16-fast" in completed("aimet-ext quantize --recipe w4", 3)


def completed(words: str, place: int) -> set[str]:
    asked = {"_AIMET_EXT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    return set(CliRunner().invoke(cli.app, [], env=asked, prog_name="aimet-ext").stdout.split())


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder whose inspection is talked about by all sides, and fails."""

    def talk(_: Any) -> None:
        ours, theirs = logging.getLogger("aimet_ext.talk"), logging.getLogger("transformers.talk")
        for level, text in SAID.items():
            getattr(ours, level)(text)
        theirs.setLevel(logging.INFO)
        theirs.info("theirs, of use")
        theirs.warning("theirs, a warning")
        theirs.error("theirs, an error")
        own = logging.getLogger("Quant-like")
        own.propagate = False
        own.addHandler(logging.StreamHandler(sys.__stdout__))
        own.warning("theirs, with a handler")
        print("theirs, printed")  # noqa: T201
        warnings.warn_explicit("theirs, warned", FutureWarning, "x.py", 1, "torch.onnx")
        with progress.steps("look", 1):
            progress.step("at files")
        raise ValueError("no such thing")

    monkeypatch.setattr(inspect, "inspect_export", talk)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "levels", "theirs", "bars"),
    [
        ((), ("info", "warning", "error"), False, True),
        (("--quiet",), ("error",), False, False),
        (("--verbose",), tuple(SAID), True, True),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_shown(
    folder: pathlib.Path,
    options: tuple[str, ...],
    levels: tuple[str, ...],
    theirs: bool,
    bars: bool,
) -> None:
    done = run("inspect", folder, *options)
    assert done.exit_code == 3 and done.stdout == ""
    for level, text in SAID.items():
        assert (text in done.stderr) == (level in levels), text
    assert "theirs, an error" in done.stderr
    for text in CHATTER:
        assert (text in done.stderr) == theirs, text
    assert ("look:" in done.stderr) == bars
    assert "aimet-ext: no such thing" in done.stderr


def test_a_log_file_keeps_all_with_times(folder: pathlib.Path) -> None:
    log = folder / "log.txt"
    log.write_text("before\n")
    done = run("inspect", folder, "--quiet", "--log-file", log)
    assert done.exit_code == 3
    found = log.read_text("utf-8")
    for text in (*SAID.values(), *CHATTER, "theirs, an error", "at files", "no such thing"):
        assert text in found, text
    assert "Traceback" in found and found.startswith("before\n")
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ INFO aimet_ext", found, re.MULTILINE)


def test_a_log_file_that_cannot_be_written_ends_with_4(tmp_path: pathlib.Path) -> None:
    done = run("recipes", "--log-file", tmp_path / "absent" / "log.txt")
    assert done.exit_code == 4 and "log.txt" in done.stderr and done.stdout == ""


def test_handlers_of_our_own_loggers_hear_messages_too(folder: pathlib.Path) -> None:
    """As recorders of runs have them; other libraries' are for screens."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("aimet_ext").addHandler(handler)
    try:
        run("inspect", folder, "--quiet")
    finally:
        logging.getLogger("aimet_ext").removeHandler(handler)
    assert heard == [SAID["warning"], SAID["error"]]


def test_logging_is_as_before_afterwards(folder: pathlib.Path) -> None:
    def state() -> tuple[Any, ...]:
        level = logging.getLogger("aimet_ext").level
        return logging.Logger.callHandlers, level, sys.stdout, warnings.showwarning

    before, during = state(), list[Any]()
    handler = logging.Handler()
    handler.emit = lambda _: during.append(state())  # type: ignore[method-assign]
    logging.getLogger("aimet_ext").addHandler(handler)
    try:
        run("inspect", folder, "--verbose")
    finally:
        logging.getLogger("aimet_ext").removeHandler(handler)
    assert state() == before
    assert all(now != then for now, then in zip(during[0], before, strict=True))


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_quiet_and_verbose_exclude_each_other(
    command: tuple[str, ...], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every command, given all that it requires."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    done = run(*command, *REQUIRED[" ".join(command)], "--quiet", "--verbose")
    assert done.exit_code == 2 and "not both" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_a_line_that_is_printed_in_parts_is_one_message(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(_: Any) -> None:
        print("layers", 12, "of", 24, end="\n100 % sure\n")  # noqa: T201
        print("no", "end", sep=" ", end="")  # noqa: T201
        raise ValueError("no such thing")

    monkeypatch.setattr(inspect, "inspect_export", talk)
    lines = run("inspect", tmp_path, "--verbose").stderr.splitlines()
    said = [line for line in lines if line.startswith("stdout:")]
    texts = ("layers 12 of 24", "100 % sure", "no end")
    assert said == [f"stdout: warning: {text}" for text in texts]


def test_json_has_null_for_numbers_that_it_lacks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"losses": (math.inf, 1.5), "worst": {"kl": math.nan}}
    monkeypatch.setattr(inspect, "inspect_export", lambda _: found)
    monkeypatch.setattr("aimet_ext.cli.summary.summary", str)
    assert json.loads(run("inspect", tmp_path, "--json").stdout) == {
        "losses": [None, 1.5],
        "worst": {"kl": None},
    }
    from aimet_ext.techniques.range_report import ActivationRangesReport

    losses = {"kl_before": math.inf, "kl_after": 0.5}
    report = ActivationRangesReport(ranges=(), **losses, kept=0, seconds=1.0)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["kl_before"] is None


def test_results_alone_are_on_stdout() -> None:
    done = run("recipes", "--json", "--verbose")
    assert {"w4a16"} <= {recipe["name"] for recipe in json.loads(done.stdout)}
