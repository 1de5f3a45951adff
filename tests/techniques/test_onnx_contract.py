"""Layer-wise techniques decide on ONNX what they decide on PyTorch, each capturing for itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from layerwise_reference import shrunk_by_definition
from torch import Tensor, nn

import aimet_ext
from aimet_ext.core.affine import fake_quantize
from aimet_ext.data.geometry import Geometry
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import QSpec
from aimet_ext.techniques.layerwise import loop as layerwise
from aimet_ext.techniques.layerwise.deploy import Problem

pytest.importorskip("aimet_onnx")
pytest.importorskip("aimet_torch")
onnx_pairs = pytest.importorskip("onnx_pairs")

GRIDS, PAIRS = onnx_pairs.GRIDS, onnx_pairs.PAIRS


@dataclass
class Agreement:
    """Rows that were compared and rows that differ, over all layers."""

    rows: int = 0
    differing: int = 0

    def check(self, share: float = 1e-3) -> None:
        assert self.differing <= share * self.rows, f"{self.differing} of {self.rows} rows differ"


class Comparison:
    """Runs both simulations; the second one goes on with what the first one decided.

    So that each layer is judged by itself: one row that came out differently would change the
    inputs of every later layer.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.deploy = patch, layerwise.deploy
        self.total = Agreement()

    def run(self, apply: Callable[..., Any], pair: Any, spec: QSpec, **settings: Any) -> None:
        sims, data = pair.sims(spec), pair.arguments()
        self.nodes = pair.names(sims[1])
        self.modules = {node: name for name, node in self.nodes.items()}
        self.problems: dict[str, Problem] = {}
        self.patch.setattr(layerwise, "deploy", self._note)
        report = apply(sims[0], data[0], **settings)
        self.theirs = adapt(sims[0]).weight_quantizers(self.nodes)
        self.patch.setattr(layerwise, "deploy", self._compare)
        other = apply(sims[1], data[1], **settings)
        for one, two in zip(_layers(report), _layers(other), strict=True):
            assert self.nodes[one.name] == two.name
            assert two.loss_nearest == pytest.approx(one.loss_nearest, rel=5e-3)
            assert abs(two.loss_after - one.loss_after) <= 1e-2 * one.loss_nearest

    def _note(self, problem: Problem, *args: Any) -> Any:
        kept = {key: getattr(problem, key).clone() for key in ("stored", "weight")}
        self.problems[problem.name] = dataclasses.replace(problem, **kept)
        return self.deploy(problem, *args)

    def _compare(self, problem: Problem, quantizer: Any, *args: Any) -> Any:
        name = self.modules[problem.name]
        expected, other = self.problems[name], self.theirs[name]
        assert torch.equal(problem.stored, expected.stored)
        moments = problem.moment.second, expected.moment.second
        scale = float(moments[1].abs().max())
        torch.testing.assert_close(*moments, rtol=0, atol=2e-5 * scale)
        outcome = self.deploy(problem, quantizer, *args)
        assert quantizer.frozen
        values = [fake_quantize(q.weight, q.grid()).flatten(1) for q in (quantizer, other)]
        differs = ((values[0] - values[1]).abs() > 1e-6 * values[1].abs().max()).any(1)
        self.total.rows += len(differs)
        self.total.differing += int(differs.sum())
        if bool(differs.any()):
            offset = None if other.layout.symmetric else other.grid().offset
            quantizer.set_scale(other.free_grid().scale, offset)
            quantizer.set_weight(other.weight)
        return outcome


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    return Comparison(monkeypatch)


def _layers(report: Any) -> Any:
    return getattr(report, "search", report).layers


_PICTURES = ("convolutions", "upsampling")


@pytest.mark.slow
@pytest.mark.techniques(where=lambda t: not t.by_blocks)
def test_both_adaptors_decide_the_same(technique: Any, comparison: Comparison) -> None:
    """At least 99.9 % of all rows; graphs that torch exports and one as genai builds it."""
    for model, pair in ((name, build()) for name, build in PAIRS.items()):
        for kind in ("channel", "LPBQ"):
            settings: dict[str, Any] = {}
            if technique.name == "lpbq":
                kinds = [nn.Linear, nn.Conv2d] if model in _PICTURES else nn.Linear
                settings = {"layers": kinds, "on_indivisible": "per_channel"}
            if kind == "channel" or (model not in _PICTURES and technique.name != "lpbq"):
                comparison.run(technique.apply, pair, GRIDS[kind], **settings)
    assert comparison.total.rows > 2000
    comparison.total.check()


@pytest.mark.parametrize("name", ["gptq", "seq_mse", "adaround"])
def test_transposed_convolutions(comparison: Comparison, name: str) -> None:
    """Each of them is decided, as on PyTorch."""
    apply, pair = getattr(aimet_ext, f"apply_{name}"), PAIRS["upsampling"]()
    comparison.run(apply, pair, GRIDS["channel"], progress=False)
    assert {*comparison.problems} == {"enter", "up", "again", "wide", "head"}
    comparison.total.check(0)


@pytest.mark.parametrize("model", ["llama", "perceptron"])
@pytest.mark.parametrize("kind", GRIDS)
def test_compatible_seq_mse_too(comparison: Comparison, model: str, kind: str) -> None:
    """AIMET's own ranges, on every grid up to the 4 bits that it looks at."""
    spec = dataclasses.replace(GRIDS[kind], bitwidth=min(4, GRIDS[kind].bitwidth))
    settings = {"mode": "compatible", "inp_symmetry": "symqt", "progress": False}
    comparison.run(aimet_ext.apply_seq_mse, PAIRS[model](), spec, **settings)
    comparison.total.check()


@pytest.mark.parametrize("symmetry", ["symqt", "symfp", "asym"])
def test_every_stream(comparison: Comparison, symmetry: str) -> None:
    settings = {"inp_symmetry": symmetry, "progress": False, "scale_candidates": 2}
    comparison.run(aimet_ext.apply_gptq, PAIRS["llama"](), GRIDS["channel"], **settings)
    comparison.total.check(2e-3)  # one row of these few may


def moments_of(pair: Any, sim: Any, name: str, node: str) -> Tensor:
    """Second moments of a layer's inputs in the module itself, run as a whole, less their noise."""
    rows: list[Tensor] = []
    layer = pair.module.get_submodule(name)
    geometry = Geometry.of(layer)
    hook = layer.register_forward_pre_hook(lambda _, x: rows.append(geometry.rows(x[0]).double()))
    with torch.no_grad():
        for batch in pair.batches:
            pair.module(*batch.values())
    hook.remove()
    most = 1 - torch.finfo(torch.float32).eps ** 0.5  # of SeqMSE, which does not round
    return shrunk_by_definition(torch.cat(rows, 1), most)[0]


def test_moments_are_those_of_the_float_model(problems: dict[str, Any]) -> None:
    pair = PAIRS["convolutions"]()
    _, sim = pair.sims(GRIDS["channel"])
    names = pair.names(sim)
    data = pair.arguments()[1]
    aimet_ext.apply_seq_mse(sim, data, inp_symmetry="symfp", progress=False)
    for name, node in names.items():
        expected = moments_of(pair, sim, name, node)
        found = problems[node].moment.second
        expected = expected.view_as(found)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
