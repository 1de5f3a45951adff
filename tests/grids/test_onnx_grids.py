"""Blockwise grids on ONNX sims: AIMET's own, on every layer that was asked for, all or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import aimet_ext
from aimet_ext.core.affine import fake_quantize
from aimet_ext.files.ledger import Ledger
from aimet_ext.grids.blockwise import set_blockwise, set_lpbq
from aimet_ext.sim.onnx import ranges as onnx_grids
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import LPBQ, Blockwise, PerChannel, PerTensor, QSpec

aimet_onnx = pytest.importorskip("aimet_onnx")
onnx = pytest.importorskip("onnx")
onnx_models = pytest.importorskip("onnx_models")
quantsim = pytest.importorskip("aimet_onnx.quantsim")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

X = {"x": np.random.default_rng(0).standard_normal((2, 8, 6, 6)).astype(np.float32)}
IDS = {"input_ids": np.arange(32).reshape(2, 16) * 3 % 128}
LPBQ8 = QSpec(granularity=LPBQ(8))
Q, DOWN, HEAD = (
    "/model/model/layers.0/self_attn/q_proj/MatMul",
    "/model/model/layers.0/mlp/down_proj/MatMul",
    "/model/lm_head/MatMul",
)
NODES = [
    ("Conv", ["x", "conv.weight", "conv.bias"], "c", "/conv/Conv", {"pads": [1, 1, 1, 1]}),
    ("Relu", ["c"], "r", "/Relu", {}),
    ("Conv", ["r", "deep.weight"], "d", "/deep/Conv", {"group": 16}),
    ("Conv", ["d", "point.weight"], "p", "/point/Conv", {}),
    ("GlobalAveragePool", ["p"], "g", "/pool", {}),
    ("Flatten", ["g"], "f", "/flatten", {}),
    ("MatMul", ["f", "first.weight"], "m", "/first/MatMul", {}),
    ("Add", ["m", "first.bias"], "a", "/first/Add", {}),
    ("Gemm", ["a", "second.weight", "second.bias"], "s", "/second/Gemm", {"transB": 1}),
    ("Transpose", ["turned.weight"], "t", "/turned/Transpose", {"perm": [1, 0]}),
    ("MatMul", ["s", "t"], "u", "/turned/MatMul", {}),
    ("MatMul", ["u", "shared.weight"], "v", "/shared/MatMul", {}),
    ("MatMul", ["v", "shared.weight"], "logits", "/shared/MatMul_1", {}),
]
SHAPES = {
    "conv.weight": (16, 8, 3, 3),
    "conv.bias": (16,),
    "deep.weight": (16, 1, 1, 1),
    "point.weight": (16, 16, 1, 1),
    "first.weight": (16, 32),
    "first.bias": (32,),
    "second.weight": (24, 32),
    "second.bias": (24,),
    "turned.weight": (16, 24),
    "shared.weight": (16, 16),
}
LAYERS = ("/conv/Conv", "/deep/Conv", "/point/Conv", "first", "/second/Gemm", "turned", "shared")


def network() -> Any:
    random = np.random.default_rng(1)
    weights = {
        name: (random.standard_normal(shape) / 4).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    graph = helper.make_graph(
        [helper.make_node(op, reads, [out], name, **more) for op, reads, out, name, more in NODES],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    return model


def cnn(model: Any = None, **settings: Any) -> Any:
    sim = aimet_onnx.QuantizationSimModel(
        model or network(), **{"param_type": "int8", "activation_type": "int16", **settings}
    )
    sim.compute_encodings([X])
    return sim


@pytest.fixture(scope="module")
def exported() -> Any:
    return onnx_models.exported_llama(mask=False)


@pytest.fixture
def llm(exported: Any) -> Any:
    copied = onnx.ModelProto()
    copied.CopyFrom(exported.model)
    sim = aimet_onnx.QuantizationSimModel(copied, param_type="int8", activation_type="int16")
    sim.compute_encodings([IDS])
    return sim


def node_of(sim: Any, text: str) -> str:
    """The layer that has this in its name."""
    (found,) = [name for name in adapt(sim).layers if text in name]
    return found


def quantizer(sim: Any, text: str) -> Any:
    return sim.qc_quantize_op_dict[adapt(sim).layers[node_of(sim, text)].weight]


def spec_of(sim: Any, text: str) -> QSpec | None:
    found = adapt(sim).weight_quantizer(node_of(sim, text))
    return None if found is None else found.spec()


def specs_of(sim: Any) -> dict[str, QSpec]:
    return {name: q.spec() for name, q in adapt(sim).weight_quantizers().items()}


def encodings(found: Any) -> Any:
    values = found.get_encodings()
    return values and [(e.min, e.max, e.delta, e.offset, e.bw) for e in values]


def run(sim: Any, feed: Any = None) -> Any:
    return sim.session.run(None, feed or X)[0]


def state_of(sim: Any) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, q in sim.qc_quantize_op_dict.items():
        info = q.quant_info
        state[name] = (
            (q.enabled, q.bitwidth, q.use_symmetric_encodings, str(q.op_mode), str(q.data_type)),
            (q.is_encoding_frozen(), encodings(q), q.get_zero_point_shift()),
            (info.usePerChannelMode, info.channelAxis, info.blockAxis, info.blockSize),
            (str(q._scale_quantizer), str(q.tensor_quantizer_params)),
        )
    return state


def refused(sim: Any, match: str, error: type[Exception] = ValueError, **arguments: Any) -> None:
    before = state_of(sim)
    with pytest.raises(error, match=match):
        set_lpbq(sim, **{"block_size": 8, **arguments})
    assert state_of(sim) == before


class TestTheGrid:
    @pytest.mark.parametrize("layer", ["conv", "point", "first", "second", "turned", "shared"])
    @pytest.mark.parametrize("kind", ["lpbq", "symmetric", "asymmetric"])
    @pytest.mark.parametrize("bitwidth", [2, 4])
    def test_it_is_aimets_own_with_the_ranges_of_compute_encodings(self, layer, kind, bitwidth):
        """Settings, ranges and output are those of AIMET's set_*_for_weights, bit by bit."""
        sim, theirs = cnn(), cnn()
        name = node_of(sim, layer)
        others = [n.name for n in theirs.model.model.graph.node if layer not in n.name]
        if kind == "lpbq":
            report = set_lpbq(sim, 8, bitwidth=bitwidth, scale_bits=bitwidth, layers=name)
            nodes = {n.name for n in theirs.model.model.graph.node if f"/{layer}" in n.name}
            nodes -= {f"/{layer}/Transpose"}
            quantsim.set_lpbq_for_params(theirs, bitwidth, 8, nodes_to_include=nodes)
            expected = QSpec(bitwidth=bitwidth, granularity=LPBQ(8, bitwidth))
        else:
            symmetric = kind == "symmetric"
            report = set_blockwise(sim, 8, bitwidth=bitwidth, symmetric=symmetric, layers=name)
            quantsim.set_blockwise_quantization_for_weights(
                theirs,
                ("Gemm", "MatMul", "Conv"),
                bitwidth,
                symmetric,
                8,
                nodes_to_exclude=others,
            )
            expected = QSpec(bitwidth=bitwidth, symmetric=symmetric, granularity=Blockwise(8))
        assert report.specs == {name: expected} and spec_of(sim, name) == expected
        assert not adapt(sim).weight_quantizer(name).frozen
        ours = run(sim)
        theirs.compute_encodings([X])
        states = state_of(sim), state_of(theirs)
        weight = adapt(sim).layers[name].weight
        assert states[0][weight] == states[1][weight]
        values = adapt(sim).weight_quantizer(name)
        stored = adapt(sim).graph.array(weight)
        quantized = torch.from_numpy(quantizer(sim, layer).quantize_dequantize(stored))
        if adapt(sim).layers[name].transposed:
            quantized = quantized.T
        assert torch.equal(fake_quantize(values.weight, values.grid()), quantized)
        for activation in theirs.activation_names:  # these saw other weights
            theirs.qc_quantize_op_dict[activation].enabled = False
            sim.qc_quantize_op_dict[activation].enabled = False
        assert np.array_equal(run(sim), run(theirs)) and ours.shape == (2, 16)

    def test_later_calibration_leaves_it(self):
        sim = cnn()
        set_lpbq(sim, 8, nodes_to_exclude="/deep/Conv")
        before = {name: encodings(sim.qc_quantize_op_dict[name]) for name in sim.param_names}
        sim.compute_encodings([X])
        for name in sim.param_names:
            assert encodings(sim.qc_quantize_op_dict[name]) == before[name]

    def test_other_quantizers_stay(self):
        sim = cnn()
        before = state_of(sim)
        report = set_lpbq(sim, 8, layers=["*second*", "/point/Conv"])
        after = state_of(sim)
        assert {name for name in after if after[name] != before[name]} == {
            "second.weight",
            "point.weight",
        }
        assert len(report.specs) == 2 and len(report.untouched) == 5

    def test_a_bias_quantizer_gets_a_range_for_each_channel(self):
        """So that its scale is that of input times weight in an exported file."""
        sim = cnn()
        bias = sim.qc_quantize_op_dict["second.bias"]
        bias.enable_per_channel_quantization(False)
        bias.enabled = True
        bias.set_bitwidth(16)
        sim.compute_encodings([X])
        set_lpbq(sim, 8, layers="/second/Gemm")
        assert bias.quant_info.usePerChannelMode and len(bias.get_encodings()) == 24
        assert np.isfinite(run(sim)).all()

    def test_a_float_layer_is_quantized_and_made_float(self):
        sim = cnn()
        for name in sim.activation_names:
            sim.qc_quantize_op_dict[name].enabled = False
        whole = run(sim)
        set_lpbq(sim, 8, layers=[], overrides={name: None for name in LAYERS if name[0] == "/"})
        set_lpbq(sim, 8, layers=[], overrides=dict.fromkeys(("first", "turned", "shared")))
        assert specs_of(sim) == {}
        with adapt(sim).disabled_quantizers():
            exact = run(sim)
        assert np.array_equal(run(sim), exact) and not np.array_equal(whole, exact)
        set_lpbq(sim, 8, layers=[], overrides={"/second/Gemm": LPBQ8})
        assert list(specs_of(sim).values()) == [LPBQ8]
        assert not np.array_equal(run(sim), exact)


