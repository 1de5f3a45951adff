"""Olive's AimetQuantization with our techniques: its documented examples, stacks, files, errors."""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import aimet_ext

for module in ("olive", "aimet_onnx", "onnx", "onnxruntime"):
    pytest.importorskip(module)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from olive.common.import_lib import import_module_from_file  # noqa: E402
from olive.package_config import OlivePackageConfig  # noqa: E402
from olive.passes.onnx import aimet_quantization as shipped  # noqa: E402
from olive.workflows import run as olive_run  # noqa: E402

from aimet_ext.integrations import olive as ours  # noqa: E402
from aimet_ext.integrations import olive_techniques  # noqa: E402
from aimet_ext.integrations.olive_config import package_config  # noqa: E402

# AIMET copies read-only arrays; Olive's engine asks for a package that prints tables.
pytestmark = pytest.mark.filterwarnings("default")

WIDTH = 64
HEAD = "/lm_head/MatMul"

# The examples of the section "AIMET" of Olive's page on quantization, as they are.
EXAMPLES: dict[str, dict[str, Any]] = {
    "plain": {"type": "AimetQuantization", "data_config": "calib_data_config"},
    "lpbq": {
        "type": "AimetQuantization",
        "data_config": "calib_data_config",
        "techniques": [{"name": "lpbq", "block_size": 64}],
    },
    "seqmse": {
        "type": "AimetQuantization",
        "data_config": "calib_data_config",
        "precision": "int4",
        "techniques": [{"name": "seqmse", "num_candidates": 20}],
    },
    "adaround": {
        "type": "AimetQuantization",
        "data_config": "calib_data_config",
        "techniques": [
            {
                "name": "adaround",
                "num_iterations": 10000,
                "nodes_to_exclude": ["/lm_head/MatMul"],
            }
        ],
    },
}

SCRIPT = """
import numpy as np
import torch
from olive.data.registry import Registry

def numbers(seed, count, width=64, rank=16):
    mixing = np.random.default_rng(0).standard_normal((rank, width)) / rank**0.5
    random = np.random.default_rng(seed)
    values = random.standard_normal((count, rank)) @ mixing
    return (values + 0.1 * random.standard_normal((count, width))).astype(np.float32)

class Numbers(torch.utils.data.Dataset):
    def __init__(self, count):
        self.values = torch.from_numpy(numbers(1, count))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"input": self.values[index]}, 0

@Registry.register_dataset()
def aimet_ext_test_numbers(count=64, **unused):
    return Numbers(count)
"""


