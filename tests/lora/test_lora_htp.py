"""Adapters on HTP, simulated: all nodes assigned, and the numbers those of the simulation."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import LPBQ, PerTensor, QSpec, lora
from aimet_ext.core.objective import sqnr_db

peft = pytest.importorskip("peft")
pytest.importorskip("aimet_torch")
pytest.importorskip("aimet_onnx")
pytest.importorskip("onnxruntime_qnn")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.slow,
]

IDS = torch.arange(32)[None] * 3 % 128
TARGET = "htp_v75"


@pytest.fixture(scope="module")
def sim(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return two adapters on an LPBQ base with biases."""
    model = tiny_model("qwen2", tie_word_embeddings=True)
    base = aimet_ext.create_sim(
        aimet_ext.prepare_model(copy.deepcopy(model), mask_value=-100.0),
        IDS,
        weights=QSpec(bitwidth=4, granularity=LPBQ(32)),
    )
    base.compute_encodings(lambda module: module(IDS))
    folder = tmp_path_factory.mktemp("lora_htp") / "base"
    aimet_ext.export(base, folder, "m", IDS)
    settings: dict[str, Any] = {"lora_alpha": 8, "init_lora_weights": False}
    first = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **settings)
    second = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(copy.deepcopy(model), first, adapter_name="one")
        adapted.add_adapter("two", second)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return lora.create_sim(adapted.eval(), folder)


@torch.no_grad()
def logits(sim: Any, name: str | None) -> Tensor:
    lora.switch(sim, name)
    return sim.model(IDS)


def run_on_htp(
    model: Any, encoded: Any, feeds: Mapping[str, Mapping[str, Any]], path: pathlib.Path
) -> dict[str, Tensor]:
    """Compile once, with every node on HTP, and run with each feed."""
    from aimet_ext.artifact.hand_off import write_qdq
    from aimet_ext.integrations.qnn import compile_htp
    from aimet_ext.sim.onnx.build import build_target
    from aimet_ext.sim.onnx.ranges import calibrate_added, put_encodings

    ids = {"input_ids": IDS.numpy()}
    every = {name: {**ids, **feed} for name, feed in feeds.items()}
    built = build_target(model, "htp_v79", sample=next(iter(every.values())))
    loaded = put_encodings(built, encoded)
    calibrate_added(built, loaded.others(built), list(every.values()))
    write_qdq(built, path)
    with compile_htp(path, TARGET) as session:
        assert not session.fallbacks
        return {name: torch.from_numpy(session.run(feed)[0]) for name, feed in every.items()}


def sqnr(output: Tensor, expected: Tensor) -> float:
    return sqnr_db(float(expected.square().sum()), float((output - expected).square().sum()))


def test_a_baked_adapter_runs_as_the_simulation_does(sim: Any, tmp_path: pathlib.Path) -> None:
    lora.quantize(sim, None, [IDS])
    lora.export(sim, tmp_path / "out", "m", IDS)
    model, encoded = lora.bake_adapter(tmp_path / "out", "one")
    output = run_on_htp(model, encoded, {"one": {}}, tmp_path / "q.onnx")["one"]
    assert sqnr(output, logits(sim, "one")) > 45
    assert sqnr(output, logits(sim, None)) < 10
    with pytest.raises(ValueError, match="two and one do not; quantize all of them in one call"):
        lora.shared_graph(tmp_path / "out")


def test_one_compiled_graph_runs_every_adapter(sim: Any, tmp_path: pathlib.Path) -> None:
    """The weights of adapters are inputs: nothing of the graph changes from one to the next."""
    weights = QSpec(bitwidth=8, granularity=PerTensor())
    lora.quantize(sim, None, [IDS], weights=weights, shared=True)
    lora.export(sim, tmp_path / "out", "m", IDS)
    model, encoded, feeds = lora.shared_graph(tmp_path / "out")
    outputs = run_on_htp(model, encoded, feeds, tmp_path / "q.onnx")
    assert set(outputs) == {"one", "two"}
    for name, output in outputs.items():
        other = next(n for n in outputs if n != name)
        assert sqnr(output, logits(sim, name)) > 35
        assert sqnr(output, logits(sim, other)) < 15
