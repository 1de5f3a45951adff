"""Runs that are killed at any moment and started again: the same result, and nothing left behind.

    python benchmarks/kills.py [--series 200] [--seed 0] [--only SUBJECT ...]

applies every technique to a tiny model, for PyTorch and ONNX simulations, with checkpoints, a cache
on disk and a report, and exports. In each series the process is killed (SIGKILL) once to three
times, each time at a random moment or at a random one of its calls that change files, and then runs
to its end. Its result must be that of an undisturbed run to the bit, a folder that was exported
before must be whole after every kill, and all folders must hold what they hold after an undisturbed
run: no scratch folders, parts or temporary files.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import fuzz
from report import print_table

import aimet_ext
from aimet_ext.files import folders
from aimet_ext.files.manifest import read_manifest
from aimet_ext.files.scratch import moved_aside

IDS = fuzz.IDS
WRITES = ("os.", "shutil.", "tempfile.", "open")


def torch_sim(technique: str) -> Any:
    return fuzz.make_sim(2)


def of_torch(technique: str, place: pathlib.Path) -> str:
    sim = fuzz.make_sim(2)
    options = {"cache_dir": place / "cache", "output_path": place / "report"}
    fuzz.apply(sim, technique, place / "checkpoints", progress=False, **options)
    return fuzz.digest(sim.model(IDS), *sim.model.state_dict().values())


def of_onnx(technique: str, place: pathlib.Path) -> str:
    sim = fuzz.make_onnx_sim()
    settings = dict(fuzz.TECHNIQUES[technique].items())
    getattr(aimet_ext, f"apply_{technique}")(
        sim, [fuzz.onnx_feed()], checkpoint_dir=place / "checkpoints", cache_dir=place / "cache",
        output_path=place / "report", progress=False, **settings,
    )  # fmt: skip
    return fuzz.digest(*sim.session.run(None, fuzz.onnx_feed()))


def export_torch(_: str, place: pathlib.Path) -> str:
    sim = fuzz.make_sim(1)
    aimet_ext.export(sim, place / "out", "m", IDS[:1])
    return content_of(place / "out")


def export_onnx(_: str, place: pathlib.Path) -> str:
    aimet_ext.export(fuzz.make_onnx_sim(), place / "out", "m", fuzz.onnx_feed())
    return content_of(place / "out")


def content_of(folder: pathlib.Path) -> str:
    """Hash what a manifest lists."""
    return hashlib.sha256(json.dumps(read_manifest(folder)["files"]).encode()).hexdigest()


def without_exchange(
    work: Callable[[str, pathlib.Path], str],
) -> Callable[[str, pathlib.Path], str]:
    """The same on a file system that cannot exchange two names in one step."""

    def run(technique: str, place: pathlib.Path) -> str:
        folders._exchange = lambda *_: False
        return work(technique, place)

    return run


SUBJECTS: dict[str, tuple[str, Callable[[str, pathlib.Path], str]]] = {
    **{f"torch {name}": (name, of_torch) for name in fuzz.TECHNIQUES},
    **{f"onnx {name}": (name, of_onnx) for name in fuzz.TECHNIQUES if name != "omniquant"},
    "torch export": ("", export_torch),
    "torch export, two renames": ("", without_exchange(export_torch)),
    "onnx export": ("", export_onnx),
    "onnx export, two renames": ("", without_exchange(export_onnx)),
}


def in_child(subject: str, place: pathlib.Path, *, after: float = 0, event: int = 0) -> Any:
    """Run a subject in a fork of this process.

    :param after: seconds after which it is killed; 0: never.
    :param event: number of the call that changes files before which it is killed; 0: never.
    :returns: its result; None if it was killed before it had one.
    """
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(read)
            tempfile.tempdir = str(place / "tmp")
            os.environ["TMPDIR"] = tempfile.tempdir
            technique, work = SUBJECTS[subject]
            seen = count_events(event, place)
            with fuzz.quiet():
                result = work(technique, place)
            os.write(write, json.dumps([result, next(seen)]).encode())
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    os.close(write)
    if after:
        with contextlib.suppress(ChildProcessError):
            deadline = time.monotonic() + after
            while time.monotonic() < deadline and not os.waitid(
                os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(process, 0)
    if not os.WIFSIGNALED(status) and status:
        raise RuntimeError(f"{subject} failed")
    return json.loads(said) if said else None


def count_events(event: int, place: pathlib.Path) -> Any:
    """Count the calls that change files below a folder, and die at one of them."""
    counter = itertools.count(1)

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if not name.startswith(WRITES) or not args:
            return
        if name == "open" and not (
            isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        if str(place) in str(args[0]) and next(counter) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counter


def listing(place: pathlib.Path) -> list[str]:
    """Return all that is there, but for the temporary files of AIMET's own sessions."""
    names = (path.relative_to(place).as_posix() for path in place.rglob("*"))
    return sorted(name for name in names if not name.startswith("tmp/tmp"))


