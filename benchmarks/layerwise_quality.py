"""Accuracy of the layer-wise techniques on trained models, beside AIMET's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import SEQ_MSE, SIMPLE, Bench, Run, Subject, label
from layerwise_speed import same_winner, weight_ranges
from methods import ADAROUND, BEST_STACK, COMPATIBLE, STACKS, Effort, apply_method
from report import bar, named, print_table
from resnet import draw, load_images, load_resnet, top1
from torch import nn

import aimet_ext
from aimet_ext import QSpec

W4, W8, W3 = QSpec(bitwidth=4), QSpec(bitwidth=8), QSpec(bitwidth=3)
STORIES = "stories260K"
FIRST_BLOCKS = f"{STORIES} 0-1"
ADAROUND_STACKS = ("ours: adaround", "ours: seq_mse + adaround")
ROUNDINGS = ("ours: gptq", "ours: adaround", "ours: autoround")
RESNET_STACKS = ("ours: seq_mse", *ADAROUND_STACKS)


class LayerBench(Bench):
    """Runs of the layer-wise techniques, each made once."""

    def __init__(self, options: Any, effort: Effort, draws: int, aimet_draws: int) -> None:
        super().__init__(options)
        self.effort, self.draws, self.aimet_draws = effort, draws, aimet_draws

    def default_steps(self, method: str) -> int:
        """Of AdaRound."""
        return self.effort.aimet_steps if method == ADAROUND else self.effort.steps

    def _apply(
        self,
        sim: Any,
        subject: Subject,
        method: str,
        seed: int,
        steps: int,
        candidates: int,
        changes: dict[str, Any],
    ) -> dict[str, Any]:
        torch.manual_seed(seed)
        ours = method in STACKS
        effort = Effort(
            candidates=candidates,
            steps=steps if ours else 0,
            aimet_steps=steps,
            aimet_scheme=self.effort.aimet_scheme,
            changes=self.effort.changes,
        )
        batches = subject.calibration.split(self.options.batch_size if ours else 4)
        model = aimet_ext.prepare_model(subject.model)
        return {"said": apply_method(method, sim, model, batches, effort)}


def compatible(bench: LayerBench) -> dict[str, Any]:
    """a: the same choice as AIMET's, end to end on a trained model."""
    subject = bench.subject(STORIES)
    model = aimet_ext.prepare_model(subject.model)
    batches = subject.calibration.split(4)
    ranges, rows = {}, []
    for method in (SEQ_MSE, COMPATIBLE):
        sim = bench.sim(subject, W4)
        started = time.process_time()
        apply_method(method, sim, model, batches, bench.effort)
        seconds = time.process_time() - started
        ranges[method] = weight_ranges(sim)
        perplexity = aimet_ext.evaluate_perplexity(sim, list(subject.scored.split(20)))
        rows.append([method, perplexity, seconds])
    head = ("method", "perplexity", "seconds")
    print_table("a. SeqMSE compatible on stories260K, W4 per-channel", head, rows)
    share = same_winner(ranges[COMPATIBLE], ranges[SEQ_MSE])
    apart = rows[1][1] / rows[0][1] - 1
    bars = [
        bar(f"perplexity {apart:+.3%} of AIMET's, within 0.2 %", abs(apart) <= 0.002),
        bar(f"{share:.2%} of rows have the same winner end to end, 99.9 %", share >= 0.999),
    ]
    return {"rows": named(head, rows), "same_winner": share, "bars": bars}


def adaround_quality(bench: LayerBench) -> dict[str, Any]:
    """c: the linears of the first two blocks of a trained model, AIMET's defaults."""
    result = _table(
        bench,
        f"c. AdaRound, {STORIES}, linears of blocks 0 and 1, W4 per-channel",
        FIRST_BLOCKS,
        W4,
        (SIMPLE, ADAROUND, *ADAROUND_STACKS),
    )
    theirs = bench.run(FIRST_BLOCKS, W4, ADAROUND)
    good = [
        theirs.seconds / run.seconds
        for run in (bench.run(FIRST_BLOCKS, W4, method) for method in ADAROUND_STACKS)
        if run.perplexity <= theirs.perplexity
    ]
    fastest = max(good, default=0.0)
    text = f"at AIMET's perplexity or below, {fastest:.0f} times faster, at least 50"
    result["bars"] = [bar(text, fastest >= 50)]
    return result


def stacks_at_4_bits(bench: LayerBench) -> dict[str, Any]:
    """d: share of the rounding loss recovered."""
    result = _stacks(bench, "d", W4)
    share = _recovered(bench, STORIES, W4, bench.run(STORIES, W4, BEST_STACK))
    result["bars"] = [bar(f"best stack recovers {share:.1%}, at least 55 %", share >= 0.55)]
    return result


def stacks_at_3_bits(bench: LayerBench) -> dict[str, Any]:
    """e: the same where rounding hurts."""
    result = _stacks(bench, "e", W3)
    best, theirs = (bench.run(STORIES, W3, method) for method in (BEST_STACK, SEQ_MSE))
    result["bars"] = [
        bar(f"best stack {best.perplexity:.2f}, at most 6.0", best.perplexity <= 6.0),
        bar(
            f"best stack {best.perplexity / theirs.perplexity:.3f} of AIMET SeqMSE, 6.0/7.0",
            best.perplexity / theirs.perplexity <= 6 / 7,
        ),
    ]
    return result


