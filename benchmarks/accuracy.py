"""Accuracy, time and memory of methods for weights, ours and other libraries', in one table.

    pip install llmcompressor datasets auto-round
    python benchmarks/accuracy.py --model FOLDER [--settings ...] [--methods ...] [--draws 3]

A method is named ``gptq``, ``gptq,preset=fast`` with settings, ``rotation+gptq+dwq`` in a row,
``recipe:w4a16-best``, or with its library: ``aimet:spinquant+seqmse``, ``llm-compressor:awq``,
``auto-round:signround,iters=60``. Quantized are the linear layers of the blocks, nothing else.

Texts share the calibration windows equally. The first draw takes the first windows of each, every
other one takes them at random; windows to score are held out, and the same for all. Perplexity is
that of all texts; a share of rounding's loss of it is recovered. Each cell is a process of its own:
its seconds are the processor's, its memory is the most resident above that held at its start, by
the model, or by the simulation in its place, with freed memory that it keeps. Figures are means, ±
their standard deviation.

Cells go into the results as they are done, and are not run again without ``--again``.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from drawn import draw
from memory import status
from peers import PEERS, Steps, weights_sim
from report import HERE, add_section, in_own_process, machine, named, pairs, print_table
from subjects import TEXTS, Subject, load_outputs, read_subject, save_outputs, scores

from aimet_ext import LPBQ, Blockwise, QSpec
from aimet_ext.recipes.recipe import Recipe, read_recipe
from aimet_ext.registry import TECHNIQUES

SETTINGS = {
    "W4-channel": QSpec(bitwidth=4),
    "W4-lpbq64": QSpec(bitwidth=4, granularity=LPBQ(64)),
    "W4-group64": QSpec(bitwidth=4, granularity=Blockwise(64)),
    "W3-channel": QSpec(bitwidth=3),
    "W2-group16": QSpec(bitwidth=2, symmetric=False, granularity=Blockwise(16)),
}
ROUNDING, RECIPE = "rounding", "recipe"
METHODS = (
    ROUNDING,
    "gptq,preset=fast",
    "gptq",
    "adaround",
    "autoround",
    "awq",
    "omniquant",
    "rotation+gptq",
    "rotation+gptq+dwq",
    "recipe:w4a16-best",
    "llm-compressor:gptq",
    "llm-compressor:awq",
    "auto-round:signround,iters=60",
    "auto-round:signround,iters=200",
    "aimet:seqmse",
    "aimet:adascale",
    "aimet:omniquant",
    "aimet:spinquant",
)
HEAD = (
    "setting", "method", "draws", "perplexity", "±", "KL", "± KL", "KL 99.9 %", "flips %",
    "recovered %", "processor s", "MiB",
)  # fmt: skip


def subject_of(options: argparse.Namespace, draw: int = 0) -> Subject:
    """Read what the command line names."""
    return read_subject(
        options.model,
        options.texts,
        windows=options.windows,
        length=options.length,
        scored=options.scored,
        blocks=options.blocks,
        draw=draw,
    )


def read_method(text: str) -> tuple[str, Steps]:
    """Return the side of a method, empty for ours, and its steps."""
    side, _, rest = text.rpartition(":")
    if side not in ("", RECIPE, *PEERS):
        raise ValueError(f"{text}: {', '.join((RECIPE, *PEERS))} is required before the colon")
    steps = []
    for step in [] if rest == ROUNDING else rest.split("+"):
        name, *settings = step.split(",")
        steps.append((name, {key: read_value(value) for key, value in pairs(settings)}))
    return side, steps


def read_value(text: str) -> Any:
    """Read JSON, or a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def reads_data(method: str) -> bool:
    """Return False for a method that does the same in each draw."""
    side, steps = read_method(method)
    free = ("spinquant",) if side else [row.name for row in TECHNIQUES.values() if row.data_free]
    return any(name not in free for name, _ in steps)


