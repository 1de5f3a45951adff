"""What a compiler gets computes what the exported simulation does."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import aimet_ext
from aimet_ext import LPBQ, QSpec
from aimet_ext.artifact.hand_off import HandOff, hand_off, write_qdq
from aimet_ext.core.objective import sqnr_db
from aimet_ext.data.feeds import graph_feeds
from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.files.manifest import read_manifest, write_manifest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("aimet_torch")
aimet_onnx = pytest.importorskip("aimet_onnx")

from aimet_ext.integrations.qnn import is_available  # noqa: E402
from aimet_ext.onnx.index import stored_values  # noqa: E402
from aimet_ext.onnx.rewrite.compilable import float_weights  # noqa: E402
from aimet_ext.onnx.values import input_specs  # noqa: E402
from aimet_ext.sim.onnx import files as onnx_files  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from onnx_models import float_nodes, mlp_model  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
needs_qnn = pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")

IDS = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(1))
W4 = QSpec(bitwidth=4, granularity=LPBQ(32))
CASES: dict[str, tuple[str, dict[str, Any], QSpec]] = {
    "llama": ("llama", {}, W4),
    "tied": ("llama", {"tie_word_embeddings": True}, W4),
    "padded": (
        "llama",
        {"intermediate_size": 120},
        QSpec(granularity=LPBQ(32), on_indivisible="pad"),
    ),
    "three bits": ("llama", {}, QSpec(bitwidth=3)),
    "qwen2": ("qwen2", {}, W4),
    "qwen3": ("qwen3", {}, QSpec(bitwidth=4)),
}


def decibels(output: Any, expected: Any) -> float:
    wide = np.asarray(expected, np.float64)
    return sqnr_db(float(np.square(wide).sum()), float(np.square(output - wide).sum()))


def exported(folder: pathlib.Path, model: Any, weights: QSpec, mask: float | None = -100.0) -> Any:
    prepared = aimet_ext.prepare_model(model, mask_value=mask)
    sim = aimet_ext.create_sim(prepared, IDS[:1], weights=weights)
    sim.compute_encodings(lambda module: [module(row[None]) for row in IDS])
    aimet_ext.export(sim, folder, "net", IDS[:1])
    return sim


@pytest.fixture(scope="module")
def cases(
    tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, HandOff]]:
    """The simulation and the hand-off of a case, made once; tests must leave both as they are."""
    made: dict[str, tuple[Any, HandOff]] = {}

    def case(name: str) -> tuple[Any, HandOff]:
        if name not in made:
            family, changes, weights = CASES[name]
            folder = tmp_path_factory.mktemp("hand_off") / "out"
            sim = exported(folder, tiny_model(family, **changes), weights)
            made[name] = sim, hand_off(folder, [IDS], sim=sim)
        return made[name]

    return case


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, cases: Callable[[str], Any]) -> tuple[Any, HandOff]:
    return cases(request.param)


@torch.no_grad()
def logits(sim: Any) -> Any:
    return sim.model(IDS[:1]).numpy()


def run(found: HandOff, feed: Any = None) -> Any:
    return found.sim.session.run(None, dict(feed or found.sample))[0]


def test_the_same_numbers_as_the_torch_simulation(case: tuple[Any, HandOff]) -> None:
    sim, found = case
    assert found.same_numbers > 70
    assert decibels(run(found), logits(sim)) > 60


def test_every_encoding_has_a_place(case: tuple[Any, HandOff]) -> None:
    _, found = case
    encoded = entries(load_encodings(found.folder / f"{found.prefix}.encodings"))
    assert set(encoded) <= {*found.loaded, *found.moved, *found.tables}
    assert not set(found.added) & set(encoded)
    assert any("MatMul_1_output" in name or "Softmax" in name for name in found.added)


def test_ranges_of_the_file_stay_when_others_are_calibrated(case: tuple[Any, HandOff]) -> None:
    _, found = case
    encoded = entries(load_encodings(found.folder / f"{found.prefix}.encodings"))
    compared = 0
    for name in set(found.loaded) & set(encoded):
        entry = encoded[name]
        if entry["enc_type"] == "PER_TENSOR":
            (own,) = found.sim.qc_quantize_op_dict[name].get_encodings()
            assert own.delta == pytest.approx(entry["scale"][0], rel=1e-7)
            assert own.offset == entry["offset"][0]
            compared += 1
    assert compared > 20


@torch.no_grad()
def test_weights_are_bit_identical(case: tuple[Any, HandOff]) -> None:
    sim, found = case
    names = read_manifest(found.folder)["onnx_names"]
    stored = stored_values(found.sim.model.model.graph)
    for module, layer in sim.named_qmodules():
        for key, quantizer in layer.param_quantizers.items():
            if quantizer is None:
                continue
            tensor = names[f"{module}.{key}"]
            expected = quantizer(getattr(layer, key)).numpy()
            value = onnx.numpy_helper.to_array(stored[tensor])
            if tensor not in found.tables:
                value = found.sim.qc_quantize_op_dict[tensor].quantize_dequantize(value)
            turned = value if value.shape == expected.shape else value.T
            same = (turned, turned.T) if turned.shape == turned.T.shape else (turned,)
            assert any(np.array_equal(each, expected) for each in same), tensor


def test_a_table_with_rows_has_16_bits(cases: Callable[[str], Any]) -> None:
    _, found = cases("tied")
    (table,) = found.tables
    assert found.sim.qc_quantize_op_dict[table].bitwidth == 16
    assert not cases("llama")[1].tables


def test_what_depends_on_no_input_is_stored(cases: Callable[[str], Any]) -> None:
    """A cosine of positions that were rounded to 16 bits is no cosine."""
    nodes = {node.op_type for node in cases("llama")[1].sim.model.model.graph.node}
    assert not nodes & {"Cos", "Sin", "CumSum", "Where"}


def test_a_qdq_model_in_onnxruntime(case: tuple[Any, HandOff], tmp_path: pathlib.Path) -> None:
    _, found = case
    path = write_qdq(found, tmp_path / "net.onnx")
    model = onnx.load(str(path))
    assert float_nodes(model) == [] and float_weights(model) == []
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(names)
    kinds = [node.op_type for node in model.graph.node]
    layers = 4 if any("q_norm" in name for name in found.loaded) else 2
    assert kinds.count("SimplifiedLayerNormalization") == 2 * layers + 1
    assert "ReduceMean" not in kinds
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert decibels(session.run(None, dict(found.sample))[0], run(found)) > 60


@needs_qnn
@pytest.mark.slow
def test_all_of_it_runs_on_htp(case: tuple[Any, HandOff], tmp_path: pathlib.Path) -> None:
    from aimet_ext.integrations.qnn import compile_htp

    _, found = case
    with compile_htp(write_qdq(found, tmp_path / "net.onnx"), "htp_v75") as session:
        assert not session.fallbacks
        assert decibels(session.run(found.sample)[0], run(found)) > 45


def test_masks_do_not_spoil_the_scores(
    tiny_model: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    sim = exported(tmp_path / "out", tiny_model("llama", num_hidden_layers=1), W4, mask=None)
    found = hand_off(tmp_path / "out", [IDS], sim=sim)
    assert decibels(run(found), logits(sim)) > 60
    lowest = [
        encoding.min
        for name in found.added
        for encoding in found.sim.qc_quantize_op_dict[name].get_encodings()
    ]
    assert -200 < min(lowest) < -99


def test_keys_and_values_in_8_bits(cases: Callable[[str], Any], tmp_path: pathlib.Path) -> None:
    sim, found = cases("qwen3")
    narrow = hand_off(found.folder, [IDS], sim=sim, kv_bitwidth=8)
    assert len(narrow.kept) == 4 and set(narrow.kept) <= set(narrow.added)
    assert {narrow.sim.qc_quantize_op_dict[name].bitwidth for name in narrow.kept} == {8}
    assert narrow.same_numbers == pytest.approx(found.same_numbers, abs=3)
    error = decibels(run(narrow), run(found))
    assert 30 < error < 60
    model = onnx.load(str(write_qdq(narrow, tmp_path / "net.onnx")))
    widened = [node for node in model.graph.node if node.name.endswith("_signed_QuantizeLinear")]
    assert len(widened) == 4


def test_a_tensor_that_the_model_lacks_is_named(
    cases: Callable[[str], Any], tmp_path: pathlib.Path
) -> None:
    sim, found = cases("llama")
    folder = tmp_path / "out"
    shutil.copytree(found.folder, folder)
    path = folder / "net.encodings"
    document = json.loads(path.read_text())
    document["activation_encodings"][3]["name"] = "no_such_tensor"
    path.write_text(json.dumps(document))
    write_manifest(folder, "export", prefix="net")
    with pytest.raises(ValueError, match="no_such_tensor"):
        hand_off(folder, [IDS], sim=sim)


def test_batches_are_cut_to_the_graph(cases: Callable[[str], Any]) -> None:
    _, found = cases("llama")
    inputs = input_specs({v.name: v for v in found.sim.model.model.graph.input})
    found_feeds = graph_feeds([IDS, IDS[:1]], inputs)
    assert [batch["input_ids"].shape for batch in found_feeds] == [(1, 32)] * 5
    with pytest.raises(ValueError, match=r"\[1, 32\], got \[1, 16\]"):
        graph_feeds([IDS[:1, :16]], inputs)
    with pytest.raises(ValueError, match="at least one batch"):
        graph_feeds([], inputs)


def test_free_axes_become_static(tiny_model: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    model = aimet_ext.prepare_model(tiny_model("llama", num_hidden_layers=1), mask_value=-100.0)
    sim = aimet_ext.create_sim(model, IDS, weights=W4)
    sim.compute_encodings(lambda module: module(IDS))
    axes = {"input_ids": {0: "batch", 1: "length"}, "logits": {0: "batch", 1: "length"}}
    aimet_ext.export(sim, tmp_path / "out", "net", IDS, dynamic_axes=axes)
    found = hand_off(tmp_path / "out", [IDS[:, :16]], sim=sim)
    assert found.same_numbers > 70
    model = onnx.load(str(write_qdq(found, tmp_path / "net.onnx")))
    dims = [dim.dim_value for v in model.graph.input for dim in v.type.tensor_type.shape.dim]
    assert dims == [1, 16]
    assert not {node.op_type for node in model.graph.node} & {"Shape", "Cos", "Where"}
    with pytest.raises(ValueError, match="one shape"):
        hand_off(tmp_path / "out", [IDS[:, :16], IDS], sim=sim)


class Net(nn.Module):
    """A convolution that looks at one place, one that does not, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(64, 64, 1)
        self.area = nn.Conv2d(64, 64, 3, padding=1)
        self.wide = nn.Linear(64 * 16, 64)
        self.last = nn.Linear(64, 64)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.area(self.point(image)))
        return self.last(torch.relu(self.wide(hidden.flatten(1))))


