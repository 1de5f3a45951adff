"""The page on Olive: its workflows run, and what it says of Olive's passes is in their classes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import textwrap
from typing import Any

import numpy as np
import pytest

for module in ("olive", "aimet_onnx", "onnx", "onnxruntime", "transformers"):
    pytest.importorskip(module)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from olive.hardware import DEFAULT_CPU_ACCELERATOR  # noqa: E402
from olive.model import ONNXModelHandler  # noqa: E402
from olive.package_config import OlivePackageConfig  # noqa: E402
from onnx_models import exported_llama, mlp_model  # noqa: E402
from onnx_sims import build_sim  # noqa: E402

from aimet_ext import QSpec  # noqa: E402
from aimet_ext.integrations import olive as ours  # noqa: E402
from aimet_ext.integrations.olive_techniques import (  # noqa: E402
    check_techniques,
    reports_of,
    steps_of,
)
from aimet_ext.registry import TECHNIQUES, Technique  # noqa: E402
from aimet_ext.sim.protocol import adapt  # noqa: E402
from aimet_ext.techniques.order import check_steps  # noqa: E402

# Olive's imports warn, and AIMET about read-only arrays.
pytestmark = pytest.mark.filterwarnings("default")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "olive.rst"
BLOCK = re.compile(r"^( *)\.\. code-block:: json\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
VOCABULARY = 128
#: Less work than the page's, on a model that has one block.
QUICK: dict[str, dict[str, Any]] = {
    "omniquant": {"num_iterations": 2, "search_sweeps": 1},
    "adaround": {"num_iterations": 5},
    "autoround": {"num_iterations": 2},
    "awq": {"num_grid": 4},
    "dwq": {"num_iterations": 2},
    "spinquant": {"num_iterations": 1},
}
SCRIPT = f"""
import torch
from olive.data.registry import Registry