def fresh(place: pathlib.Path) -> pathlib.Path:
    shutil.rmtree(place, ignore_errors=True)
    (place / "tmp").mkdir(parents=True)
    return place


def main() -> None:
    """Kill, run again, compare, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    options = parser.parse_args()
    sys.setrecursionlimit(10_000)
    import aimet_onnx  # noqa: F401
    import aimet_torch  # noqa: F401
    import transformers  # noqa: F401

    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory() as home:
        wanted: dict[str, Any] = {}
        for number in range(options.series):
            subject = options.only[number % len(options.only)]
            place = pathlib.Path(home) / "place"
            if subject not in wanted:
                start = time.monotonic()
                result, events = in_child(subject, fresh(place))
                wanted[subject] = (result, events, time.monotonic() - start, listing(place))
            draw = random.Random(f"{options.seed} {subject} {number}")
            for fault in series(subject, fresh(place), draw, *wanted[subject], counts):
                counts[subject, fault.partition(":")[0]] += 1
                print(f"{subject}, series {number}: {fault}", flush=True)
            counts[subject, "series"] += 1
    heads = ("series", "kills", "resumed", "other result", "lost", "left behind")
    rows = [[subject, *(counts[subject, head] for head in heads)] for subject in options.only]
    rows.append(["all", *(sum(row[n] for row in rows) for n in range(1, len(heads) + 1))])
    print_table("Killed runs", ["what was killed", *heads], rows)


def series(
    subject: str,
    place: pathlib.Path,
    draw: random.Random,
    result: str,
    events: int,
    seconds: float,
    files: list[str],
    counts: collections.Counter[tuple[str, str]],
) -> list[str]:
    """Kill one to three times, then run to the end; return what is wrong."""
    faults = []
    before = "export" in subject and draw.random() < 0.7
    if before:  # a folder that is to be replaced
        in_child(subject, place)
    for _ in range(draw.randrange(1, 4)):
        by_event = draw.random() < 0.6
        how = (
            {"event": draw.randrange(1, events + 1)}
            if by_event
            else {"after": draw.uniform(0.05, seconds)}
        )
        if in_child(subject, place, **how) is None:
            counts[subject, "kills"] += 1
        if before or (place / "out").exists():
            faults += whole(place / "out", how)
        before = (place / "out").exists()
    counts[subject, "resumed"] += any((place / "checkpoints").glob("block_*"))
    again, _ = in_child(subject, place)
    if again != result:
        faults.append(f"other result: {again}")
    if difference := sorted(set(listing(place)) ^ set(files)):
        faults.append(f"left behind: {difference}")
    return faults


def whole(folder: pathlib.Path, how: Any) -> list[str]:
    """Return what is wrong with a folder that must be complete, here or where a kill left it."""
    try:
        read_manifest(folder)
    except (OSError, ValueError) as error:
        backups = moved_aside(folder)
        if len(backups) == 1:
            with contextlib.suppress(OSError, ValueError):
                read_manifest(backups[0])
                return []
        return [f"lost: {how}: {error}"]
    return []


if __name__ == "__main__":
    main()
