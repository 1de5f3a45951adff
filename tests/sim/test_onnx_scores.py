"""Ranges of scores are as short as a Softmax lets them be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

aimet_onnx = pytest.importorskip("aimet_onnx")
onnx_models = pytest.importorskip("onnx_models")

from onnx import TensorProto, helper  # noqa: E402

from aimet_ext.sim.onnx.scores import clip_scores  # noqa: E402
from aimet_ext.sim.protocol import adapt  # noqa: E402

RANDOM = np.random.default_rng(0)
LENGTH = 16
Q = 3 * RANDOM.standard_normal((1, 2, LENGTH, 4)).astype(np.float32)
K = 2 * RANDOM.standard_normal((1, 2, 4, LENGTH)).astype(np.float32)
MASK = np.triu(np.full((1, 1, LENGTH, LENGTH), -100, np.float32), 1)
FEEDS = [{"q": Q, "k": K}]


def attention(activations: str) -> Any:
    """A calibrated simulation of ``softmax(q k + mask)``."""
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"], name="scores"),
        helper.make_node("Add", ["scores", "mask"], ["masked"], name="masked"),
        helper.make_node("Softmax", ["masked"], ["y"], name="softmax", axis=-1),
    ]
    inputs = {name: (TensorProto.FLOAT, list(x.shape)) for name, x in FEEDS[0].items()}
    outputs = {"y": (TensorProto.FLOAT, [1, 2, LENGTH, LENGTH])}
    sim = aimet_onnx.QuantizationSimModel(
        onnx_models.finish(nodes, inputs, outputs, {"mask": MASK}),
        activation_type=activations,
        config_file="htp_v79",
        providers=["CPUExecutionProvider"],
    )
    sim.compute_encodings(FEEDS)
    return sim


def error(sim: Any) -> float:
    target = torch.from_numpy(Q @ K + MASK).softmax(-1).numpy()
    return float(np.square(sim.session.run(None, FEEDS[0])[0] - target).mean())


def test_steps_become_finer_where_the_softmax_gains() -> None:
    sim = attention("int8")
    before, high = error(sim), float((Q @ K + MASK).max())
    changed = clip_scores(sim, ["scores", "masked", "y"], FEEDS)
    assert sorted(changed) == ["masked", "scores"]
    points = adapt(sim).points()
    for name in changed:
        assert points[name].frozen
        assert points[name].high == pytest.approx(high, abs=1)
        assert -80 < points[name].low < -4
    assert error(sim) < before / 2


def test_only_what_may_change_does() -> None:
    sim = attention("int8")
    before = adapt(sim).points()["scores"].low
    assert clip_scores(sim, ["masked"], FEEDS) in (["masked"], [])
    assert adapt(sim).points()["scores"].low == before


def test_fine_steps_are_left_alone() -> None:
    sim = attention("int16")
    assert clip_scores(sim, ["scores", "masked"], FEEDS) == []