@pytest.fixture(scope="module", params=["lpbq", "blocks"])
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HandOff:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = Net().eval(), torch.randn(4, 1, 64, 4, 4)
    sim = aimet_ext.create_sim(model, (images[0],), overrides={"area": QSpec(bitwidth=8)})
    setter = aimet_ext.set_lpbq if request.param == "lpbq" else aimet_ext.set_blockwise
    setter(sim, 32, layers=["point", "wide", "last"])
    sim.compute_encodings(lambda module: [module(image) for image in images])
    folder = tmp_path_factory.mktemp("net") / "out"
    aimet_ext.export(sim, folder, "net", (images[0],))
    return hand_off(folder, [(image,) for image in images], sim=sim)


def test_biases_of_weights_with_blocks_stand_apart(net: HandOff, tmp_path: pathlib.Path) -> None:
    assert net.same_numbers > 70
    model = onnx.load(str(write_qdq(net, tmp_path / "net.onnx")))
    kinds = [node.op_type for node in model.graph.node]
    assert "Gemm" not in kinds and kinds.count("Add") == 3
    assert kinds.count("MatMul") + kinds.count("Conv") == 4


def test_a_file_is_replaced_whole_or_not_at_all(
    net: HandOff, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_qdq(net, tmp_path / "net.onnx")
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):

        def fail(model: Any, path: pathlib.Path, *, external: bool) -> None:
            path.write_bytes(b"half")
            raise OSError("disk full")

        patch.setattr(onnx_files, "save_model", fail)
        write_qdq(net, path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_bytes() == before
    monkeypatch.setattr(onnx_files, "EXTERNAL_LIMIT", 1000)
    write_qdq(net, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    model, whole = onnx.load(str(path)), onnx.load_from_string(before)
    values = [[onnx.numpy_helper.to_array(t) for t in m.graph.initializer] for m in (model, whole)]
    assert all(np.array_equal(one, two) for one, two in zip(*values, strict=True))


@needs_qnn
def test_biases_are_not_dropped_on_htp(net: HandOff, tmp_path: pathlib.Path) -> None:
    from aimet_ext.integrations.qnn import compile_htp

    with compile_htp(write_qdq(net, tmp_path / "net.onnx"), "htp_v75") as session:
        assert not session.fallbacks
        assert decibels(session.run(net.sample)[0], run(net)) > 50


@pytest.mark.parametrize("bias", ["gemm", "add"])
def test_an_onnx_simulation(bias: str, tmp_path: pathlib.Path) -> None:
    from aimet_onnx import defs
    from aimet_onnx.common.defs import qtype

    batch = {"x": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)}
    sim = aimet_onnx.QuantizationSimModel(
        mlp_model((64, 96, 32), bias=bias),
        config_file="htp_v79",
        param_type="int4",
        activation_type="int16",
    )
    for name in ("fc0.weight", "fc1.weight"):
        sim.qc_quantize_op_dict[name].set_qspec(defs.QSpec(qtype.int(4), defs.LPBQ(16, 4), True))
    sim.compute_encodings([batch])
    aimet_ext.export(sim, tmp_path / "out", "net", batch)
    found = hand_off(tmp_path / "out", [batch])
    assert found.same_numbers > 70
    assert sum(name.endswith(("_product", "_without_bias")) for name in found.added) == 2
    assert decibels(run(found), sim.session.run(None, dict(found.sample))[0]) > 60
    write_qdq(found, tmp_path / "net.onnx")
    write_qdq(found.sim, tmp_path / "net.onnx")


def test_blocks_of_convolutions_that_look_around_are_left_alone(tmp_path: pathlib.Path) -> None:
    from aimet_ext.onnx.rewrite.htp import set_apart

    model = nn.Sequential(nn.Conv2d(32, 8, 3), nn.Conv2d(8, 4, 1, stride=2))
    path = tmp_path / "net.onnx"
    torch.onnx.export(model, (torch.zeros(1, 32, 8, 8),), str(path), dynamo=False)
    graph = onnx.load(str(path))
    assert set_apart(graph, {"0.weight": "LPBQ", "1.weight": "LPBQ"}) == []
