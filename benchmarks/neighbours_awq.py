"""AWQ's start of OmniQuant against SmoothQuant's: steps to the same loss.

    python benchmarks/neighbours_awq.py [FOLDER TEXT] [--windows 16] [--blocks 5] [--steps 120]

The model is stories260K, or that of a folder, calibrated on a text. Each block is trained from each
start, on one batch that holds all data, so that the loss of a step is the loss on all of it; the
next block follows the best of them. Curves are written as JSON and SVG to ``results``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Bench, Options, load, quiet
from report import ASSETS, HERE, add_section, bar, machine, named, print_table
from torch import Tensor, nn

import aimet_ext
from aimet_ext import OmniQuantParams, QSpec
from aimet_ext.techniques import omniquant
from aimet_ext.techniques.blockwise.block import Block, BlockState, Choice
from aimet_ext.techniques.blockwise.search import BlockSearch

FULL, SEARCHED, AWQ = "SmoothQuant, full ranges", "SmoothQuant, searched ranges", "AWQ"
COLOURS = {FULL: "#888888", SEARCHED: "#1f77b4", AWQ: "#d62728"}


def racing(curves: list[dict[str, list[float]]]) -> type[omniquant.OmniQuant]:
    """OmniQuant that trains each block from every start and notes the losses of all steps."""

    class Racing(omniquant.OmniQuant):
        def decide(self, block: Block, bar: Any) -> Choice:
            search = BlockSearch(block, float_target=self.params.float_target)
            search.run(sweeps=0)  # gathers the moments
            smooth = search.smoothquant(self.params.smooth_alpha)
            starts = {
                FULL: full(block, smooth),
                SEARCHED: search.ranges(smooth),
                AWQ: search.ranges(search.awq(omniquant.AWQ_GRID, duo_scaling=True)),
            }
            found, losses = {}, {}
            for name, start in starts.items():
                seen: list[float] = []
                before = block.score(block.state_params(start))
                trained, score = omniquant.train_block(
                    block, start, before, self.params, seed=0, on_step=seen.append
                )
                found[name], losses[name] = (score, trained), [before, *seen[1:]]
            curves.append(losses)
            ends = {name: (curve[0], min(curve)) for name, curve in losses.items()}
            print(f"block {block.number}: loss at the start and the lowest: {ends}", flush=True)
            score, state = min(found.values(), key=lambda each: each[0])
            return Choice(state, "race", score)

    return Racing


def full(block: Block, smooth: dict[str, Tensor]) -> BlockState:
    """The state with these scales whose ranges hold every weight."""
    grids = {}

    def note(layer: str, weight: Tensor) -> Tensor:
        layout = block.layout(layer)
        grids[layer] = layout.raw(*layout.bounds(weight.float()))
        return weight

    with torch.no_grad():
        block.quantized(smooth, note)
    return BlockState(smooth, grids)


def steps_to(curve: Sequence[float], loss: float) -> int | None:
    """Steps after which a curve is first at or below a loss; None if it never is."""
    return next((step for step, value in enumerate(curve) if value <= loss), None)


def race(
    model: nn.Module, data: Tensor, spec: QSpec, blocks: int, steps: int
) -> list[dict[str, list[float]]]:
    """Losses of every step by start, for each of the first blocks of a model.

    :param data: Windows, shape [windows, tokens].
    """
    every = len(model.model.layers)
    rest = {f"model.layers.{number}.*": None for number in range(blocks, every)}
    with quiet():
        sim = aimet_ext.create_sim(
            model, data[:1], weights=spec, lm_head=None, embedding=None, activations=None,
            overrides=rest,
        )  # fmt: skip
    left = [
        name
        for name, _ in sim.model.named_modules()
        if name.endswith("_proj")
        and any(f".layers.{number}." in name for number in range(blocks, every))
    ]
    curves: list[dict[str, list[float]]] = []
    kept = omniquant.OmniQuant
    omniquant.OmniQuant = racing(curves)  # type: ignore[misc]
    try:
        params = OmniQuantParams(num_iterations=steps, lr_schedule="constant", evaluations=1)
        aimet_ext.apply_omniquant(
            sim, [data], params=params, modules_to_exclude=left, progress=False
        )
    finally:
        omniquant.OmniQuant = kept  # type: ignore[misc]
    return curves[:blocks]


def judge(name: str, curves: Sequence[dict[str, list[float]]], output: Path) -> None:
    """Print and keep how many steps AWQ's start needs for the best loss of the others."""
    head = ("block", "against", "its best loss", "its steps", "AWQ's steps", "AWQ's best loss")
    rows: list[Sequence[Any]] = []
    reached = []
    for number, losses in enumerate(curves):
        for other in (FULL, SEARCHED):
            best = min(losses[other])
            own = steps_to(losses[other], best) or 0
            needed = steps_to(losses[AWQ], best)
            rows.append((str(number), other, best, own, needed, min(losses[AWQ])))
            reached.append((other, needed is not None and 4 * needed <= own))
    print_table(f"{name}: steps to the other start's best loss", head, rows)
    bars = [
        bar(
            f"{name}, {other}: its best loss in at most a quarter of its steps, in "
            f"{sum(ok for o, ok in reached if o == other)} of {len(curves)} blocks",
            all(ok for o, ok in reached if o == other),
        )
        for other in (FULL, SEARCHED)
    ]
    short = [{k: [float(f"{v:.5g}") for v in curve] for k, curve in c.items()} for c in curves]
    result = {"rows": named(head, rows), "bars": bars, "curves": short, **machine()}
    add_section(output, name, result)
    output.with_name(f"{output.stem}_{name}.svg").write_text(drawn(curves), encoding="utf-8")


