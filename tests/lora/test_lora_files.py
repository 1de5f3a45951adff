"""Adapters on disk: read back bit by bit, and as inputs of one ONNX graph."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from warm_python import WarmPython

import aimet_ext
from aimet_ext import lora
from aimet_ext.core.objective import sqnr_db
from aimet_ext.errors import CorruptFileError
from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.lora.sim import lora_state
from aimet_ext.sim.protocol import adapt

peft = pytest.importorskip("peft")
pytest.importorskip("aimet_torch")
onnx = pytest.importorskip("onnx")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

A0 = "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def sim(lora_peft: Any, lora_base: pathlib.Path, lora_ids: Tensor) -> Any:
    sim = lora.create_sim(lora_peft, lora_base)
    lora.quantize(sim, None, [lora_ids])
    lora.switch(sim, "two")
    return sim


@pytest.fixture(scope="module")
def folder(sim: Any, lora_ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("lora_files") / "out"
    lora.export(sim, path, "m", lora_ids)
    return path


@torch.no_grad()
def logits(sim: Any, ids: Tensor) -> Tensor:
    return sim.model(ids)


def test_it_is_read_back_bit_by_bit(sim: Any, folder: pathlib.Path, lora_ids: Tensor) -> None:
    loaded = lora.load(folder)
    assert lora_state(loaded).active == "two"
    assert lora.base_hash(loaded) == lora.base_hash(sim)
    for name in ("two", "one", None):
        lora.switch(loaded, name)
        lora.switch(sim, name)
        assert torch.equal(logits(loaded, lora_ids), logits(sim, lora_ids))
    lora.switch(sim, "two")
    report = lora.quantize(loaded, ["one"], [lora_ids])  # it goes on from there
    assert report.adapters[0].logits_sqnr_db > 30


@pytest.mark.slow
def test_a_new_process_needs_the_folder_alone(
    sim: Any,
    folder: pathlib.Path,
    lora_ids: Tensor,
    warm_python: WarmPython,
    tmp_path: pathlib.Path,
) -> None:
    save_file({"logits": logits(sim, lora_ids), "ids": lora_ids}, tmp_path / "expected")
    script = tmp_path / "script.py"
    script.write_text(
        "import warnings\n"
        "warnings.simplefilter('ignore')\n"
        "import torch\n"
        "from safetensors.torch import load_file\n"
        "from aimet_ext import lora\n"
        f"expected = load_file({str(tmp_path / 'expected')!r})\n"
        f"sim = lora.load({str(folder)!r})\n"
        "with torch.no_grad():\n"
        "    same = torch.equal(sim.model(expected['ids']), expected['logits'])\n"
        "print('same' if same else 'other')\n"
    )
    done = warm_python.run(script, folder=tmp_path)
    assert done.stdout.strip().endswith("same"), done.stderr


def test_the_graph_takes_adapters_as_inputs(
    sim: Any, folder: pathlib.Path, lora_ids: Tensor
) -> None:
    """Without them it computes what the float base does, with them what the adapter does."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    for name in (None, "one", "two"):
        feed = {"input_ids": lora_ids.numpy()}
        if name is not None:
            feed.update(
                {k: v.numpy() for k, v in load_file(folder / f"{name}.safetensors").items()}
            )
        output = torch.from_numpy(session.run(None, feed)[0])
        lora.switch(sim, name)
        with torch.no_grad(), adapt(sim).disabled_quantizers():
            expected = sim.model(lora_ids)
        assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    lora.switch(sim, "two")
    names = json.loads((folder / "lora_names.json").read_text())
    graph = onnx.load(folder / "m.onnx").graph
    assert set(names["params"]) < {value.name for value in graph.input}
    assert set(names["params"]) == set((folder / "lora_weight_list.txt").read_text().split())
    assert A0 in names["params"]


def test_the_base_encodings_are_those_of_its_export(
    folder: pathlib.Path, lora_base: pathlib.Path
) -> None:
    """Weights by name, activations by what they say; sums say what the base layer's output does."""
    base = entries(load_encodings(lora_base / "base.encodings"))
    mine = entries(load_encodings(folder / "m.encodings"))
    names = json.loads((folder / "lora_names.json").read_text())

    def plain(name: str) -> str:
        return name.replace("/base_layer", "").replace(".base_layer", "")

    new = {name for name in mine if name not in base and plain(name) in base}
    assert not set(names["params"] + names["activations"]) & set(mine)

    def said(entry: dict[str, Any]) -> str:
        return json.dumps({key: value for key, value in entry.items() if key != "name"})

    assert set(base) - set(mine) == {plain(name) for name in new}
    assert {said(entry) for entry in mine.values()} == {said(entry) for entry in base.values()}
    assert new
    for name in new:
        assert said(mine[name]) == said(base[plain(name)])


