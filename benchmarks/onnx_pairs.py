"""Both adaptors on the same float weights: do they decide the same?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import Bench, quiet
from methods import STACKS, Stack, apply_stack
from onnx_alike import alike
from onnx_models import (
    INPUT,
    as_inputs,
    export_images,
    export_llm,
    float_session,
    llm_sim,
    module_name,
    onnx_sim,
    perplexity,
    run,
    weight_names,
    weights_of,
)
from onnx_speed import equal_rows
from report import bar, named, print_table
from resnet import draw, load_images, load_resnet, top1
from torch import Tensor, nn

import aimet_ext
from aimet_ext import LPBQ, QSpec
from aimet_ext.core.affine import fake_quantize
from aimet_ext.sim.protocol import adapt

W4, W3 = QSpec(bitwidth=4), QSpec(bitwidth=3)
MODELS = ("stories260K", "box")
LPBQ64 = QSpec(bitwidth=4, granularity=LPBQ(64))
# On the float model's inputs no layer hears of the choices before it. With the default inputs one
# row that rounds otherwise moves all behind it: there both sides are held to the same rows layer by
# layer, after the same layers.
ALONE: tuple[tuple[str, QSpec, Stack], ...] = tuple(
    (f"{technique} symfp", spec, ((technique, {**settings, "inp_symmetry": "symfp"}),))
    for technique, settings in (("seq_mse", {"mode": "best"}), ("gptq", {}), ("adaround", {}))
    for spec in (W4, LPBQ64)
)
IN_A_ROW: tuple[tuple[str, QSpec, Stack], ...] = tuple(
    (technique, spec, STACKS[f"ours: {technique}"])
    for technique, spec in (
        ("seq_mse compatible", W4),
        ("seq_mse", W4),
        ("gptq", W4),
        ("adaround", W4),
        ("seq_mse + gptq", W3),
    )
)
SYMQT = ("seq_mse compatible", "seq_mse")  # judged on one input for both weights
HEAD = (
    "model",
    "technique",
    "weights",
    "rows",
    "equal to 1e-6",
    "others: largest gap in loss",
    "equal, layers before alike",
    "their gap",
    "perplexity or top-1, torch",
    "ONNX",
)


class OnnxBench(Bench):
    """Adds the graph of each model."""

    def __init__(self, options: Any, effort: Any) -> None:
        super().__init__(options)
        self.effort = effort
        self._graphs: dict[str, Any] = {}

    def graph(self, name: str) -> Any:
        """Of a model by its name, exported once."""
        if name not in self._graphs:
            self._graphs[name] = export_llm(self.subject(name).model)
        return self._graphs[name]


@dataclass(frozen=True)
class Target:
    """A model of both sides, and how it is scored."""

    name: str
    module: nn.Module  # float, with the names that the torch simulation has
    in_torch: Callable[[QSpec], Any]
    in_onnx: Callable[[QSpec], Any]
    batches: list[Tensor]
    input_name: str
    score: Callable[[Any], float]  # of either simulation


def contract(bench: OnnxBench) -> dict[str, Any]:
    """c: every layer-wise technique, each adaptor capturing for itself."""
    rows, bars = [], []
    for target in (*(_llm(bench, name) for name in MODELS), _images(bench)):
        for technique, spec, stack in (*ALONE, *IN_A_ROW):
            if target.name != "box" and (spec.block_size or spec.bitwidth == 3):
                continue  # no block of 64 divides these; 3 bits leave a ResNet nothing
            alone = technique.endswith("symfp")
            pair = _pair(bench, target, stack, spec, alone=alone, shared=technique in SYMQT)
            label = f"W{spec.bitwidth} {type(spec.granularity).__name__}"
            one_by_one = (pair.equal, pair.gap)
            if not alone:
                sims, data = _both(target, spec)
                one_by_one = alike(sims, data, stack, bench.effort)
            shown = (pair.rows, pair.equal, pair.gap, *one_by_one, *pair.scores)
            rows.append([target.name, technique, label, *shown])
            print(f"  {target.name} {technique} {label}: {shown}", flush=True)
            text = f"{target.name} {technique} {label}: {one_by_one[0]:.3%} of rows equal, 99.9 %"
            bars.append(bar(text, one_by_one[0] >= 0.999))
            bars.append(
                bar(f"losses of the others {one_by_one[1]:.1e} apart", one_by_one[1] <= 1e-5)
            )
    print_table("c. Torch and ONNX on the same weights", HEAD, rows)
    return {"rows": named(HEAD, rows), "bars": bars}


def _llm(bench: OnnxBench, name: str) -> Target:
    subject = bench.subject(name)

    def score(sim: Any) -> float:
        if hasattr(sim, "session"):
            return perplexity(sim, subject.scored)
        return aimet_ext.evaluate_perplexity(sim, list(subject.scored.split(20)))

    return Target(
        name,
        aimet_ext.prepare_model(subject.model),
        lambda spec: bench.sim(subject, spec),
        lambda spec: llm_sim(bench.graph(name), spec),
        list(subject.calibration.split(bench.options.batch_size)),
        INPUT,
        score,
    )


def _images(bench: OnnxBench) -> Target:
    """ResNet-20: convolutions and the linear layer, scored by top-1."""
    from aimet_ext.sim.torch.setup import build_sim

    folder = bench.options.assets / "resnet20-cifar10"
    model = load_resnet(folder)
    images, classes = load_images(folder / "test_2000.npz")
    count = 16 if bench.options.quick else 256
    calibration = draw(load_images(folder / "calib_512.npz")[0], count, 0)
    graph = export_images(model, calibration[:1])

    def in_torch(spec: QSpec) -> Any:
        layers = (n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
        return build_sim(model, calibration[:1], dict.fromkeys(layers, spec), None, "htp_v79")

    def score(sim: Any) -> float:
        if not hasattr(sim, "session"):
            return top1(sim.model, images, classes)
        logits = np.concatenate(run(sim, as_inputs(images.split(250), "images")))
        return float((logits.argmax(-1) == classes.numpy()).mean())

    return Target(
        "resnet20",
        model,
        in_torch,
        lambda spec: onnx_sim(graph, dict.fromkeys(weight_names(graph), spec)),
        list(calibration.split(32)),
        "images",
        score,
    )


@dataclass(frozen=True)
class Pair:
    """What the two sides share."""

    rows: int
    equal: float
    gap: float
    scores: tuple[float, float]


def _both(target: Target, spec: QSpec) -> tuple[tuple[Any, Any], tuple[list[Any], list[Any]]]:
    """Simulations of torch and of ONNX, and the same data for either."""
    sims = target.in_torch(spec), target.in_onnx(spec)
    return sims, (target.batches, as_inputs(target.batches, target.input_name))


def _pair(
    bench: OnnxBench, target: Target, stack: Stack, spec: QSpec, *, alone: bool, shared: bool
) -> Pair:
    """Both sides.

    :param alone: layers are judged on the float model's inputs.
    :param shared: one input for both weights, the quantized model's.
    """
    (in_torch, in_onnx), data = _both(target, spec)
    for sim, batches in zip((in_torch, in_onnx), data, strict=True):
        torch.manual_seed(0)
        apply_stack(sim, batches, stack, bench.effort)
    ours, theirs = torch_weights(in_torch), by_module(weights_of(in_onnx))
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{sorted(ours.keys() ^ theirs.keys())} are quantized on one side only")
    equal = {each: equal_rows(ours[each], theirs[each]) for each in ours}
    differ = {each: same for each, same in equal.items() if not same.all()}
    stream = target.module if alone else in_torch.model
    gap = _gap(target, stream, differ, (ours, theirs), shared=alone or shared)
    flat = np.concatenate(list(equal.values()))
    scores = (target.score(in_torch), target.score(in_onnx))
    return Pair(len(flat), float(flat.mean()), gap, scores)


@torch.no_grad()
def _gap(
    target: Target,
    stream: nn.Module,
    equal: Mapping[str, np.ndarray],
    sides: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    *,
    shared: bool,
) -> float:
    """Largest relative gap in output error of rows that differ, on the inputs in a torch module."""
    sums = {name: torch.zeros(2, len(rows), dtype=torch.float64) for name, rows in equal.items()}
    for batch in target.batches if equal else ():
        inputs = _inputs_of(stream, equal, batch)
        float_inputs = inputs if shared else _inputs_of(target.module, equal, batch)
        for name in equal:
            layer = target.module.get_submodule(name)
            wanted = _output(layer, layer.weight, float_inputs[name])
            for side, weights in enumerate(sides):
                got = _output(layer, torch.from_numpy(weights[name]), inputs[name])
                sums[name][side] += (got - wanted).square().sum(1)
    gaps = [
        ((first - second).abs() / torch.maximum(first, second))[torch.from_numpy(~equal[name])]
        for name, (first, second) in sums.items()
    ]
    return max((float(gap.max()) for gap in gaps), default=0.0)


def _output(layer: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    """What a layer gives with a weight, ``[out, positions]`` in float64."""
    state = {name: value.double() for name, value in layer.named_parameters(recurse=False)}
    state["weight"] = weight.double()
    output = torch.func.functional_call(layer, state, (inputs.double(),))
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    return output.movedim(axis, 0).flatten(1)


@torch.no_grad()
def _inputs_of(model: nn.Module, names: Mapping[str, Any], batch: Tensor) -> dict[str, Tensor]:
    """What reaches layers."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].detach().clone()

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def torch_weights(sim: Any) -> dict[str, np.ndarray]:
    """What a torch simulation computes with, by module name."""
    return {
        name: fake_quantize(view.weight.detach(), view.grid()).detach().numpy()
        for name, view in adapt(sim).weight_quantizers().items()
    }


