"""Each fault of an ONNX simulation is named with its remedy; and the limits hold on the HTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aimet_ext.core.objective import sqnr_db
from aimet_ext.grids.blockwise import set_lpbq
from aimet_ext.integrations import qnn as qnn_module
from aimet_ext.integrations.qnn_targets import LIMITS, find_target
from aimet_ext.linting.lint import lint

aimet_onnx = pytest.importorskip("aimet_onnx")
onnx = pytest.importorskip("onnx")
onnx_models = pytest.importorskip("onnx_models")

from onnx import TensorProto, helper  # noqa: E402

RANDOM = np.random.default_rng(0)
Feed = Mapping[str, np.ndarray[Any, Any]]
X = {"x": RANDOM.standard_normal((1, 4, 32)).astype(np.float32)}


def named(sim: Any, target: str = "htp_v79") -> dict[str, str]:
    """Name and check of each finding, one that says what to do."""
    findings = lint(sim, target)
    assert all(found.message and found.remedy for found in findings)
    assert len({(found.check, found.name) for found in findings}) == len(findings)
    return {found.name: found.check for found in findings}


def rand(*shape: int) -> np.ndarray[Any, Any]:
    return RANDOM.standard_normal(shape).astype(np.float32) / shape[0] ** 0.5


def onnx_sim(
    nodes: list[tuple[Any, ...]],
    weights: Mapping[str, Any],
    feed: Feed = X,
    *,
    shapes: Mapping[str, list[int]] | None = None,
    config: str = "htp_v79",
    change: Callable[[Any], None] | None = None,
) -> Any:
    """A calibrated simulation of nodes ``(type, inputs, output, attributes)``, of 8 and 16 bits.

    :param shapes: of the outputs; ``y [1, 4, 32]`` otherwise.
    :param change: called before calibration.
    """
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    model = onnx_models.finish(
        [
            helper.make_node(op, list(inputs), [output], f"/{output}/{op}", **attributes)
            for op, inputs, output, attributes in nodes
        ],
        {name: (types[array.dtype], list(array.shape)) for name, array in feed.items()},
        {name: (TensorProto.FLOAT, shape) for name, shape in (shapes or {"y": [1, 4, 32]}).items()},
        weights,
    )
    sim = aimet_onnx.QuantizationSimModel(
        model,
        config_file=config,
        param_type="int8",
        activation_type="int16",
        providers=["CPUExecutionProvider"],
        dummy_input=dict(feed),
    )
    if change is not None:
        change(sim)
    sim.compute_encodings([dict(feed)])
    return sim


LINEAR = [("MatMul", "xw", "m", {}), ("Add", "mb", "y", {})]
BIASED = {"w": rand(32, 32), "b": rand(32)}


def as_lpbq(sim: Any) -> None:
    set_lpbq(sim, 32)


def test_a_sound_onnx_simulation_has_no_findings() -> None:
    assert lint(onnx_sim(LINEAR, BIASED)) == []


def test_a_bias_that_lpbq_would_lose_is_found() -> None:
    """AIMET's own configuration takes MatMul and Add together."""
    (found,) = lint(onnx_sim(LINEAR, BIASED, change=as_lpbq))
    assert (found.check, found.name) == ("LPBQ bias", "/m/MatMul")
    assert "dropped" in found.message
    assert "MatmulAdd" in found.remedy


def test_a_bias_apart_from_its_lpbq_weight_is_right(tmp_path: Path) -> None:
    own = Path(aimet_onnx.__file__).parent / "common" / "quantsim_config"
    config = json.loads((own / "htp_quantsim_config_v79.json").read_text(encoding="utf-8"))
    config["supergroup_pass_list"].remove("MatmulAdd")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert lint(onnx_sim(LINEAR, BIASED, config=str(path), change=as_lpbq)) == []


def test_angles_that_a_grid_loses_are_found() -> None:
    """The frequencies of a rotary embedding times the positions of a long text."""
    weights = {"w": np.full((1,), 1e5, np.float32)}
    (found,) = lint(onnx_sim([("Mul", "xw", "a", {}), ("Cos", "a", "y", {})], weights))
    assert (found.check, found.name) == ("angles", "a")
    assert "radians" in found.message and "tables" in found.remedy


def test_a_gemm_with_an_lpbq_weight_is_found() -> None:
    x = {"x": rand(4, 32)}
    nodes = [("Gemm", ["x", "w", "b"], "y", {})]
    sim = onnx_sim(nodes, BIASED, x, shapes={"y": [4, 32]}, change=as_lpbq)
    assert named(sim) == {"/y/Gemm": "LPBQ bias"}


