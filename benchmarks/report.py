"""Tables on the screen, bars reached or missed, and the file of results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import aimet_ext

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent.parent / "shared" / "assets"


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Rows under a head, numbers with four digits behind the point."""
    cells = [list(head), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        line = [row[0].ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(line))
        if number == 0:
            print("  ".join("-" * width for width in widths))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4f}"
    return "" if value is None else str(value)


def named(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows of a table as they go into the file."""
    return [dict(zip(head, row, strict=True)) for row in rows]


def bar(text: str, reached: bool) -> dict[str, Any]:
    """Say whether a figure was reached."""
    print(f"{'reached' if reached else 'MISSED'}: {text}")
    return {"bar": text, "reached": bool(reached)}


def machine(*packages: str) -> dict[str, Any]:
    """What the figures were measured with.

    :param packages: to name besides the usual ones.
    """
    named_ones = ("torch", "aimet-torch", "transformers", *packages)
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in named_ones},
        "aimet_ext": aimet_ext.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def add_section(output: Path, key: str, result: dict[str, Any]) -> None:
    """Put a section into the output file, beside those that are there."""
    known = json.loads(output.read_text()) if output.exists() else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(sorted({**known, key: result}.items())), indent=1, default=str)
    output.write_text(text + "\n", encoding="utf-8")


def pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """``FIELD=JSON`` taken apart."""
    return [(text.partition("=")[0], text.partition("=")[2]) for text in texts]


def in_own_process(script: str, *arguments: str, exact_memory: bool = True) -> dict[str, Any]:
    """What a script of this folder prints as its last line, JSON; for peaks of memory.

    :param exact_memory: Count no freed memory. Each larger piece is then fetched from the system
        anew, which takes up to half as much time again: false where time is measured.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(aimet_ext.__file__).parents[1]), *sys.path]),
    }
    if exact_memory:
        # glibc's own start values, held: freed pieces above them go back and pass for none in use.
        environment |= {
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_TRIM_THRESHOLD_": str(2**17),
            "MALLOC_MMAP_THRESHOLD_": str(2**17),
        }
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