def run_cell(options: argparse.Namespace, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a method, and score what it makes of the model.

    :param cell: Its method, setting and draw, and the file of the float model's outputs.
    """
    model, calibration, scored = subject_of(options, cell["draw"])
    spec = SETTINGS[cell["setting"]]
    side, steps = read_method(cell["method"])
    peer, recipe = PEERS.get(side), None
    if side == RECIPE:
        recipe = read_recipe(steps[0][0])
    elif peer is None:
        recipe = Recipe(techniques=[{name: settings} for name, settings in steps])
    for module in peer.modules if peer else ():
        importlib.import_module(module)
    simulates = peer is None or (peer.simulates and steps[0][0] != "spinquant")
    found = weights_sim(model, calibration[:1, :64], spec) if simulates else model
    compares = recipe is not None and any(TECHNIQUES[name].reference for name in recipe.techniques)
    reference = model if compares else None
    del model
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, started = status("VmRSS"), time.process_time()
    if peer:
        found = peer.apply(found, calibration, spec, steps)
    if recipe:
        with tempfile.TemporaryDirectory() as folder:
            recipe.apply(
                found,
                list(calibration.split(options.batch_size)),
                reference=reference,
                progress=False,
                cache_dir=folder if options.cache else None,
            )
    seconds, peak = time.process_time() - started, status("VmHWM")
    return {
        **scores(found, scored, load_outputs(cell["outputs"])),
        "seconds": seconds,
        "bytes": peak - before,
    }


def rows_of(section: Mapping[str, Any], options: argparse.Namespace) -> list[list[Any]]:
    """Return the table of the cells that are there."""
    rows = []
    for setting, method in itertools.product(options.settings, options.methods):
        cells = [
            section["cells"].get(key_of(setting, method, draw)) for draw in range(options.draws)
        ]
        cells = [cell for cell in cells if cell is not None]
        good = [cell for cell in cells if "fault" not in cell]
        if not good:
            rows += [[setting, method, 0, *[None] * 9] for _ in cells[:1]]
            continue
        exact, worst = section["float"], section["cells"].get(key_of(setting, ROUNDING, 0), {})

        def mean(name: str, good: Sequence[Mapping[str, Any]] = good) -> float:
            return statistics.fmean(cell[name] for cell in good)

        def spread(name: str, good: Sequence[Mapping[str, Any]] = good) -> float | None:
            return statistics.stdev(cell[name] for cell in good) if len(good) > 1 else None

        share = None
        if "perplexity" in worst and method != ROUNDING:
            lost = worst["perplexity"] - exact["perplexity"]
            share = 100 * (worst["perplexity"] - mean("perplexity")) / lost
        rows.append(
            [
                setting, method, len(good), mean("perplexity"), spread("perplexity"), mean("kl"),
                spread("kl"), mean("kl_high"), 100 * mean("flips"), share, mean("seconds"),
                round(mean("bytes") / 2**20),
            ]
        )  # fmt: skip
    return rows


def key_of(setting: str, method: str, draw: int) -> str:
    """Name a cell."""
    return f"{setting} | {method} | {draw}"


def version_of(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure(options: argparse.Namespace, title: str) -> dict[str, Any]:
    """Run the cells that are not there yet, each one written when it is done; all of them."""
    stored = json.loads(options.output.read_text()) if options.output.exists() else {}
    section = stored.get(title, {"cells": {}})
    wanted = [
        (setting, method, draw)
        for setting, draw, method in itertools.product(
            options.settings, range(options.draws), options.methods
        )
        if not draw or reads_data(method)
    ]
    missing = [each for each in wanted if options.again or key_of(*each) not in section["cells"]]
    if not missing:
        return section
    section["machine"] = machine()
    section["peers"] = {name: version_of(name) for name in ("llmcompressor", "auto-round")}
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "float.safetensors"
        section["float"] = save_outputs(subject_of(options), outputs)
        gc.collect()
        for setting, method, draw in missing:
            cell = {"setting": setting, "method": method, "draw": draw, "outputs": str(outputs)}
            try:
                arguments = (*sys.argv[1:], "--cell", json.dumps(cell))
                found = in_own_process("accuracy.py", *arguments, exact_memory=False)
                said = f"perplexity {found['perplexity']:.3f}, {found['seconds']:.0f} s"
            except RuntimeError as error:
                lines = str(error).strip().splitlines()
                said = next((line for line in reversed(lines) if "Error" in line), lines[-1])
                found = {"fault": said}
            print(f"  {key_of(setting, method, draw)}: {said}", flush=True)
            section["cells"][key_of(setting, method, draw)] = found
            add_section(options.output, title, section)
    return section


def main() -> None:
    """Run what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--windows", type=int, default=64, help="to calibrate, of all texts")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1, help="windows of a batch of ours")
    parser.add_argument("--scored", type=int, default=20, help="windows of each text to score")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--blocks", type=int, help="cut the model to its first blocks")
    parser.add_argument("--cache", action="store_true", help="give ours a cache_dir")
    parser.add_argument("--again", action="store_true", help="run cells that are there too")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "accuracy.json")
    parser.add_argument("--plot", type=Path, help="draw the first setting to this .svg file")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cell:
        print(json.dumps(run_cell(options, options.cell)))
        return
    title = (
        f"{options.model.name}{f', {options.blocks} blocks' if options.blocks else ''}: "
        f"{options.windows} windows of {options.length} of {' and '.join(options.texts)}, "
        f"{options.scored} of each scored"
        f"{f', batches of {options.batch_size}' if options.batch_size > 1 else ''}"
        f"{', cache_dir' if options.cache else ''}"
    )
    section = measure(options, title)
    rows = rows_of(section, options)
    print_table(f"{title}; float {section['float']['perplexity']:.3f}", HEAD, rows)
    for key, cell in section["cells"].items():
        if "fault" in cell:
            print(f"{key}: {cell['fault']}")
    add_section(options.output, title, {**section, "rows": named(HEAD, rows)})
    if options.plot:
        setting, *_ = options.settings
        shown = [row for row in named(HEAD, rows) if row["setting"] == setting]
        draw(shown, f"{options.model.name}, {setting}", options.plot)


if __name__ == "__main__":
    main()
