"""Forms of a graph that HTP computes right, and the ones beside them that it does not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from qdq_graphs import inputs_of, product  # noqa: E402

from aimet_ext.core.objective import sqnr_db  # noqa: E402
from aimet_ext.integrations.qnn import (  # noqa: E402
    HtpRejected,
    compile_htp,
    is_available,
)
from aimet_ext.onnx.rewrite.htp import sign_second_operands  # noqa: E402

pytestmark = pytest.mark.skipif(
    not is_available(), reason="onnxruntime-qnn with an HTP backend is not installed"
)


def distance(model: Any, reference: Any, target: str) -> float:
    """dB of a graph on HTP against a graph as it is written, on the CPU."""
    feed = dict(inputs_of(reference))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    on_cpu = onnxruntime.InferenceSession(
        reference.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    expected = on_cpu.run(None, feed)[0].astype(np.float64)
    with compile_htp(model, target) as session:
        found = session.run(feed)[0]
    return sqnr_db((expected**2).sum(), ((found - expected) ** 2).sum())


@pytest.mark.parametrize("target", ["htp_v73", "htp_v79"])
def test_a_second_operand_of_16_bits_must_be_signed(target: str) -> None:
    """An unsigned one is taken too, and rounded to 8 bits without a word."""
    model = product()
    signed = copy.deepcopy(model)
    assert sign_second_operands(signed) == ["b_dq_out"]
    assert distance(model, model, target) < 50
    assert distance(signed, model, target) > 65


def test_older_processors_take_unsigned_ones_alone() -> None:
    model = product()
    assert distance(model, model, "htp_v69") > 35
    sign_second_operands(model)
    with pytest.raises(HtpRejected, match=r"mul \(MatMul\)"):
        compile_htp(model, "htp_v69")


def test_products_of_8_bits_stay_as_they_are() -> None:
    model = product(np.uint8)
    assert sign_second_operands(model) == []
    assert distance(model, model, "htp_v79") > 35