class TestWhichLayers:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("/second/Gemm", {"second"}),
            ("second", {"second"}),
            ("second.weight", {"second"}),
            ("/first/MatMul", {"first"}),
            ("/first/Add", {"first"}),
            ("*oint*", {"point"}),
            (["conv", "turned"], {"conv", "turned"}),
            ("MatMul", {"first", "turned", "shared"}),
            ("Gemm", {"first", "second"}),
            (("Gemm", "MatMul"), {"first", "second", "turned", "shared"}),
            (nn.Linear, {"first", "second", "turned", "shared"}),
            (lambda module: getattr(module, "kernel_size", 0) == (3, 3), {"conv"}),
            ("/shared/MatMul_1", {"shared"}),
        ],
        ids=range(13),
    )
    def test_forms(self, layers, expected):
        sim = cnn()
        before = specs_of(sim)
        set_lpbq(sim, 8, layers=layers)
        after = specs_of(sim)
        changed = {name for name in after if after[name] != before[name]}
        assert changed == {node_of(sim, name) for name in expected}

    def test_aimets_names_of_arguments(self):
        sim = cnn()
        report = set_lpbq(
            sim, 8, op_types=("Conv", "Gemm", "MatMul"), nodes_to_exclude=["/deep/Conv"]
        )
        assert len(report.specs) == 6
        sim = cnn()
        report = set_blockwise(sim, 8, nodes_to_include={"/second/Gemm"}, excluded_nodes=[])
        assert list(report.specs) == ["/second/Gemm"]
        with pytest.raises(TypeError, match="twice"):
            set_lpbq(sim, 8, layers="*", op_types=("Conv",))

    def test_a_type_that_is_not_there_adds_nothing(self, llm):
        """AIMET's own default names types that a model may lack."""
        report = set_lpbq(llm, 16, layers=("Conv", "Gemm", "MatMul"))
        assert len(report.specs) == 15 and node_of(llm, "lm_head") in report.specs
        refused(llm, "at least one layer must remain", layers="Conv")

    def test_by_default_not_the_embedding_nor_the_output_layer(self, llm):
        report = set_lpbq(llm, 16)
        assert len(report.specs) == 14
        assert node_of(llm, "lm_head") in report.untouched
        assert spec_of(llm, "lm_head") == QSpec(bitwidth=8)
        assert len(set_blockwise(llm, 16, layers="*MatMul").specs) == 14
        assert list(set_lpbq(llm, 16, layers="*lm_head").specs) == [node_of(llm, "lm_head")]

    def test_names_of_the_checkpoint_and_scopes_to_exclude(self, llm):
        report = set_lpbq(
            llm, 16, layers="*.layers.*.mlp.*", modules_to_exclude="/model/model/layers.0"
        )
        assert len(report.specs) == 3 and all("layers.1/mlp" in name for name in report.specs)
        report = set_lpbq(llm, 16, modules_to_exclude=["*layers.1", "*/mlp", "/model/*/Softmax"])
        assert len(report.specs) == 4 and all("0/self_attn" in name for name in report.specs)

    def test_overrides(self, llm):
        report = set_lpbq(
            llm,
            16,
            overrides={
                "*.layers.0.mlp.down_proj": QSpec(bitwidth=8),
                "*mlp*": QSpec(bitwidth=3, granularity=Blockwise(32)),
                "*lm_head*": QSpec(granularity=PerTensor()),
            },
        )
        assert spec_of(llm, "0/mlp/down_proj") == QSpec(bitwidth=8)
        assert spec_of(llm, "1/mlp/down_proj").granularity == Blockwise(32)
        assert spec_of(llm, "lm_head").granularity == PerTensor()
        assert len(report.specs) == 15 and np.isfinite(run(llm, IDS)).all()
        assert re.search(r"/layers\.\*/\S*q_proj\S* +2  int4 LPBQ", str(report))

    def test_bad_selections(self):
        sim = cnn()
        refused(sim, r"layers='\*/mlp' must fit .* it fits none; names look like", layers="*/mlp")
        refused(sim, "must name .*not found: '/deep/Conf'", modules_to_exclude=["/deep/Conf"])
        refused(sim, "fits none", overrides={"*.experts.*": None})
        refused(sim, "got int", TypeError, layers=3)
        refused(sim, "condition must hold", layers=lambda module: False)


