"""Models of more than protobuf serializes, 2 GiB: played by small ones under a small limit."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import exported_llama, finish, float_nodes, run_onnx  # noqa: E402

import aimet_ext  # noqa: E402
from aimet_ext.onnx import values as onnx_types  # noqa: E402
from aimet_ext.onnx.rewrite.compilable import fold_constants, make_static  # noqa: E402
from aimet_ext.onnx.values import infer_shapes  # noqa: E402

LIMIT = 2**18
WIDE = 512  # a weight of four times the limit
X = np.random.default_rng(0).standard_normal((3, WIDE)).astype(np.float32)


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serializes a model refuses more than ``LIMIT`` bytes, as protobuf does 2 GiB."""

    def refuse(size: int) -> None:
        if size > LIMIT:
            raise ValueError(f"Message onnx.ModelProto exceeds maximum protobuf size: {size}")

    infer, start = onnx.shape_inference.infer_shapes, ort.InferenceSession.__init__

    def inferred(model: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(model.ByteSize())
        return infer(model, *args, **kwargs)

    def started(session: Any, path_or_bytes: Any, *args: Any, **kwargs: Any) -> None:
        refuse(len(path_or_bytes) if isinstance(path_or_bytes, bytes) else 0)
        start(session, path_or_bytes, *args, **kwargs)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", inferred)
    monkeypatch.setattr(ort.InferenceSession, "__init__", started)
    monkeypatch.setattr("aimet_ext.sim.onnx.files.EXTERNAL_LIMIT", LIMIT)


def wide_model(*, free: bool = True) -> Any:
    """A reshape to the input's own shape around two weights; one is turned, one in a node."""
    generator = np.random.default_rng(1)
    first, second = generator.standard_normal((2, WIDE, WIDE)).astype(np.float32) / 8
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(second)),
        helper.make_node("MatMul", ["x", "turned"], ["a"], name="a"),
        helper.make_node("MatMul", ["a", "v"], ["b"], name="b"),
        helper.make_node("Reshape", ["b", "shape"], ["y"], name="y"),
    ]
    shape: list[Any] = ["rows" if free else 3, WIDE]
    float_ = TensorProto.FLOAT
    return finish(nodes, {"x": (float_, shape)}, {"y": (float_, shape)}, {"w": first})


def test_the_limit_is_one(limited: None) -> None:
    with pytest.raises(ValueError, match="maximum protobuf size"):
        onnx.shape_inference.infer_shapes(wide_model())
    with pytest.raises(ValueError, match="maximum protobuf size"):
        run_onnx(wide_model(), {"x": X})


def test_shapes_are_those_of_the_whole_model() -> None:
    model = wide_model(free=False)
    expected = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = infer_shapes(model, data_prop=True).graph
    assert {v.name: v.type for v in found.value_info}.items() >= {
        v.name: v.type for v in expected.value_info if v.name != "v"
    }.items()
    assert [v.type for v in found.output] == [v.type for v in expected.output]
    assert model.ByteSize() > LIMIT and len(model.graph.node) == 6


def test_constants_are_folded_beside_the_protobuf(limited: None) -> None:
    model = wide_model()
    folded = fold_constants(model)
    values = {proto.name: numpy_helper.to_array(proto) for proto in folded.graph.initializer}
    weight = numpy_helper.to_array(model.graph.initializer[0])
    assert set(values) == {"turned"} and np.array_equal(values["turned"], weight.T)


def test_shapes_are_made_static(limited: None) -> None:
    static = make_static(wide_model(), {"x": X.shape})
    assert "Shape" not in {node.op_type for node in static.graph.node}
    (output,) = static.graph.output
    assert [dim.dim_value for dim in output.type.tensor_type.shape.dim] == [3, WIDE]
    assert float_nodes(static) == ["a", "b", "y"]


def test_writing_what_is_there_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protobuf keeps what a value took before: only a change may cost that."""
    proto = numpy_helper.from_array(X, "x")
    cleared: list[str] = []
    tensor = _Watched(proto, cleared)
    onnx_types.write_array(tensor, X.copy())  # type: ignore[arg-type]
    assert not cleared
    onnx_types.write_array(tensor, X + 1)  # type: ignore[arg-type]
    assert cleared and np.array_equal(numpy_helper.to_array(proto), X + 1)


class _Watched:
    """A tensor that notes which of its fields are cleared."""

    def __init__(self, proto: Any, cleared: list[str]) -> None:
        object.__setattr__(self, "proto", proto)
        object.__setattr__(self, "cleared", cleared)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.proto, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.proto, name, value)

    def ClearField(self, name: str) -> None:  # noqa: N802
        self.cleared.append(name)
        self.proto.ClearField(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:aimet_onnx")
def test_the_whole_way(limited: None, tmp_path: pathlib.Path) -> None:
    """From external data over every technique to the folder, what a device takes, and back."""
    aimet_onnx = pytest.importorskip("aimet_onnx")
    path = tmp_path / "model.onnx"
    exported = exported_llama(layers=2, hidden=128, mask=False)
    onnx.save(exported.model, path, save_as_external_data=True, size_threshold=1024)
    model = onnx.load(path)
    assert model.ByteSize() > LIMIT
    ids = {"input_ids": torch.randint(0, 60, (1, 8)).numpy()}
    sim = aimet_onnx.QuantizationSimModel(model, param_type="int4", activation_type="int16")
    aimet_ext.apply_lpbq(sim, [ids], 16, num_candidates=2, layers=["*mlp*"], progress=False)
    quick = {"search_sweeps": 1, "progress": False}
    roles = [f"mlp.{role}_proj" for role in ("gate", "up", "down")]
    mlps = [f"model.layers.{block}.{role}" for block in range(2) for role in roles]
    aimet_ext.apply_omniquant(sim, [ids], 1, modules_to_exclude=mlps, **quick)
    down = [node for name, node in exported.names.items() if "down_proj" in name]
    others = [node for node in exported.names.values() if node not in down]
    aimet_ext.apply_gptq(sim, [ids], modules_to_exclude=down, progress=False)
    quick = {"num_iterations": 2, "progress": False}
    aimet_ext.apply_adaround(sim, [ids], modules_to_exclude=others, **quick)
    sim.compute_encodings([ids])
    aimet_ext.export(sim, tmp_path / "out", "model", ids)
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > LIMIT
    (output,) = sim.session.run(None, ids)
    loaded = aimet_ext.load(tmp_path / "out")
    assert np.array_equal(loaded.session.run(None, ids)[0], output)
