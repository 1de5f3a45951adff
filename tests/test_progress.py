"""Progress: bars in a terminal, lines in a log, steps with what they are."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable

import pytest

from aimet_ext import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Reader of stderr, which is no terminal, with hundredths in place of seconds."""
    monkeypatch.setattr(progress, "DELAY", 0.02)
    monkeypatch.setattr(progress, "EVERY", 0.3)
    return lambda: capsys.readouterr().err


def test_a_log_gets_few_whole_lines(log: Callable[[], str]) -> None:
    for _ in progress.bar(range(20), "score"):
        time.sleep(0.01)
    shown = log()
    lines = shown.splitlines()
    assert 2 <= len(lines) <= 4 and all(line.startswith("score: ") for line in lines)
    assert "20/20" in lines[-1] and "\r" not in shown


def test_a_log_is_told_nothing_of_short_work(log: Callable[[], str]) -> None:
    assert list(progress.bar(range(3), "score")) == [0, 1, 2]
    with progress.bar(desc="layers", total=1) as bar:
        bar.set_postfix_str("first")
        bar.update(1)
    assert log() == ""


def test_a_log_names_each_step_and_hears_of_long_ones(log: Callable[[], str]) -> None:
    with progress.steps("load", 2):
        progress.step("read")
        progress.step("trace")
        time.sleep(0.5)
    lines = log().splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == ["read]", "trace]", "trace]"]
    assert "0/2" in lines[0] and "1/2" in lines[1]


def test_a_terminal_gets_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.steps("load", 1):
        progress.step("read")
    assert "load:" in stream.getvalue() and "\n" not in stream.getvalue()
    assert stream.getvalue().count("\r") > 1


def test_nothing_is_shown_where_bars_are_hidden(log: Callable[[], str]) -> None:
    with progress.hidden(), progress.steps("load", 1):
        progress.step("read")
    assert list(progress.bar(range(2), "score", shown=False)) == [0, 1]
    assert log() == ""


def test_steps_end_with_an_error(log: Callable[[], str]) -> None:
    with pytest.raises(ValueError, match="broken"), progress.steps("load", 2):
        progress.step("read")
        raise ValueError("broken")
    progress.step("nowhere")
    assert "nowhere" not in log()
