"""Compiling for HTP and running in its simulation, on graphs of a few nodes."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from aimet_ext.core.objective import sqnr_db
from aimet_ext.errors import MissingExtraError
from aimet_ext.integrations import qnn as qnn_module
from aimet_ext.integrations.qnn import HtpRejected, HtpSession, compile_htp, load_context
from aimet_ext.integrations.qnn_targets import find_target, target_names
from aimet_ext.onnx.rewrite.compilable import output_names, with_outputs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from qdq_graphs import QdqGraph, inputs_of, two_layers, with_unsupported  # noqa: E402

needs_qnn = pytest.mark.skipif(
    not qnn_module.is_available(), reason="onnxruntime-qnn with an HTP backend is not installed"
)

Arrays = Mapping[str, np.ndarray[Any, Any]]


def on_cpu(model: Any, feed: Arrays) -> list[np.ndarray[Any, Any]]:
    """The graph as it is written, node by node."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(feed))


def sqnr(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    assert found.shape == expected.shape
    wide = expected.astype(np.float64)
    return sqnr_db((wide**2).sum(), ((found - wide) ** 2).sum())


@pytest.fixture(scope="module")
def compiled() -> HtpSession:
    return compile_htp(two_layers(), "htp_v75")


# ------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("name", "arch", "soc"),
    [("htp_v68", 68, "SM8350"), ("HTP_V79", 79, "SM8750"), ("sc8380xp", 73, "SC8380XP")],
)
def test_a_target_is_an_architecture_or_a_chip(name: str, arch: int, soc: str) -> None:
    target = find_target(name)
    assert (target.arch, target.soc, target.config) == (arch, soc, f"htp_v{arch}")
    assert find_target(target) is target


def test_an_unknown_target_lists_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"htp_v68, .*htp_v81, .*sm8850 was .* got 'htp_v85'"):
        find_target("htp_v85")


@needs_qnn
@pytest.mark.parametrize("name", target_names())
def test_what_is_compiled_is_for_the_chip_that_was_asked_for(
    name: str, tmp_path: pathlib.Path
) -> None:
    """QNN takes a chip it does not know for another one; the compiled file says which."""
    graph = QdqGraph(x=(1, 8))
    model = graph.model(
        y=graph.quantized(
            graph.op("Relu", graph.quantized("x", 4.0, np.uint8), name="relu"), 4.0, np.uint8
        )
    )
    session = compile_htp(model, name, context=tmp_path / "m.onnx")
    target = find_target(name)
    assert session.context is not None
    content = session.context.read_bytes()
    assert f"soc_type={target.soc};".encode() in content
    assert f"min_arch={target.arch};".encode() in content


# ------------------------------------------------------------------------------- compile and run


@needs_qnn
def test_htp_takes_every_node_and_gives_the_numbers_of_the_graph(compiled: HtpSession) -> None:
    model = two_layers()
    feed = inputs_of(model)
    assert compiled.fallbacks == ()
    assert compiled.nodes == len(model.graph.node)
    assert (compiled.inputs, compiled.outputs) == (("x",), ("y",))
    assert sqnr(compiled.run(feed)[0], on_cpu(model, feed)[0]) > 60