def resnet(bench: LayerBench) -> dict[str, Any]:
    """f: convolutions at 4 bits, the linear layer at 8, mean over draws of calibration images."""
    folder = bench.options.assets / "resnet20-cifar10"
    model = load_resnet(folder)
    images, classes = load_images(folder / "test_2000.npz")
    calibration, _ = load_images(folder / "calib_512.npz")
    count = 256
    if bench.options.quick:
        images, classes, count = images[:250], classes[:250], 8
    head = ("method", "draws", "top-1", "each", "seconds")
    plain = top1(resnet_sim(model, calibration).model, images, classes)
    rows: list[list[Any]] = [["float", None, top1(model, images, classes), "", None]]
    rows.append([SIMPLE, None, plain, "", None])
    means: dict[str, float] = {}
    for method in (SEQ_MSE, ADAROUND, *RESNET_STACKS):
        draws = bench.aimet_draws if method == ADAROUND else bench.draws
        scores, seconds = [], []
        for seed in range(draws):
            batches = draw(calibration, count, seed).split(32)
            sim = resnet_sim(model, calibration)
            torch.manual_seed(seed)
            started = time.process_time()
            apply_method(method, sim, model, batches, bench.effort)
            seconds.append(time.process_time() - started)
            scores.append(top1(sim.model, images, classes))
            print(f"  {method} draw {seed}: {scores[-1]:.2%}, {seconds[-1]:.1f} s", flush=True)
        means[method] = statistics.fmean(scores)
        each = " ".join(f"{score:.2%}" for score in scores)
        rows.append([method, draws, means[method], each, statistics.median(seconds)])
    print_table("f. ResNet-20, convolutions W4 per-channel, linear W8", head, rows)
    rounded = max(means[method] for method in ADAROUND_STACKS)
    loss = 100 * (rows[0][2] - rounded)
    bars = [
        bar(f"AdaRound {loss:.2f} points below float, at most 1", loss <= 1),
        bar("SeqMSE not below AIMET's", means["ours: seq_mse"] >= means[SEQ_MSE]),
        bar("AdaRound not below AIMET's", rounded >= means[ADAROUND]),
    ]
    return {"rows": named(head, rows), "aimet_steps": bench.effort.aimet_steps, "bars": bars}


def resnet_sim(model: nn.Module, images: torch.Tensor) -> Any:
    """Weights quantized and nothing else."""
    from aimet_ext.sim.torch.setup import build_sim

    kinds = ((nn.Conv2d, W4), (nn.Linear, W8))
    specs = {
        name: spec
        for name, layer in model.named_modules()
        for kind, spec in kinds
        if isinstance(layer, kind)
    }
    return build_sim(model, images[:1], specs, None, "htp_v79")


def roundings(bench: LayerBench) -> dict[str, Any]:
    """h: what rounds, from 4 bits down to 2."""
    found: dict[str, Any] = {"rows": [], "runs": [], "bars": []}
    for bits in (4, 3, 2):
        spec = QSpec(bitwidth=bits)
        title = f"h. {STORIES}, {label(spec)} symmetric, block linears"
        table = _table(bench, title, STORIES, spec, (SIMPLE, *ROUNDINGS))
        found["rows"] += [{"bits": bits, **row} for row in table["rows"]]
        found["runs"] += table["runs"]
        *others, learnt = (bench.run(STORIES, spec, method).perplexity for method in ROUNDINGS)
        if bits < 4:
            text = f"AutoRound {learnt:.3f} at {bits} bits, the best other {min(others):.3f}"
            found["bars"].append(bar(text, learnt < min(others)))
    return found


def _stacks(bench: LayerBench, key: str, spec: QSpec) -> dict[str, Any]:
    title = f"{key}. {STORIES}, {label(spec)} symmetric, block linears"
    return _table(bench, title, STORIES, spec, (SIMPLE, SEQ_MSE, *STACKS))


def _table(
    bench: LayerBench, title: str, name: str, spec: QSpec, methods: Sequence[str]
) -> dict[str, Any]:
    """Every method once, in the order of the table."""
    scored, headline = bench.float_perplexity(name)
    subject = bench.subject(name)
    head = (
        "method",
        f"{len(subject.scored)} windows",
        f"{len(subject.everything)} windows",
        "recovered",
        "seconds",
    )
    rows: list[list[Any]] = [["float", scored, headline, None, None]]
    runs = [bench.run(name, spec, method) for method in methods]
    for run in runs:
        share = _recovered(bench, name, spec, run)
        seconds = None if run.method == SIMPLE else run.seconds
        rows.append([run.method, run.perplexity, run.headline, share, seconds])
    print_table(title, head, rows)
    return {"rows": named(head, rows), "runs": [{**vars(run)} for run in runs]}


def _recovered(bench: LayerBench, name: str, spec: QSpec, run: Run) -> float:
    plain = bench.run(name, spec, SIMPLE).perplexity
    return (plain - run.perplexity) / (plain - bench.float_perplexity(name)[0])
