"""QNN in a process of its own: the same answers, and its death is an error like any other."""

from __future__ import annotations

import os
import pathlib
import signal

import numpy as np
import pytest

from aimet_ext.integrations import qnn as qnn_module
from aimet_ext.integrations.qnn import HtpRejected, compile_htp
from aimet_ext.integrations.qnn_process import HtpCrashed, HtpProcess

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from qdq_graphs import inputs_of, two_layers, with_unsupported  # noqa: E402

pytestmark = pytest.mark.skipif(
    not qnn_module.is_available(), reason="onnxruntime-qnn with an HTP backend is not installed"
)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    onnx.save(two_layers(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_it_computes_what_a_session_here_does(path: pathlib.Path) -> None:
    """Compiled, and opened again from the context, bit by bit."""
    feed = inputs_of(two_layers())
    with compile_htp(path, "htp_v75") as session:
        expected = session.run(feed)
    context = path.with_name("context.onnx")
    with HtpProcess(path, "htp_v75", context=context) as process:
        found = process.run(feed)
        assert (process.nodes, process.outputs) == (session.nodes, session.outputs)
        assert process.fallbacks == ()
        assert process.context is not None
        assert process.context.is_file()
    with HtpProcess(context, "htp_v75", load=True) as opened:
        again = opened.run(feed)
    for one, two, three in zip(expected, found, again, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


def test_errors_are_those_of_a_session(path: pathlib.Path) -> None:
    with HtpProcess(path, "htp_v75") as process:
        with pytest.raises(ValueError, match=r"inputs .* were required, got"):
            process.run({"other": np.zeros(1, np.float32)})
        assert process.run(inputs_of(two_layers()))  # it goes on
    with pytest.raises(RuntimeError, match="has ended"):
        process.run(inputs_of(two_layers()))
    onnx.save(with_unsupported(), path)
    with pytest.raises(HtpRejected, match="does not take the model") as caught:
        HtpProcess(path, "htp_v75")
    assert caught.value.nodes
    with pytest.raises(FileNotFoundError, match="is not there"):
        HtpProcess(path.with_name("none.onnx"), "htp_v75")


def test_a_crash_is_an_error_that_says_how_it_ended(path: pathlib.Path) -> None:
    process = HtpProcess(path, "htp_v75")
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGSEGV)
    with pytest.raises(HtpCrashed, match=r"htp_v75 was to run it and crashed \(SIGSEGV\)"):
        process.run(inputs_of(two_layers()))
    process.close()
