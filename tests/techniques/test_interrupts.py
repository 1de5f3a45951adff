"""One Ctrl-C at any line that puts something back leaves the simulation as it was."""

from __future__ import annotations

import itertools
import linecache
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

import aimet_ext
from aimet_ext.core.interrupts import uninterrupted

PACKAGE = pathlib.Path(aimet_ext.__file__).parent
FILES = {str(PACKAGE / name) for name in ("sim/torch/adaptor.py", "sim/torch/state.py",
                                          "walk/hooks.py", "techniques/session.py")}  # fmt: skip
PUTS = re.compile(
    r"setattr\(|\] = |\.training = |use_cache = |requires_grad_|restore|put_back|\.ledger = "
)

Place = tuple[str, int]


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal: programs in the background are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def traced(call: Callable[[], Any], note: Callable[[Place], None]) -> None:
    def lines(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            note((frame.f_code.co_filename, frame.f_lineno))
        return lines

    sys.settrace(lambda frame, event, _: lines if frame.f_code.co_filename in FILES else None)
    try:
        call()
    finally:
        sys.settrace(None)


def test_ctrl_c_waits_for_the_end() -> None:
    seen = []

    def restore() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                seen.append("inner")
            seen.append("outer")

    with pytest.raises(KeyboardInterrupt):
        restore()
    assert seen == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize("function", ["seq_mse", "gptq", "omniquant"])
def test_one_interrupt_at_each_line(
    function: str, make_sim: Any, pair: list[Tensor], state_of: Any
) -> None:
    settings = {
        "seq_mse": {"num_candidates": 2, "sweeps": 2},
        "gptq": {"scale_candidates": 1, "refine_sweeps": 0, "beams": 1},
        "omniquant": {"num_iterations": 1, "search_sweeps": 0},
    }

    def run(sim: Any) -> None:
        apply = getattr(aimet_ext, f"apply_{function}")
        apply(sim, pair, progress=False, **settings[function])

    counts: dict[Place, int] = {}
    traced(
        lambda: run(make_sim(layers=1)),
        lambda place: (
            counts.update({place: counts.get(place, 0) + 1})
            if PUTS.search(linecache.getline(*place))
            else None
        ),
    )
    assert len(counts) > 10
    for place, times in counts.items():
        sim, seen = make_sim(layers=1), itertools.count(1)
        before = state_of(sim)

        def press(found: Place, place: Place = place, times: int = times, seen: Any = seen) -> None:
            if found == place and next(seen) == times:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)

        try:
            traced(lambda sim=sim: run(sim), press)
        except KeyboardInterrupt:
            assert state_of(sim) == before, place