def conv_sim(bias: bool = False, bits: int = 16) -> Any:
    x = {"x": rand(1, 32, 6, 6)}
    nodes = [
        ("Conv", ["x", "w"], "a", {"pads": [1, 1, 1, 1]}),
        ("Conv", ["a", "v", *("b" * bias)], "y", {}),
    ]
    weights = {
        "w": rand(32, 32, 3, 3),
        "v": rand(32, 32, 1, 1),
        **({"b": rand(32)} if bias else {}),
    }

    def change(sim: Any) -> None:
        set_lpbq(sim, 16, layers=["/y/Conv"])
        for name in "xay":
            sim.qc_quantize_op_dict[name].set_bitwidth(bits)

    return onnx_sim(nodes, weights, x, shapes={"y": [1, 32, 6, 6]}, change=change)


def test_lpbq_of_a_convolution_is_for_kernels_of_one() -> None:
    sim = conv_sim()
    assert lint(sim) == []
    assert named(sim, "htp_v68") == {"/y/Conv": "LPBQ convolution"}
    assert named(conv_sim(bits=8)) == {"/y/Conv": "LPBQ convolution"}
    set_lpbq(sim, 16, layers=["/a/Conv"])
    assert named(sim) == {"/a/Conv": "LPBQ convolution"}


def test_a_convolution_with_lpbq_takes_an_int32_bias() -> None:
    sim = conv_sim(bias=True)
    (found,) = lint(sim)
    assert (found.check, found.name) == ("LPBQ bias", "/y/Conv")
    assert "export_int32_bias=True" in found.remedy
    sim._concretize_int32_bias_quantizers()
    assert lint(sim) == []


def test_old_chips_round_the_second_of_two_activations() -> None:
    sim = onnx_sim(
        [("Mul", "xx", "a", {}), ("MatMul", "as", "y", {})], {}, {**X, "s": rand(1, 32, 32)}
    )
    assert lint(sim) == []
    assert named(sim, "htp_v69") == {"s": "operand width"}


@pytest.mark.parametrize(("value", "found"), [(-100.0, False), (-65504.0, True)])
def test_a_mask_in_the_graph_is_found_by_its_range(value: float, found: bool) -> None:
    scores = rand(1, 2, 4, 4)
    nodes = [
        ("Add", ["s", "mask"], "masked", {}),
        ("Reshape", ["masked", "shape"], "r", {}),
        ("Softmax", ["r"], "y", {"axis": -1}),
    ]
    stored = {"shape": np.array([2, 4, 4])}
    feed = {"s": scores, "mask": np.triu(np.full((1, 1, 4, 4), value, np.float32), 1)}
    sim = onnx_sim(nodes, stored, feed, shapes={"y": [2, 4, 4]})
    assert named(sim) == (dict.fromkeys(("masked", "mask"), "mask") if found else {})


def with_bits(**bits: int) -> Callable[[Any], None]:
    """Return a change of a simulation that gives tensors other widths; negative ones are signed."""

    def change(sim: Any) -> None:
        for name, width in bits.items():
            quantizer = sim.qc_quantize_op_dict[name]
            quantizer.enabled = True
            quantizer.set_bitwidth(abs(width))
            quantizer.use_symmetric_encodings = width < 0

    return change


@pytest.mark.parametrize(("bits", "found"), [(8, True), (16, False)])
def test_masked_scores_of_wide_steps_are_found(bits: int, found: bool) -> None:
    nodes = [("Add", ["s", "mask"], "masked", {}), ("Softmax", ["masked"], "y", {"axis": -1})]
    feed = {"s": rand(1, 2, 4, 4), "mask": np.triu(np.full((1, 1, 4, 4), -100, np.float32), 1)}
    change = with_bits(masked=bits, mask=bits)
    sim = onnx_sim(nodes, {}, feed, shapes={"y": [1, 2, 4, 4]}, change=change)
    assert named(sim) == (dict.fromkeys(("masked", "mask"), "scores") if found else {})


@pytest.mark.parametrize("root", ["Mul", "Div"])
@pytest.mark.parametrize(
    ("activations", "gain", "found"),
    [(8, 8, False), (8, 16, True), (8, -8, True), (16, 16, False), (16, -8, True)],
)
def test_a_gain_that_no_htp_takes_is_found(
    root: str, activations: int, gain: int, found: bool
) -> None:
    """The gain of a norm that is spelt out; from 8 bits to 8 it has to be unsigned, of 8 bits."""
    nodes: list[tuple[Any, ...]] = [
        ("Mul", ["x", "x"], "squares", {}),
        ("ReduceMean", ["squares"], "mean", {"axes": [-1]}),
        ("Add", ["mean", "eps"], "above", {}),
        ("Sqrt", ["above"], "root", {}),
        ("Reciprocal", ["root"], "over", {}),
        ("Mul", ["x", "over"], "n", {}) if root == "Mul" else ("Div", ["x", "root"], "n", {}),
        ("Mul", ["gain", "n"], "y", {}),
    ]
    stored = {"eps": np.full(1, 1e-5, np.float32), "gain": rand(32)}
    change = with_bits(x=activations, y=activations, gain=gain)
    sim = onnx_sim(nodes, stored, change=change)
    checks = [(each.name, each.check) for each in lint(sim) if each.check == "norm"]
    assert checks == ([("gain", "norm")] if found else [])