def drawn(curves: Sequence[dict[str, list[float]]]) -> str:
    """Draw the losses of each block over its steps, relative to the highest, as SVG."""
    width, height, gap = 260, 160, 30
    parts = []
    for number, losses in enumerate(curves):
        left = gap + number * (width + gap)
        top = max(max(curve) for curve in losses.values())
        low = min(min(curve) for curve in losses.values())
        parts.append(f'<text x="{left}" y="20">block {number}: {low:.3g} to {top:.3g}</text>')
        for name, curve in losses.items():
            points = " ".join(
                f"{left + width * step / (len(curve) - 1):.1f},"
                f"{gap + height * (top - loss) / (top - low or 1):.1f}"
                for step, loss in enumerate(curve)
            )
            style = f'fill="none" stroke="{COLOURS[name]}" stroke-width="1.5"'
            parts.append(f'<polyline points="{points}" {style}/>')
    for place, (name, colour) in enumerate(COLOURS.items()):
        y = gap + height + 20 + 16 * place
        parts.append(f'<text x="{gap}" y="{y}" fill="{colour}">{name}</text>')
    size = f'width="{gap + len(curves) * (width + gap)}" height="{height + 110}"'
    text = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
        f'font-size="12">\n{text}\n</svg>\n'
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", help="of the model, in place of stories260K"
    )
    parser.add_argument("text", type=Path, nargs="?", help="plain text to calibrate that model on")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "neighbours_awq.json")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = QSpec(bitwidth=given.bits)
    if given.folder is None:
        subject = Bench(Options(assets=given.assets)).subject("stories260K")
        name, model, data = "stories260K", subject.model, subject.calibration[: given.windows]
    else:
        name = given.folder.name
        model, tokenizer = load(given.folder)
        ids = tokenizer(given.text.read_text("utf-8")[:2_000_000], return_tensors="pt").input_ids[0]
        data = ids[: given.windows * 512].view(-1, 512)
    curves = race(model, data, spec, given.blocks, given.steps)
    judge(f"{name}_W{given.bits}", curves, given.output)


if __name__ == "__main__":
    main()