class TestIndivisibleWidths:
    def test_nothing_is_skipped_silently(self):
        """AIMET leaves such layers at 8 bits and says nothing."""
        sim, theirs = cnn(), cnn()
        quantsim.set_lpbq_for_params(theirs, 4, 16, op_types={"Conv", "Gemm", "MatMul"})
        kept = [str(quantizer(theirs, name)._scale_quantizer) for name in ("conv", "deep")]
        assert kept == ["None", "None"]
        refused(
            sim,
            r"/conv/Conv \(width 8, block size 16\), .*/deep/Conv \(width 1 in each of 16 groups.*"
            r"/turned\S* \(width 24",
            block_size=16,
        )
        refused(sim, "pad.*is for PyTorch simulations", block_size=16, on_indivisible="pad")
        report = set_lpbq(sim, 16, on_indivisible="per_channel")
        assert len(report.per_channel_instead) == 3
        assert spec_of(sim, "conv").granularity == PerChannel()
        assert spec_of(sim, "second").granularity == LPBQ(16)
        assert np.isfinite(run(sim)).all()


class TestWhatIsRefused:
    def test_frozen_and_rounded_layers(self):
        sim = cnn()
        quantizer(sim, "point").freeze_encodings()
        refused(sim, r"^/point/Conv: .*froze its range", modules_to_exclude=["/deep/Conv"])
        sim = cnn()
        ledger = Ledger("ef" * 32)
        ledger.log_run("gptq", ["/point/Conv"], rounds=True)
        adapt(sim).ledger = ledger
        refused(sim, r"^/point/Conv: .*gptq already rounded", layers="/point/Conv")

    def test_weights_that_are_not_finite(self):
        sim = cnn()
        graph = adapt(sim).graph
        weight = graph.array("point.weight").copy()
        weight[0] = np.nan
        graph.set_array("point.weight", weight)
        refused(sim, r"^/point/Conv: a finite weight is required", layers="/point/Conv")

    def test_embeddings(self, llm):
        """AIMET takes the table of a Gather for an activation."""
        table = node_of(llm, "embed_tokens")
        refused(llm, "named in layers and its weight is float", layers=table)
        text = f"^{re.escape(table)}: a weight for which the simulation has a quantizer"
        refused(llm, text, overrides={table: QSpec(granularity=PerTensor())})
        report = set_lpbq(llm, 16, layers=("Gather", "MatMul"))
        assert len(report.specs) == 15 and table not in report.specs

    def test_nodes_of_a_type_that_can_have_no_such_grid(self):
        model = network()
        stacked = np.zeros((2, 16, 4), np.float32)
        model.graph.initializer.append(numpy_helper.from_array(stacked, "stacked"))
        model.graph.node.append(
            helper.make_node("MatMul", ["logits", "stacked"], ["more"], "/stacked/MatMul")
        )
        model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, None))
        sim = cnn(model)
        refused(sim, r"/stacked/MatMul \(a weight of 2 dim.*nodes_to_exclude", op_types=["MatMul"])
        names = ["/stacked/MatMul"]
        report = set_lpbq(sim, 8, op_types=["MatMul"], nodes_to_exclude=names)
        assert len(report.specs) == 3

    def test_an_unknown_channel_is_named(self):
        sim = cnn()
        quantizer(sim, "point").tensor_quantizer_params.channel_axis = 1
        refused(sim, "^/point/Conv: output channels .* AIMET takes dimension 1", layers="point")
        quantizer(sim, "point").tensor_quantizer_params.channel_axis = None
        refused(sim, "^/point/Conv: AIMET knows no channels", layers="point")
        set_lpbq(sim, 8, layers=[], overrides={"point": QSpec(granularity=PerTensor())})
        assert spec_of(sim, "point") == QSpec(granularity=PerTensor())

    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_a_change_that_fails_leaves_nothing_behind(self, monkeypatch, call):
        sim = cnn()
        before, output = state_of(sim), run(sim)
        original, calls = onnx_grids.restore_quantizer, []

        def failing(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(onnx_grids, "restore_quantizer", failing)
        with pytest.raises(KeyboardInterrupt):
            set_lpbq(sim, 8, modules_to_exclude="deep")
        assert state_of(sim) == before and np.array_equal(run(sim), output)


def batches() -> Iterator[Any]:
    random = np.random.default_rng(5)
    for _ in range(3):
        yield {"x": random.standard_normal((16, 8, 6, 6)).astype(np.float32)}


class TestApply:
    def test_grids_and_the_search_of_their_scales(self):
        sim, plain = cnn(), cnn()
        data = list(batches())
        settings = {"modules_to_exclude": ["/deep/Conv"], "layers": "*"}
        set_lpbq(plain, 8, **settings)
        report = aimet_ext.apply_lpbq(sim, data, 8, progress=False, **settings)
        assert report.specs.keys() == {layer.name for layer in report.search.layers}
        assert len(report.specs) == 6
        for layer in report.search.layers:
            assert layer.loss_after <= layer.loss_nearest * (1 + 1e-6)
        assert sum(quantizer(sim, name).is_encoding_frozen() for name in LAYERS) == 6
        assert [entry.technique for entry in sim.aimet_ext_ledger.runs] == ["lpbq"]
        with adapt(sim).disabled_quantizers():
            exact = run(sim, data[0])
        errors = []
        for each in (sim, plain):
            for name in each.activation_names:
                each.qc_quantize_op_dict[name].enabled = False
            errors.append(float(np.square(run(each, data[0]) - exact).mean()))
        assert errors[0] < errors[1]

    def test_a_search_that_fails_gives_the_old_grids_back(self):
        sim = cnn()
        before, output = state_of(sim), run(sim)
        data = list(batches())
        data[2]["x"][0, 0, 0, 0] = np.nan
        with pytest.raises(ValueError, match=r"NaN|finite"):
            aimet_ext.apply_lpbq(sim, data, 8, layers="/point/Conv", progress=False)
        assert state_of(sim) == before and np.array_equal(run(sim), output)

    def test_without_data(self):
        sim = cnn()
        report = aimet_ext.apply_lpbq(sim, None, 8, op_types=["Gemm"])
        assert report.search is None and len(report.specs) == 2


def test_transposed_convolutions_get_a_range_for_each_channel():
    """Where blocks are asked for: dimension 1 of their weight holds output channels."""
    onnx_pairs = pytest.importorskip("onnx_pairs")
    sim = onnx_pairs.PAIRS["upsampling"]().sims(QSpec(bitwidth=8))[1]
    report = set_blockwise(sim, 4, bitwidth=4, layers="ConvTranspose")
    assert {*report.per_channel_instead} == {*report.specs}
    assert len(report.specs) == 3
    for name in report.specs:
        assert spec_of(sim, name) == QSpec(bitwidth=4, symmetric=report.specs[name].symmetric)
        weight = adapt(sim).weight_quantizer(name)
        assert weight.shape == (weight.weight.shape[0], 1, 1, 1)