def cache_sim(**changes: Any) -> Any:
    """Keys of earlier calls before those of this one; all of them come out again."""

    def change(sim: Any) -> None:
        sim.set_quantizers({n: q._copy() for n, q in sim.qc_quantize_op_dict.items()})

    nodes = [
        ("MatMul", "xw", "new", {}),
        ("Concat", ["past_key_0", "new"], "present_key_0", {"axis": 1}),
        ("Mul", ["present_key_0", "present_key_0"], "y", {}),
    ]
    feed = {**X, "past_key_0": 3 * rand(1, 4, 32)}
    shapes = {"y": [1, 8, 32], "present_key_0": [1, 8, 32]}
    return onnx_sim(nodes, {"w": rand(32, 32)}, feed, shapes=shapes, **changes)


def test_a_cache_that_changes_its_grid_from_call_to_call_is_found() -> None:
    def apart(sim: Any) -> None:
        own = {name: q._copy() for name, q in sim.qc_quantize_op_dict.items()}
        own["past_key_0"].set_bitwidth(8)
        sim.set_quantizers(own)

    assert lint(cache_sim()) == []
    (found,) = lint(cache_sim(change=apart))
    assert (found.check, found.name) == ("tied encodings", "past_key_0")
    assert "present_key_0" in found.message


def test_what_has_no_quantizer_is_found() -> None:
    def off(sim: Any) -> None:
        for name in ("x", "v"):
            sim.qc_quantize_op_dict[name].enabled = False

    nodes = [("MatMul", "xw", "m", {}), ("Relu", "m", "r", {}), ("MatMul", "rv", "y", {})]
    sim = onnx_sim(nodes, {"w": rand(32, 32), "v": rand(32, 32)}, change=off)
    assert named(sim) == {"/m/MatMul": "float activation", "/y/MatMul": "float layer"}


def test_a_lookup_table_is_quantized_as_a_whole() -> None:
    def by_rows(sim: Any) -> None:
        from aimet_onnx.qc_quantize_op import TensorQuantizerParams

        table = sim.qc_quantize_op_dict["t"]
        table.tensor_quantizer_params = TensorQuantizerParams([16, 32], 0, 1)
        table.enable_per_channel_quantization()

    nodes = [("Gather", ["t", "i"], "g", {}), ("Mul", "gg", "y", {})]
    stored = {"t": rand(16, 32)}
    feed = {"i": np.array([[1, 2, 3, 4]])}
    assert lint(onnx_sim(nodes, stored, feed)) == []
    assert named(onnx_sim(nodes, stored, feed, change=by_rows)) == {"/g/Gather": "lookup table"}


# ------------------------------------------------------------------------- the limits, on the HTP


def lpbq_sqnr(folder: Path, target: str, block: int, width: int) -> float:
    """What the HTP computes against the simulation, of a layer with LPBQ, in dB."""
    from aimet_ext.integrations.qnn import compile_htp

    x = {"x": rand(1, 16, width)}
    sim = onnx_sim(
        [("MatMul", "xw", "y", {})],
        {"w": rand(width, 64)},
        x,
        shapes={"y": [1, 16, 64]},
        change=lambda sim: set_lpbq(sim, block) and None,
    )
    path = folder / "layer.onnx"
    onnx.save(sim.to_onnx_qdq(prequantize_constants=True), str(path))
    (expected,) = sim.session.run(None, dict(x))
    with compile_htp(path, target) as session:
        (found,) = session.run(x)
    return sqnr_db(float(np.square(expected).sum()), float(np.square(expected - found).sum()))


@pytest.mark.skipif(not qnn_module.is_available(), reason="onnxruntime-qnn is not installed")
@pytest.mark.parametrize(
    ("target", "block", "width"),
    [
        *[("htp_v75", block, 96) for block in (8, 16, 32, 48, 96)],
        *[("htp_v79", 16, 48), ("htp_v79", 48, 48), ("htp_v79", 64, 192)],
        *[("htp_v68", 24, 96), ("htp_v68", 4, 32)],
    ],
)
def test_block_sizes_are_right_on_the_htp_where_lint_takes_them(
    target: str, block: int, width: int, tmp_path: Path
) -> None:
    taken = LIMITS[find_target(target).arch].takes_block(block, width)
    assert (lpbq_sqnr(tmp_path, target, block, width) > 40) == taken
