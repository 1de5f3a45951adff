"""Widths of single layers in Olive's AimetQuantization pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

for module in ("olive", "aimet_onnx", "onnx"):
    pytest.importorskip(module)

from onnx_models import exported_llama  # noqa: E402
from onnx_sims import build_sim  # noqa: E402

from aimet_ext import QSpec  # noqa: E402
from aimet_ext.integrations.olive_techniques import reports_of  # noqa: E402
from aimet_ext.integrations.olive_widths import apply_widths, check_widths  # noqa: E402
from aimet_ext.sim.protocol import adapt  # noqa: E402


@pytest.mark.parametrize(
    ("widths", "techniques", "message"),
    [
        ({}, [], "got nothing"),
        ({"choices": ["int4"]}, [], "\"budget\", with choices.*got 'choices'"),
        ({"budget": 4, "bits": 3}, [], "got 'budget', 'bits'"),
        ({"budget": 4, "overrides": {}}, [], "\"overrides\" alone.*got 'budget', 'overrides'"),
        ({"overrides": "int4"}, [], "must map names of layers.*got 'int4'"),
        ("missing.json", [], r"missing\.json is not there"),
        ({"budget": 4}, [{"name": "LPBQ"}], "beside the technique 'lpbq'"),
    ],
)
def test_mistakes_are_said_before_anything_runs(widths: Any, techniques: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_widths(widths, techniques)


def test_overrides_and_files_are_set(tmp_path: Path) -> None:
    check_widths(None)
    widths = {"overrides": {"*.down_proj": "int8", "*.mlp.*": "int4:32"}}
    check_widths(widths, [{"name": "gptq"}])
    sim = build_sim(exported_llama(1).model, QSpec(bitwidth=4), None)
    apply_widths(sim, widths, [])
    found = {n: q.spec() for n, q in adapt(sim).weight_quantizers().items()}
    bits = {name.split("/")[-2]: (s.bitwidth, s.block_size) for name, s in found.items()}
    assert (bits["down_proj"], bits["up_proj"], bits["q_proj"]) == ((8, None), (4, 32), (4, None))
    assert [report["technique"] for report in reports_of(sim)] == ["set_widths"]