def test_each_adapter_has_encodings_of_its_own(sim: Any, folder: pathlib.Path) -> None:
    names = json.loads((folder / "lora_names.json").read_text())
    wanted = set(names["params"] + names["activations"] + names["sums"])
    found = {n: entries(load_encodings(folder / f"m_{n}.encodings")) for n in ("one", "two")}
    assert all(set(encodings) == wanted for encodings in found.values())
    for name, encodings in found.items():
        quantizer = lora_state(sim).adapters[name]["model." + A0.partition(".lora_A")[0]]
        scale = quantizer.quantizers["A"].get_scale().flatten().tolist()
        assert encodings[A0]["scale"][: len(scale)] == pytest.approx(scale)
        assert len(encodings[A0]["scale"]) == 4  # the largest rank


def test_peft_reads_the_adapters(folder: pathlib.Path, lora_base: pathlib.Path) -> None:
    adapters = lora.read_adapters(folder / "adapters")
    assert set(adapters) == {"one", "two"}
    assert all(adapter.folded is not None for adapter in adapters.values())


def test_aimet_reads_what_was_written(folder: pathlib.Path, lora_ids: Tensor) -> None:
    """AIMET's own functions for LoRA put an adapter into its ONNX simulation."""
    aimet_onnx = pytest.importorskip("aimet_onnx")
    from aimet_onnx.experimental.lora import set_lora_encodings, set_lora_weights

    names = json.loads((folder / "lora_names.json").read_text())
    onnx_sim = aimet_onnx.QuantizationSimModel(
        onnx.load(folder / "m.onnx"),
        config_file="htp_v79",
        providers=["CPUExecutionProvider"],
        dummy_input={"input_ids": lora_ids.numpy()},
    )
    arrays = {key: t.numpy() for key, t in load_file(folder / "one.safetensors").items()}
    set_lora_weights(onnx_sim, names, "one", arrays)
    encodings = entries(load_encodings(folder / "m_one.encodings"))
    known = {
        name: entry for name, entry in encodings.items() if name in onnx_sim.qc_quantize_op_dict
    }
    assert set(names["params"]) <= set(known)
    assert set_lora_encodings(onnx_sim, known) == len(known)
    quantizer = onnx_sim.qc_quantize_op_dict[A0]
    assert quantizer.bitwidth == 8
    found = quantizer.export_encodings("1.0.0")
    assert found["scale"] == pytest.approx(encodings[A0]["scale"])


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_baked_adapter_is_the_simulation_in_onnx(
    sim: Any, folder: pathlib.Path, lora_ids: Tensor, name: str
) -> None:
    """The graph with exactly the simulation's quantizers gives its numbers, not the base's."""
    pytest.importorskip("aimet_onnx")
    from aimet_ext.sim.onnx.build import build_target
    from aimet_ext.sim.onnx.ranges import put_encodings
    from aimet_ext.sim.onnx.state import only_these

    model, encoded = lora.bake_adapter(folder, name)
    assert [value.name for value in model.graph.input] == ["input_ids"]
    feed = {"input_ids": lora_ids.numpy()}
    built = build_target(model, "htp_v79", activation_bits=16, sample=feed)
    loaded = put_encodings(built, encoded)
    with only_these(built, loaded.quantizers):
        output = torch.from_numpy(built.session.run(None, feed)[0])
    found = {}
    for adapter in (name, None):
        lora.switch(sim, adapter)
        expected = logits(sim, lora_ids)
        found[adapter] = sqnr_db(
            float(expected.square().sum()), float((output - expected).square().sum())
        )
    lora.switch(sim, "two")
    assert found[name] > 55 > 20 > found[None]


def test_only_adapters_of_the_folder_can_be_baked(
    folder: pathlib.Path, lora_base: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=r"one of \['one', 'two'\], got 'three'"):
        lora.bake_adapter(folder, "three")
    with pytest.raises(CorruptFileError, match="got 'export'"):
        lora.bake_adapter(lora_base, "one")


def test_a_changed_file_is_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import shutil

    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    file = copied / "one.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CorruptFileError, match=r"one\.safetensors was changed"):
        lora.load(copied)
    with pytest.raises(CorruptFileError, match="an export is required, got 'lora'"):
        aimet_ext.load(folder)


def test_a_base_that_was_changed_is_not_written(
    sim: Any, lora_ids: Tensor, tmp_path: pathlib.Path
) -> None:
    weight = sim.model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"1 of its tensors .*q_proj\.weight"):
        lora.export(sim, tmp_path / "out", "m", lora_ids)
    with torch.no_grad():
        weight.copy_(kept)
    assert not (tmp_path / "out").exists()


def test_names_that_name_no_file_are_refused(
    sim: Any, lora_ids: Tensor, tmp_path: pathlib.Path
) -> None:
    state = lora_state(sim)
    state.adapters["../x"] = state.adapters["one"]
    try:
        with pytest.raises(ValueError, match=r"got \['\.\./x'\]"):
            lora.export(sim, tmp_path / "out", "m", lora_ids)
    finally:
        del state.adapters["../x"]