class Ids(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(3, {VOCABULARY}, (16,), generator=torch.Generator().manual_seed(index))
        return {{"input_ids": ids, "attention_mask": torch.ones_like(ids)}}, 0

@Registry.register_dataset()
def aimet_ext_page_ids(**unused):
    return Ids()
"""


def passes() -> list[dict[str, Any]]:
    """All passes on the page, in order, equal ones once."""
    texts = [textwrap.dedent(text) for _, text in BLOCK.findall(PAGE.read_text("utf-8"))]
    found = [json.loads(text) for text in texts]
    every = [one for each in found for one in (each if isinstance(each, list) else [each])]
    return [one for place, one in enumerate(every) if one not in every[:place]]


OURS = [one for one in passes() if one["type"] == "AimetQuantization"]
THEIRS = [one for one in passes() if one["type"] != "AimetQuantization"]


def described(one: dict[str, Any]) -> str:
    names = [technique["name"] for technique in one.get("techniques", ())]
    return "-".join([one["type"], *names] if one in THEIRS else names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "aimet_ext_page_ids.py").write_text(SCRIPT, "utf-8")
    onnx.save(exported_llama(1, vocab_size=VOCABULARY).model, folder / "float.onnx")
    return folder


def logits(path: pathlib.Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 16))
    return np.asarray(
        session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    )


@pytest.mark.parametrize("workflow", OURS, ids=described)
def test_our_side_runs(
    workflow: dict[str, Any],
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result is near the float model, after all techniques in order."""
    applied, apply = [], ours._apply
    monkeypatch.setattr(ours, "_apply", lambda *args: applied.append(apply(*args)) or applied[-1])
    config = {key: value for key, value in workflow.items() if key != "type"}
    config["save_encodings"] = False  # which take longer than the rest
    asked = config.get("techniques", [])
    config["techniques"] = [{**each, **QUICK.get(each["name"], {})} for each in asked]
    config["data_config"] = {
        "name": config["data_config"],
        "user_script": str(folder / "aimet_ext_page_ids.py"),
        "load_dataset_config": {"type": "aimet_ext_page_ids"},
        "dataloader_config": {"batch_size": 4},
    }
    cls = ours.AimetQuantization
    checked = cls.generate_config(DEFAULT_CPU_ACCELERATOR, config, disable_search=True)
    made = cls(DEFAULT_CPU_ACCELERATOR, checked).run(
        ONNXModelHandler(folder / "float.onnx"), tmp_path / "out"
    )
    expected, got = logits(folder / "float.onnx"), logits(pathlib.Path(made.model_path))
    assert 0 < np.square(got - expected).mean() < 0.2 * np.square(expected).mean()
    reports = reports_of(applied[-1]) if applied else []
    first = ["assign_widths", "set_widths"] if "widths" in workflow else []
    names = [each["name"] for each in asked]
    assert [each["technique"] for each in reports] == first + names


@pytest.mark.parametrize("workflow", THEIRS, ids=described)
def test_their_side_is_what_olive_takes(workflow: dict[str, Any]) -> None:
    """Of names that its class has, which Olive alone would ignore, and values that it allows."""
    cls = OlivePackageConfig.load_default_config().import_pass_module(workflow["type"])
    config = {key: value for key, value in workflow.items() if key != "type"}
    known = cls.default_config(DEFAULT_CPU_ACCELERATOR)
    assert set(config) <= set(known)
    if "data_config" in config:
        config["data_config"] = {"name": config["data_config"], "type": "DummyDataContainer"}
    cls.generate_config(DEFAULT_CPU_ACCELERATOR, config, disable_search=True)


def test_passes_that_the_page_names_are_olives() -> None:
    named = set(re.findall(r"``([A-Z]\w+)``", PAGE.read_text("utf-8")))
    operators_and_prefixes = {"MatMul", "MatMulNBits", "Onnx", "Inc", "NV"}
    config = OlivePackageConfig.load_default_config()
    for name in named - operators_and_prefixes:
        assert config.get_pass_module_config(name) is not None


def test_every_technique_is_on_the_page() -> None:
    text = PAGE.read_text("utf-8")
    assert [row.olive for row in TECHNIQUES.values() if f"``{row.olive}``" not in text] == []
    used = {each["name"] for one in OURS for each in one.get("techniques", ())}
    assert used == {row.olive for row in TECHNIQUES.values()}


def test_techniques_in_another_order_are_refused() -> None:
    gptq, seqmse, rtn = ({"name": name} for name in ("gptq", "seqmse", "rtn"))
    check_techniques([{"name": "lpbq"}, seqmse, gptq])
    text = r"'seqmse' cannot follow 'gptq'; the order is lpbq, .*rtn.*then .*each at most once"
    with pytest.raises(ValueError, match=text):
        check_techniques([gptq, seqmse])
    with pytest.raises(ValueError, match="'rtn' cannot follow 'gptq'"):
        check_techniques([seqmse, gptq, rtn])
    check_techniques([{**gptq, "nodes_to_exclude": ["/lm_head/MatMul"]}, rtn])


OLIVE = [row for row in TECHNIQUES.values() if row.olive is not None]
BEHIND_FROZEN = ("quarot", "spinquant", "smoothquant", "awq", "omniquant")


@pytest.mark.parametrize("earlier", OLIVE, ids=lambda row: row.name)
@pytest.mark.parametrize("later", OLIVE, ids=lambda row: row.name)
def test_every_pair_of_techniques(earlier: Technique, later: Technique) -> None:
    """An order is accepted if ranks rise and the first leaves open what the second changes."""

    def refusal(**settings: Any) -> str:
        first = {"name": earlier.olive, **settings}
        try:
            check_techniques([first, {"name": later.olive}])
        except ValueError as error:
            return str(error)
        return ""

    pair = rf"'{later.olive}' cannot follow '{earlier.olive}'"
    if earlier.rank >= later.rank:
        assert re.search(f"{pair}; the order is", refusal())
        return
    frozen = earlier.olive in ("awq", "omniquant", "seqmse") and later.olive in BEHIND_FROZEN
    assert bool(re.search(f"{pair}, which freezes the ranges", refusal())) == frozen
    assert frozen or not refusal()
    if earlier.olive == "awq":
        assert not refusal(clip=False)
    if earlier.olive == "lpbq":
        behind = (*BEHIND_FROZEN, "seqmse")
        assert ('give the first "search": false' in refusal(search=True)) == (later.olive in behind)


def test_a_rotation_that_leaves_nodes_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'quarot' turns all layers at once.*/head"):
        check_techniques([{"name": "quarot", "nodes_to_exclude": ["/head"]}])


@pytest.mark.parametrize(
    ("techniques", "text"),
    [
        (["lpbq", "omniquant"], "'omniquant': .*[Bb]lock"),
        (["lpbq", "activation_ranges"], "'activation_ranges': .*quantizers of activations"),
    ],
)
def test_what_a_graph_lacks_is_said_first(techniques: list[str], text: str) -> None:
    """On a graph of two layers without blocks and activations."""
    sim = build_sim(mlp_model(), QSpec(bitwidth=8), None)
    with pytest.raises(ValueError, match=text):
        check_steps(adapt(sim), steps_of([{"name": name} for name in techniques]))


@pytest.mark.parametrize("earlier", ["awq", "omniquant"])
def test_ranges_behind_blocks_need_a_layer_of_their_own(earlier: str) -> None:
    exported = exported_llama(1)
    sim = build_sim(exported.model, QSpec(), None)
    head = next(node for name, node in exported.names.items() if name.endswith("lm_head"))
    steps = steps_of([{"name": earlier}, {"name": "seqmse"}])
    check_steps(adapt(sim), steps)
    steps[1] = dataclasses.replace(steps[1], exclude=(head,))
    text = f"'seqmse' finds nothing to decide: {earlier} freezes the ranges of .*q_proj"
    with pytest.raises(ValueError, match=text):
        check_steps(adapt(sim), steps)
    check_steps(adapt(sim), [*steps[:1], *steps_of([{"name": "gptq"}])])


def test_data_is_refused_where_none_is_read() -> None:
    with pytest.raises(ValueError, match="'rtn' has no argument 'data_config'; it has nodes_to_ex"):
        check_techniques([{"name": "rtn", "data_config": {}}])