def layers_model(bias: bool = False) -> onnx.ModelProto:
    """Three linear layers with ReLUs between them, the last one named as a language model's."""
    random = np.random.default_rng(0)
    nodes, weights, tensor = [], [], "input"
    for place, name in enumerate(("/fc0/MatMul", "/fc1/MatMul", HEAD)):
        weight = random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
        weights.append(onnx.numpy_helper.from_array(weight, f"weight{place}"))
        result = f"matmul{place}"
        nodes.append(onnx.helper.make_node("MatMul", [tensor, f"weight{place}"], [result], name))
        if bias:
            shift = random.standard_normal(WIDTH).astype(np.float32)
            weights.append(onnx.numpy_helper.from_array(shift, f"bias{place}"))
            nodes.append(
                onnx.helper.make_node(
                    "Add", [result, f"bias{place}"], [f"add{place}"], f"/a{place}"
                )
            )
            result = f"add{place}"
        tensor = result
        if place < 2:
            tensor = f"relu{place}"
            nodes.append(onnx.helper.make_node("Relu", [result], [tensor], f"/relu{place}"))
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "layers",
        [value("input", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        [value(tensor, onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        weights,
    )
    opset = [onnx.helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)


class Workflow:
    """A folder in which workflows run on one model."""

    def __init__(
        self, folder: pathlib.Path, script: pathlib.Path, model: onnx.ModelProto | None = None
    ) -> None:
        self.folder, self.script, self.model = folder, script, folder / "float.onnx"
        onnx.save(layers_model() if model is None else model, self.model)

    def config(self, *passes: dict[str, Any], **engine: Any) -> dict[str, Any]:
        return {
            "input_model": {"type": "ONNXModel", "model_path": str(self.model)},
            "data_configs": [
                {
                    "name": "calib_data_config",
                    "user_script": str(self.script),
                    "load_dataset_config": {"type": "aimet_ext_test_numbers", "count": 256},
                    "dataloader_config": {"batch_size": 16},
                }
            ],
            "passes": {f"pass{i}": copy.deepcopy(one) for i, one in enumerate(passes)},
            "output_dir": str(self.folder / "output"),
            "cache_dir": str(self.folder / "cache"),
            "clean_cache": True,
            "log_severity_level": 3,
            **engine,
        }

    def run(self, *passes: dict[str, Any], **engine: Any) -> pathlib.Path:
        """Run with this package's pass; returns the folder of the result."""
        olive_run(self.config(*passes, **engine), package_config=package_config())
        return self.folder / "output"

    def error(self, model: pathlib.Path) -> float:
        """Output error on inputs that calibration has not seen, relative to the output."""
        batch = import_module_from_file(str(self.script)).numbers(2, 256)
        expected, got = (run_model(path, {"input": batch}) for path in (self.model, model))
        return float(np.square(got - expected).mean() / np.square(expected).mean())


def run_model(path: pathlib.Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, batch)[0])


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("script") / "aimet_ext_test_numbers.py"
    path.write_text(SCRIPT, "utf-8")
    return path


@pytest.fixture
def workflow(tmp_path: pathlib.Path, script: pathlib.Path) -> Workflow:
    return Workflow(tmp_path, script)


@pytest.fixture
def biased(tmp_path: pathlib.Path, script: pathlib.Path) -> Workflow:
    return Workflow(tmp_path, script, layers_model(bias=True))


@contextlib.contextmanager
def olives_own() -> Iterator[None]:
    """Olive as it ships: its pass, its techniques."""
    techniques, passes = shipped.SUPPORTED_TECHNIQUES, OlivePackageConfig._pass_modules
    saved = dict(techniques), dict(passes)
    try:
        techniques.clear()
        techniques.update(
            (own.__name__.lower(), own) for own in shipped._AimetTechnique.__subclasses__()
        )
        del passes["aimetquantization"]
        yield
    finally:
        for kept, now in zip(saved, (techniques, passes), strict=True):
            now.clear()
            now.update(kept)


def shipped_run(workflow: Workflow, *passes: dict[str, Any]) -> pathlib.Path:
    """Run Olive's own pass; returns the folder of the result."""
    folder = workflow.folder / "shipped"
    engine = {"output_dir": str(folder), "cache_dir": str(workflow.folder / "shipped_cache")}
    with olives_own():
        olive_run(workflow.config(*passes, **engine))
    return folder


# -------------------------------------------------------------------------- documented examples


def test_the_examples_are_those_of_the_page(assets: pathlib.Path) -> None:
    page = assets.parent / "reference" / "olive_quantization.md.txt"
    if not page.is_file():
        pytest.skip(f"{page} is absent")
    blocks = re.findall(r"```json\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    found = [json.loads(block) for block in blocks if '"AimetQuantization"' in block]
    assert found == list(EXAMPLES.values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "adaround" else name
        for name in EXAMPLES
    ],
)
def test_an_example_deviates_no_more_than_with_olives_own_technique(
    name: str, workflow: Workflow
) -> None:
    own = workflow.error(shipped_run(workflow, EXAMPLES[name]) / "model.onnx")
    error = workflow.error(workflow.run(EXAMPLES[name]) / "model.onnx")
    if name == "plain":
        assert error == own
    else:
        assert error < own


# ------------------------------------------------------------------------------------ the files


def test_float_model_encodings_and_reports_lie_beside_the_model(workflow: Workflow) -> None:
    output = workflow.run({**EXAMPLES["seqmse"], "precision": "int4"})
    (report,) = json.loads((output / ours.REPORT).read_text("utf-8"))
    assert report["technique"] == "seqmse"
    assert report["settings"]["num_candidates"] == 20
    run = aimet_ext.RunReport.read(output)
    assert [technique.name for technique in run.techniques] == ["seqmse"]
    names = [unit.name for unit in run.techniques[0].units]
    assert names == [layer["name"] for layer in report["layers"]]
    assert {"make the simulation", "seqmse", "calibrate", "export"} == {p.name for p in run.phases}
    assert run.settings["precision"] == "int4"
    assert "<html" in (output / "report.html").read_text("utf-8")
    sim = aimet_ext.load(output)
    batch = {"input": np.random.default_rng(3).standard_normal((4, WIDTH)).astype(np.float32)}
    (simulated,) = sim.session.run(None, batch)
    # Values that lie between two integers may be rounded to either.
    difference = run_model(output / "model.onnx", batch) - simulated
    assert np.square(difference).mean() < 1e-3 * np.square(simulated).mean()


def test_encodings_are_left_out_if_asked(workflow: Workflow) -> None:
    output = workflow.run({**EXAMPLES["plain"], "save_encodings": False})
    assert (output / "model.onnx").is_file()
    assert not (output / "manifest.json").exists()


def test_the_files_survive_a_pass_that_follows(workflow: Workflow) -> None:
    output = workflow.run(EXAMPLES["seqmse"], {"type": "OnnxPeepholeOptimizer"})
    assert (output / "model.onnx").is_file()
    assert (output / ours.REPORT).is_file()
    assert aimet_ext.load(output) is not None


def test_a_model_is_split_as_for_npus(tmp_path: pathlib.Path, script: pathlib.Path) -> None:
    """What CaptureSplitInfo noted reaches SplitModel, whose parts go on with the files."""
    model = layers_model()
    model.metadata_props.add(key="split_assignments", value="fc0=0;fc1=1;lm_head=1")
    workflow = Workflow(tmp_path, script, model)
    output = workflow.run(EXAMPLES["seqmse"], {"type": "SplitModel"})
    parts = sorted(output.glob("split_*.onnx"))
    assert len(parts) == 2
    batch = np.random.default_rng(3).standard_normal((4, WIDTH)).astype(np.float32)
    found = batch
    for part in parts:
        (value,) = onnx.load(part, load_external_data=False).graph.input
        found = run_model(part, {value.name: found})
    (simulated,) = aimet_ext.load(output).session.run(None, {"input": batch})
    assert np.square(found - simulated).mean() < 1e-3 * np.square(simulated).mean()
    assert (output / ours.REPORT).is_file()


@pytest.mark.parametrize("technique", [[], [{"name": "seqmse"}]])
def test_weights_that_are_integers_already_are_refused(
    technique: Any, tmp_path: pathlib.Path, script: pathlib.Path
) -> None:
    """As ModelBuilder leaves them at int4: nothing is left to quantize."""
    node = onnx.helper.make_node(
        *("MatMulNBits", ["input", "w", "s"], ["y"], "fc"),
        domain="com.microsoft",
        K=WIDTH,
        N=WIDTH,
        bits=4,
        block_size=32,
    )
    value = onnx.helper.make_tensor_value_info
    stored = {
        "w": np.zeros((WIDTH, WIDTH // 32, 16), np.uint8),
        "s": np.ones(WIDTH * WIDTH // 32, np.float32),
    }
    graph = onnx.helper.make_graph(
        [node],
        "packed",
        [value("input", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opset = [onnx.helper.make_opsetid(*one) for one in (("", 21), ("com.microsoft", 1))]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    with pytest.raises(ValueError, match="integers in its MatMulNBits already"):
        Workflow(tmp_path, script, model).run({**EXAMPLES["plain"], "techniques": technique})


def biases(path: pathlib.Path) -> set[int]:
    """Data types of the biases in a model."""
    model = onnx.load(path)
    return {
        tensor.data_type
        for tensor in model.graph.initializer
        if tensor.name.startswith("bias") and not tensor.name.endswith(("scale", "zero_point"))
    }


@pytest.mark.parametrize(
    ("setting", "target", "dtype"),
    [
        ("auto", {}, onnx.TensorProto.FLOAT),
        ("int32", {}, onnx.TensorProto.INT32),
        (
            "auto",
            {"device": "npu", "execution_providers": ["QNNExecutionProvider"]},
            onnx.TensorProto.INT32,
        ),
    ],
)
def test_biases_are_what_the_target_needs(
    setting: str, target: dict[str, Any], dtype: int, biased: Workflow
) -> None:
    engine = {}
    if target:
        systems = {"there": {"type": "LocalSystem", "accelerators": [target]}}
        engine = {"systems": systems, "target": "there"}
    wanted = {**EXAMPLES["plain"], "bias": setting, "save_encodings": False}
    assert biases(biased.run(wanted, **engine) / "model.onnx") == {dtype}


def test_int32_biases_of_float_activations_are_refused(biased: Workflow) -> None:
    wanted = {**EXAMPLES["plain"], "bias": "int32", "activation_type": "fp16"}
    with pytest.raises(ours.PassFailed, match=r"bias0.* of 3 stay float.*\"bias\": \"float\""):
        biased.run({**wanted, "save_encodings": False})


# ---------------------------------------------------------------------- what Olive logs and goes on


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"techniques": [{"name": "magic"}]}, "'magic' is no technique of AimetQuantization.*gptq"),
        ({"techniques": [{"num_candidates": 3}]}, 'must be an object with a "name"'),
        (
            {"techniques": [{"name": "seqmse", "num_candidate": 3}]},
            "'seqmse' has no argument 'num_candidate'; it has data_config, num_candidates.*"
            "did you mean 'num_candidates'",
        ),
        (
            {"techniques": [{"name": "lpbq", "blocks": 64}]},
            "'lpbq' has no argument 'blocks'; it has .*block_size",
        ),
        (
            {"techniques": [{"name": "adaround", "num_iterations": 0}]},
            "'adaround': num_iterations: Input should be greater than or equal to 1, got 0",
        ),
        ({"technique": []}, "no parameter 'technique'; it has .*techniques"),
        ({"precision": "int32"}, "precision int4, int8 or int16.*got precision=int32"),
        ({"bias": "int16"}, "bias"),
    ],
)
def test_a_wrong_workflow_is_refused_before_anything_runs(
    changes: dict[str, Any], message: str, workflow: Workflow
) -> None:
    with pytest.raises(ValueError, match=message):
        workflow.run({**EXAMPLES["plain"], **changes})


def test_olives_own_pass_goes_on_where_ours_refuses(
    workflow: Workflow,
) -> None:
    """The reason for checking: an unknown technique ends well, without a model."""
    wrong = {**EXAMPLES["plain"], "techniques": [{"name": "magic"}]}
    assert not (shipped_run(workflow, wrong) / "model.onnx").exists()


def test_an_error_that_olive_swallows_is_raised(
    workflow: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(ours, "_simulation", fail)
    with pytest.raises(ours.PassFailed, match="RuntimeError: disk on fire"):
        workflow.run(EXAMPLES["plain"])


def test_a_model_with_adapters_is_refused(tmp_path: pathlib.Path, script: pathlib.Path) -> None:
    model = layers_model()
    for node in model.graph.node:
        node.name = node.name.replace("/fc1/", "/fc1/lora_A/default/")
    with pytest.raises(ours.PassFailed, match=r"holds LoRA adapters.*MergeAdapterWeights"):
        Workflow(tmp_path, script, model).run(EXAMPLES["plain"])


def test_no_data_is_an_error(workflow: Workflow) -> None:
    config = workflow.config(EXAMPLES["plain"])
    config["data_configs"][0]["load_dataset_config"]["count"] = 0
    with pytest.raises(ValueError, match="'calib_data_config' must give at least one batch"):
        olive_run(config, package_config=package_config())


# ---------------------------------------------------------------------------- the package config


def test_the_package_config_changes_one_pass_alone() -> None:
    merged = package_config()
    own = json.loads(pathlib.Path(OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    entry = own["passes"].pop("AimetQuantization")
    changed = merged["passes"].pop("AimetQuantization")
    assert merged == own
    assert changed.pop("module_path") == "aimet_ext.integrations.olive.AimetQuantization"
    added = changed.pop("supported_algorithms")[len(entry["supported_algorithms"]) :]
    assert {"gptq", "rtn", "hqq"} <= set(added)
    assert set(added) <= set(olive_techniques.SUPPORTED_TECHNIQUES)
    assert changed.items() <= entry.items()


def test_another_package_config_is_kept_and_not_changed() -> None:
    base = {"passes": {"aimetquantization": {"module_path": "a.b"}, "Mine": {"module_path": "c.d"}}}
    before = copy.deepcopy(base)
    merged = package_config(base)
    assert base == before
    assert merged["passes"]["Mine"] == {"module_path": "c.d"}
    assert merged["passes"]["aimetquantization"]["module_path"].startswith("aimet_ext.")


@pytest.mark.parametrize(
    ("base", "message"),
    [({}, "passes under"), ([], "passes under"), ({"passes": {"A": {}}}, "the passes A")],
)
def test_what_is_no_package_config_is_refused(base: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        package_config(base)


def test_importing_the_module_is_enough(workflow: Workflow) -> None:
    """As a user script does it, with Olive's own package config."""
    olive_run(workflow.config({**EXAMPLES["plain"], "save_encodings": False}))
    wrong = {**EXAMPLES["plain"], "techniques": [{"name": "magic"}]}
    with pytest.raises(ValueError, match="'magic' is no technique"):
        olive_run(workflow.config(wrong))


# ------------------------------------------------------------------------------- what is passed on


def lpbq_weights(output: pathlib.Path) -> list[str]:
    sim = aimet_ext.load(output)
    return [
        name
        for name, quantizer in sim.qc_quantize_op_dict.items()
        if quantizer.quant_info.blockSize > 0
    ]


@pytest.mark.parametrize("with_bias", [False, True])
def test_lpbq_takes_all_layers_but_those_excluded(
    with_bias: bool, workflow: Workflow, biased: Workflow
) -> None:
    """Also layers with a bias, which AIMET fuses and then leaves out where MatMul is asked for."""
    technique = {"name": "lpbq", "block_size": 32, "op_types": ["MatMul"]}
    wanted = {**EXAMPLES["lpbq"], "techniques": [{**technique, "nodes_to_exclude": [HEAD]}]}
    output = (biased if with_bias else workflow).run(wanted)
    assert lpbq_weights(output) == ["weight0", "weight1"]


def test_a_width_that_is_not_divided_is_an_error(workflow: Workflow) -> None:
    technique = {"name": "lpbq", "block_size": 48}
    with pytest.raises(ValueError, match=r"/fc0.*48.*64|/fc0.*64.*48"):
        workflow.run({**EXAMPLES["lpbq"], "techniques": [technique]})
    output = workflow.run(
        {**EXAMPLES["lpbq"], "techniques": [{**technique, "on_indivisible": "per_channel"}]}
    )
    assert lpbq_weights(output) == []


@pytest.mark.parametrize("name", ["lpbq", "seqmse", "adaround", "gptq"])
def test_a_node_to_exclude_that_is_not_there_is_an_error(name: str, workflow: Workflow) -> None:
    technique = {"name": name, "nodes_to_exclude": ["/no/MatMul"]}
    with pytest.raises(ValueError, match="/no/MatMul"):
        workflow.run({**EXAMPLES["plain"], "precision": "int4", "techniques": [technique]})


def test_a_technique_may_have_data_of_its_own(workflow: Workflow) -> None:
    technique = {"name": "seqmse", "data_config": "none"}
    wanted = {**EXAMPLES["plain"], "precision": "int4", "techniques": [technique]}
    config = workflow.config(wanted)
    other = copy.deepcopy(config["data_configs"][0])
    other["name"] = "none"
    other["load_dataset_config"]["count"] = 0
    config["data_configs"].append(other)
    with pytest.raises(ValueError, match="data config 'none' must give at least one batch"):
        olive_run(config, package_config=package_config())


def test_weights_may_go_to_a_file_of_their_own(workflow: Workflow) -> None:
    output = workflow.run(
        {**EXAMPLES["seqmse"], "save_as_external_data": True, "size_threshold": 0}
    )
    assert workflow.error(output / "model.onnx") < 0.1
    assert any(path.suffix == ".data" for path in output.iterdir())
    assert aimet_ext.load(output) is not None


def test_op_types_to_exclude_stay_float(biased: Workflow) -> None:
    wanted = {"op_types_to_exclude": ["MatMul", "Gemm"], "save_encodings": False}
    output = biased.run({**EXAMPLES["plain"], **wanted})
    model = onnx.load(output / "model.onnx")
    weights = {i.name: i.data_type for i in model.graph.initializer if i.name.startswith("weight")}
    assert set(weights.values()) == {onnx.TensorProto.FLOAT}


def test_a_search_refuses_a_wrong_technique_too() -> None:
    """Olive logs what fails while it searches, but not what is wrong before."""
    from olive.hardware import DEFAULT_CPU_ACCELERATOR

    wrong = {"data_config": {"name": "a"}, "techniques": [{"name": "magic"}]}
    with pytest.raises(ValueError, match="'magic' is no technique"):
        ours.AimetQuantization.get_config_params(DEFAULT_CPU_ACCELERATOR, wrong)