@needs_qnn
def test_a_file_gives_what_the_model_in_memory_gives(
    compiled: HtpSession, tmp_path: pathlib.Path
) -> None:
    """Also with its values in a file of their own, and with more outputs."""
    model = two_layers()
    feed = inputs_of(model)
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    for extra in ((), ("up_out",)):
        with compile_htp(tmp_path / "m.onnx", "htp_v75", extra_outputs=extra) as session:
            np.testing.assert_array_equal(session.run(feed)[0], compiled.run(feed)[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.data", "m.onnx"]


@needs_qnn
def test_nodes_that_htp_does_not_have_are_named() -> None:
    message = r"htp_v75 \(SM8650\) .*left to .*foreign \(Shrink\)$"
    with pytest.raises(HtpRejected, match=message) as raised:
        compile_htp(with_unsupported(), "htp_v75")
    assert raised.value.nodes == (("foreign", "Shrink"),)
    graph = QdqGraph(x=(1, 8))
    hidden = graph.op("Celu", graph.op("Shrink", "x", name="one"), name="two")
    with pytest.raises(HtpRejected, match=r"one \(Shrink\), two \(Celu\)"):
        compile_htp(graph.model(y=graph.op("Relu", hidden, name="last")), "htp_v75")


@needs_qnn
def test_the_cpu_may_help_where_that_is_asked_for() -> None:
    model = with_unsupported()
    feed = inputs_of(model)
    with compile_htp(model, "htp_v75", allow_fallback=True) as session:
        assert session.fallbacks == ("foreign",)
        assert session.fallback_types == {"foreign": "Shrink"}
        np.testing.assert_allclose(session.run(feed)[0], on_cpu(model, feed)[0], rtol=1e-2)


@needs_qnn
def test_what_is_no_model_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(HtpRejected, match="does not take the model"):
        compile_htp(tmp_path / "m.onnx", "htp_v75")
    with pytest.raises(FileNotFoundError, match=r"absent\.onnx"):
        compile_htp(tmp_path / "absent.onnx", "htp_v75")


@needs_qnn
def test_inputs_are_checked_by_name_and_shape(compiled: HtpSession) -> None:
    with pytest.raises(ValueError, match=r"\['x'\] were required, got \['ids'\]"):
        compiled.run({"ids": np.zeros((1, 8, 32), np.float32)})
    with pytest.raises(ValueError, match=r"'x': shape \[1, 8, 32\] .*got \[1, 9, 32\]"):
        compiled.run({"x": np.zeros((1, 9, 32), np.float32)})


@needs_qnn
def test_a_closed_session_says_so() -> None:
    with compile_htp(with_unsupported("Relu"), "htp_v75") as session:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        session.run(inputs_of(with_unsupported("Relu")))


@needs_qnn
def test_nothing_is_written_to_the_terminal() -> None:
    """Neither by Python nor by native code, also where the model is refused."""
    code = (
        "from aimet_ext.integrations.qnn import HtpRejected, compile_htp\n"
        "from qdq_graphs import inputs_of, two_layers, with_unsupported\n"
        "with compile_htp(two_layers(), 'htp_v75') as session:\n"
        "    session.run(inputs_of(two_layers()))\n"
        "try:\n"
        "    compile_htp(with_unsupported(), 'htp_v75')\n"
        "except HtpRejected:\n"
        "    print('refused')\n"
    )
    done = in_new_process(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\n", "")


# ------------------------------------------------------------------------------------- contexts


@needs_qnn
def test_a_context_gives_the_same_numbers_in_another_process(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "made" / "here" / "m.onnx"
    model = two_layers()
    with compile_htp(model, "htp_v79", context=path) as session:
        expected = session.run(inputs_of(model))[0]
        assert session.context == path.with_name("m_qnn.bin")
    assert sorted(file.name for file in path.parent.iterdir()) == ["m.onnx", "m_qnn.bin"]
    np.save(tmp_path / "expected.npy", expected)
    done = in_new_process(
        "import numpy as np\n"
        "from aimet_ext.integrations.qnn import load_context\n"
        "from qdq_graphs import inputs_of, two_layers\n"
        f"with load_context({str(path)!r}, 'htp_v79') as session:\n"
        "    found = session.run(inputs_of(two_layers()))[0]\n"
        f"assert (found == np.load({str(tmp_path / 'expected.npy')!r})).all()\n"
    )
    assert done.returncode == 0, done.stderr


@needs_qnn
def test_a_context_is_replaced_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.onnx"
    compile_htp(two_layers(0), "htp_v75", context=path).close()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(HtpRejected):
        compile_htp(with_unsupported(), "htp_v75", context=path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    compile_htp(two_layers(1), "htp_v75", context=path).close()
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(after) == set(before)
    assert after["m_qnn.bin"] != before["m_qnn.bin"]


@needs_qnn
def test_a_context_for_another_chip_is_refused(tmp_path: pathlib.Path) -> None:
    compile_htp(two_layers(), "sc8380xp", context=tmp_path / "m.onnx").close()
    with pytest.raises(ValueError, match=r"SM8650 \(v75\) was required, .* SC8380XP \(v73\)"):
        load_context(tmp_path / "m.onnx", "htp_v75")
    (tmp_path / "m_qnn.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"m_qnn\.bin"):
        load_context(tmp_path / "m.onnx", "sc8380xp")


@needs_qnn
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": "m.bin"}, r"\*\.onnx was required, got m\.bin"),
        ({"context": "m.onnx", "allow_fallback": True}, "cannot be given together"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_htp(two_layers(), "htp_v75", **settings)


# ------------------------------------------------------------------------------- more outputs


@needs_qnn
def test_tensors_inside_come_out_and_the_outputs_stay_what_they_are(compiled: HtpSession) -> None:
    """By the operator's name of the tensor as by the dequantized one's, in the order given."""
    model = two_layers()
    feed = inputs_of(model)
    tensors = ["relu_out", "up_out_dq_out"]
    with compile_htp(model, "htp_v75", extra_outputs=tensors) as session:
        assert session.fallbacks == ()
        assert session.outputs == ("y", *output_names(tensors))
        found = session.run(feed)
    np.testing.assert_array_equal(found[0], compiled.run(feed)[0])
    expected = on_cpu(with_outputs(model, tensors), feed)
    for ours, theirs in zip(found, expected, strict=True):
        assert sqnr(ours, theirs) > 60


def test_outputs_are_added_to_a_copy() -> None:
    model = two_layers()
    before = model.SerializeToString()
    more = with_outputs(model, ["x", "up_out", "A_dq_out"])
    assert model.SerializeToString() == before
    onnx.checker.check_model(more, full_check=True)
    y, x, _, weight = on_cpu(more, inputs_of(model))
    np.testing.assert_array_equal(y, on_cpu(model, inputs_of(model))[0])
    assert np.abs(x - inputs_of(model)["x"]).max() <= 4.0 / 65535 * (1 + 1e-3)
    assert weight.shape == (32, 48)


def test_a_tensor_that_nothing_quantizes_comes_out_as_it_is() -> None:
    model = with_unsupported()
    more = with_outputs(model, ["before_out"])
    feed = inputs_of(model)
    np.testing.assert_array_equal(on_cpu(more, feed)[1], np.maximum(feed["x"], 0))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [(["up_out", "gone"], r"it has no \['gone'\]"), (["up_out", "up_out"], "given twice")],
)
def test_tensors_that_cannot_come_out_are_refused(tensors: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_outputs(two_layers(), tensors)


# ------------------------------------------------------------------------------- where it is not


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(MissingExtraError, match=r'pip install "aimet-ext\[qnn\]"'):
        compile_htp("m.onnx", "htp_v75")
    assert not qnn_module.is_available()


def test_an_older_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qnn_module, "_OLDEST_PYTHON", (99, 1))
    with pytest.raises(RuntimeError, match=r"requires Python 99\.1 or newer, this is 3\."):
        compile_htp("m.onnx", "htp_v75")
    assert not qnn_module.is_available()


@needs_qnn
def test_a_system_without_the_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qnn_module.sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="none for darwin"):
        qnn_module.htp_library()
    assert not qnn_module.is_available()


@needs_qnn
def test_a_provider_that_is_registered_already_is_taken() -> None:
    """The user may have done it; onnxruntime refuses a second registration."""
    done = in_new_process(
        "import onnxruntime, onnxruntime_qnn\n"
        "from aimet_ext.integrations.qnn import compile_htp\n"
        "from qdq_graphs import with_unsupported\n"
        "onnxruntime.register_execution_provider_library('QNNExecutionProvider',\n"
        "    onnxruntime_qnn.get_library_path())\n"
        "compile_htp(with_unsupported('Relu'), 'htp_v75')\n"
    )
    assert done.returncode == 0, done.stderr


def in_new_process(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that sees the package and the helpers of these tests."""
    package = importlib.util.find_spec("aimet_ext")
    assert package is not None and package.origin is not None
    paths = [pathlib.Path(package.origin).parents[1], pathlib.Path(__file__).parents[1]]
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