def by_module(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the name that the torch module has."""
    return {module_name(name): values for name, values in weights.items()}


def omniquant(bench: OnnxBench) -> dict[str, Any]:
    """o: OmniQuant on a trained Llama, 4 bits per channel, both sides with the same settings."""
    head = ("side", "block", "nearest", "before", "after", "kept")
    name, steps = "stories260K", bench.options.steps
    subject = bench.subject(name)
    batches = list(subject.calibration.split(bench.options.batch_size))
    sims = {"torch": bench.sim(subject, W4), "ONNX": llm_sim(bench.graph(name), W4)}
    rows: list[list[Any]] = []
    reports = {}
    for side, sim in sims.items():
        data = batches if side == "torch" else as_inputs(batches)
        report = reports[side] = aimet_ext.apply_omniquant(sim, data, steps, progress=False, seed=0)
        for number, block in enumerate(report.blocks):
            losses = (block.loss_nearest, block.loss_before, block.loss_after)
            rows.append([side, number, *losses, block.kept])
        print(f"  {side}: {report.seconds:.0f} s", flush=True)
    print_table(f"o. OmniQuant, {name}, W4 per-channel, {steps} steps a block", head, rows)
    scores = {
        "plain": perplexity(llm_sim(bench.graph(name), W4), subject.scored),
        "torch": aimet_ext.evaluate_perplexity(sims["torch"], list(subject.scored.split(20))),
        "ONNX": perplexity(sims["ONNX"], subject.scored),
    }
    print(f"perplexity: {scores}; float {bench.float_perplexity(name)[0]:.4f}")
    apart = scores["ONNX"] / scores["torch"] - 1
    first = [reports[side].blocks[0].loss_before for side in ("torch", "ONNX")]
    start = abs(first[0] - first[1]) / first[0]
    bars = [
        bar(f"perplexity {apart:+.3%} of the torch side's, within 0.5 %", abs(apart) <= 0.005),
        bar(f"initial loss of the first block {start:.1e} apart, 1e-4", start <= 1e-4),
    ]
    seconds = {side: report.seconds for side, report in reports.items()}
    return {"rows": named(head, rows), "perplexity": scores, "seconds": seconds, "bars": bars}


def graphs(bench: OnnxBench) -> dict[str, Any]:
    """g: what a graph computes against its torch module."""
    head = ("model", "largest deviation", "float torch", "ONNX", "plain W4 torch", "ONNX")
    rows = [_parity(bench, name) for name in MODELS]
    rows.append(_image_parity(bench))
    print_table("g. Graphs against their torch modules", head, rows)
    bars = [bar(f"{row[0]}: {row[1]:.1e}, at most 1e-5", row[1] <= 1e-5) for row in rows]
    keys = ("model", "deviation", "torch", "onnx", "plain torch", "plain onnx")
    return {"rows": named(keys, rows), "bars": bars}


def _parity(bench: OnnxBench, name: str) -> list[Any]:
    subject, graph = bench.subject(name), bench.graph(name)
    session = float_session(graph)
    model = aimet_ext.prepare_model(subject.model)
    ids = subject.scored[:4]
    with torch.no_grad(), quiet():
        wanted = model(ids).numpy()
    got = run(session, as_inputs([ids]))[0]
    deviation = float(abs(got - wanted).max() / abs(wanted).max())
    windows = list(subject.scored.split(20))
    return [
        name,
        deviation,
        aimet_ext.evaluate_perplexity(subject.model, windows),
        perplexity(session, subject.scored),
        aimet_ext.evaluate_perplexity(bench.sim(subject, W4), windows),
        perplexity(llm_sim(graph, W4), subject.scored),
    ]


def _image_parity(bench: OnnxBench) -> list[Any]:
    target = _images(bench)
    graph = export_images(target.module, target.batches[0][:1])
    session = float_session(graph)
    ids = target.batches[0]
    with torch.no_grad():
        wanted = target.module(ids).numpy()
    got = run(session, as_inputs([ids], target.input_name))[0]
    deviation = float(abs(got - wanted).max() / abs(wanted).max())
    of_floats = [target.score(each) for each in (_Float(target.module), _Float(session))]
    of_sims = [target.score(each) for each in (target.in_torch(W4), target.in_onnx(W4))]
    return ["resnet20", deviation, *of_floats, *of_sims]


class _Float:
    """A float model with a simulation's attribute."""

    def __init__(self, model: Any) -> None:
        if isinstance(model, nn.Module):
            self.model = model
        else:
            self.session = model
