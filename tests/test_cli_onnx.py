"""ONNX graphs on the command line: on text with a tokenizer, and on arrays of any inputs."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx_models import conv_model, exported_llama
from qdq_graphs import QdqGraph
from typer.testing import CliRunner, Result

import aimet_ext
from aimet_ext import Recipe, RunReport, cli, examples
from aimet_ext.files.manifest import write_manifest
from aimet_ext.recipes.recipe import Grid

CUT = ("--seq-length", "16", "--num-batches", "2", "--batch-size", "2")
WEIGHTS = ("--weights", "int4", "--activations", "none", "--technique", "gptq")


def run(*arguments: str | pathlib.Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder with a language model's graph, a text, and a tokenizer in a folder of its own."""
    folder = tmp_path_factory.mktemp("graphs")
    onnx.save(exported_llama(vocab_size=1024).model, folder / "llama.onnx")
    (folder / "tokenizer").mkdir()
    for file in examples.model_dir().glob("tokenizer*"):
        shutil.copy(file, folder / "tokenizer")
    (folder / "text.txt").write_text("\n".join(examples.documents("calibration")), "utf-8")
    return folder


def text_of(place: pathlib.Path, option: str) -> tuple[str | pathlib.Path, ...]:
    return (option, place / "text.txt", "--tokenizer", place / "tokenizer")


@pytest.fixture(scope="module")
def exported(place: pathlib.Path) -> pathlib.Path:
    output = place / "out"
    with_text = text_of(place, "--calibration")
    changes = ("--override", "*.down_proj=int8", "--exclude", "*.o_proj", "--json")
    done = run(
        "quantize", place / "llama.onnx", *with_text, "--output", output, *CUT, *WEIGHTS, *changes
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    layers = {layer["name"]: layer for layer in found["reports"]["gptq"]["layers"]}
    assert not any("o_proj" in name for name in layers)
    bits = {layer["bitwidth"] for name, layer in layers.items() if "down_proj" in name}
    assert bits == {8}
    assert found["quality"]["divergence"]["quantized"]["kl"] > 0
    return output


def test_what_was_exported_is_inspected_and_scored(
    exported: pathlib.Path, place: pathlib.Path
) -> None:
    found = json.loads(run("inspect", exported, "--json").stdout)
    assert found["framework"] == "onnx" and found["quality"]["quantized"] > 1
    options = ("--seq-length", "16", "--num-windows", "4", "--json")
    text = ("--text", place / "text.txt")  # the export has the tokenizer
    done = run("evaluate", exported, *text, *options, "--reference", place / "llama.onnx")
    assert done.exit_code == 0, done.stderr
    scored = json.loads(done.stdout)
    assert scored["quantized"] and scored["kl"] > 0
    plain = run("evaluate", place / "llama.onnx", *text_of(place, "--text"), *options)
    assert plain.exit_code == 0, plain.stderr
    assert not json.loads(plain.stdout)["quantized"]


def test_the_run_has_its_report(exported: pathlib.Path) -> None:
    """The codes are those of the weights that the export gives back."""
    found = RunReport.read(exported)
    assert found.model == "llama.onnx" and [each.name for each in found.techniques] == ["gptq"]
    assert found.quality is not None and found.quality.states["quantized"].kl > 0
    names = [phase.name for phase in found.phases]
    assert "gptq" in names and names[-1] == "export"
    graph = onnx.load(exported / "model.onnx").graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    encodings = json.loads((exported / "model.encodings").read_text("utf-8"))["param_encodings"]
    grids = {grid["name"]: grid for grid in encodings}
    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    uses = {products[use.name]: use for use in found.weights if use.name in products}
    assert len(uses) == 15
    for name, use in uses.items():
        scale, offset = (np.array(grids[name][key]) for key in ("scale", "offset"))  # [out]
        codes = np.rint(values[name] / scale).astype(int) - offset.astype(int)  # [in, out]
        counts = np.bincount(codes.ravel(), minlength=2 ** grids[name]["bw"])
        assert use.codes == tuple(counts.reshape(len(use.codes), -1).sum(1)), name
    assert {use.bitwidth for use in found.weights} >= {4, 8}
    assert "llama.onnx" in (exported / "report.html").read_text("utf-8")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_export_is_analyzed_by_its_folder_or_a_file_in_it(
    exported: pathlib.Path, place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    options = ("--text", place / "text.txt", "--seq-length", "16", "--num-windows", "2")
    done = run("analyze", exported / "model.onnx", *options, "--top-k", "0", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["quantizers"]
    done = run("analyze", place / "llama.onnx", *options)
    assert done.exit_code == 2 and "quantize the graph first" in " ".join(done.stderr.split())
    ids = np.ones((1, 16), np.int64)
    feed = {"input_ids": ids, "attention_mask": ids}
    aimet_ext.export(aimet_ext.load(exported), tmp_path / "named", "named", feed)
    done = run("analyze", tmp_path / "named", *options, "--tokenizer", exported, "--top-k", "0")
    assert done.exit_code == 0, done.stderr


def test_widths_of_a_graph_are_assigned(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    written = tmp_path / "widths.yaml"
    budget = ("--budget", "5", "--output", written, *CUT, "--json")
    with_text = text_of(place, "--calibration")
    done = run("assign-widths", place / "llama.onnx", *with_text, *budget)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["layers"]) == 14 and written.is_file()


def test_a_graph_is_inspected(place: pathlib.Path) -> None:
    found = json.loads(run("inspect", place / "llama.onnx", "--json").stdout)
    assert set(found["inputs"]) == {"input_ids", "attention_mask"} and not found["quantized"]
    assert sorted(set(found["layers"].values())) == ["embedding", "linear"]
    shown = run("inspect", place / "llama.onnx").stdout
    assert "input input_ids" in shown and "15 linear" in shown


def test_a_quantized_graph_and_a_compiled_one_are_told_apart(tmp_path: pathlib.Path) -> None:
    graph = QdqGraph(x=(1, 4, 64))
    codes = np.ones((64, 8), ml_dtypes.int4)
    stored = graph.constant("codes", codes), graph.constant("scale", np.ones((2, 8), np.float32))
    weight = graph.op("DequantizeLinear", *stored, name="w", block_size=32, axis=0)
    graph.op("MatMul", "x", weight, name="product")
    value = onnx.helper.make_tensor_value_info
    made = [value("product_out", onnx.TensorProto.FLOAT, (1, 4, 8))]
    parts = (graph.nodes, "g", graph.inputs, made, graph.initializers)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph(*parts), opset_imports=opsets),
        tmp_path / "q.onnx",
    )
    found = json.loads(run("inspect", tmp_path / "q.onnx", "--json").stdout)
    assert found["layers"] == {"product": "linear"} and found["skipped"] == {}
    assert found["integers"] == {"product": "int4 in blocks of 32"} and found["quantized"]

    context = {"ep_cache_context": "q.bin", "embed_mode": 0, "source": "QNNExecutionProvider"}
    node = onnx.helper.make_node(
        "EPContext", ["x"], ["product_out"], domain="com.microsoft", **context
    )
    compiled = onnx.helper.make_graph([node], "g", graph.inputs, made)
    onnx.save(onnx.helper.make_model(compiled, opset_imports=opsets), tmp_path / "q.htp_v79.onnx")
    write_manifest(
        tmp_path, "verified", target="htp_v79", backend="onnxruntime CPU", passed=True, export="out"
    )
    shown = run("inspect", tmp_path / "q.htp_v79.onnx").stdout
    assert "compiled model for htp_v79" in shown and "q.bin" in shown and "float" not in shown
    assert shown.splitlines()[-1].split() == ["opset", "com.microsoft", "1"]
    shown = run("inspect", tmp_path).stdout
    assert "built of the export out" in shown and "passed, on onnxruntime CPU" in shown
    assert "q.htp_v79.onnx: the compiled model" in shown and "rounding to nearest" not in shown


def test_a_graph_of_other_inputs_is_quantized_on_arrays(tmp_path: pathlib.Path) -> None:
    graph, data = tmp_path / "conv.onnx", np.random.default_rng(0)
    model = conv_model()
    onnx.save(model, graph)
    value = model.graph.input[0]
    shape = [dim.dim_value or 6 for dim in value.type.tensor_type.shape.dim]
    images = data.normal(size=shape).astype(np.float32)
    np.savez(tmp_path / "images.npz", **{value.name: images, "label": np.zeros(3)})
    np.save(tmp_path / "images.npy", images)
    common = ("quantize", graph, "--output", tmp_path / "out", "--technique", "rtn")
    for file in ("images.npz", "images.npy"):
        done = run(*common, "--calibration", tmp_path / file)
        assert done.exit_code == 0, done.stderr
        assert "Not scored" in done.stdout
    np.savez(tmp_path / "other.npz", other=images)
    done = run(*common, "--calibration", tmp_path / "other.npz")
    assert done.exit_code == 3 and "other.npz" in done.stderr and value.name in done.stderr
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    done = run(*common, "--calibration", tmp_path / "broken.npz")
    assert done.exit_code == 4 and "numpy.savez" in done.stderr


def test_arrays_and_texts_do_not_mix(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 4), np.int64))
    both = ("--calibration", tmp_path / "a.npy", *text_of(place, "--calibration"))
    done = run("quantize", place / "llama.onnx", *both, "--output", tmp_path / "out")
    assert done.exit_code == 3 and "got both" in done.stderr


def test_a_graph_without_a_tokenizer_says_what_to_give(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    text = ("--calibration", place / "text.txt", "--output", tmp_path / "out")
    done = run("quantize", place / "llama.onnx", *text)
    assert done.exit_code == 3 and "--tokenizer" in done.stderr


def test_an_override_that_is_a_layers_exact_name_counts() -> None:
    model = exported_llama().model
    plain = RunReport.of(Recipe(activations="none").create_sim(model, None), {}).weights
    names = [use.name for use in plain if use.bitwidth == 4]
    recipe = Recipe(activations="none", overrides={names[0]: Grid(width="int8")})
    changed = RunReport.of(recipe.create_sim(model, None), {}).weights
    bits = {use.name: use.bitwidth for use in changed}
    assert bits[names[0]] == 8 and {bits[name] for name in names[1:]} == {4}


def test_a_graph_of_a_fixed_batch_is_quantized_and_scored(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = onnx.load(place / "llama.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    graph = tmp_path / "three.onnx"
    onnx.save(model, graph)
    output = tmp_path / "out"
    fast = ("--weights", "int4", "--activations", "none", "--technique", "nearest", "--json")
    with_text = text_of(place, "--calibration")
    done = run("quantize", graph, *with_text, "--output", output, *CUT, *fast)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["quality"]["windows"] == 15
    options = ("--seq-length", "16", "--num-windows", "8", "--json")
    scores = [
        run("evaluate", graph, *text_of(place, "--text"), *options),
        run("evaluate", output, *text_of(place, "--text"), *options, "--reference", graph),
    ]
    for done in scores:
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["windows"] == 6
    short = tmp_path / "short.txt"
    short.write_text("word " * 20)
    with_tokenizer = ("--tokenizer", place / "tokenizer", "--seq-length", "16")
    done = run("evaluate", graph, "--text", short, *with_tokenizer)
    assert done.exit_code == 3 and "a batch of the graph" in " ".join(done.stderr.split())


def test_a_folder_that_verify_wrote_is_refused(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_manifest(tmp_path, "verified")
    for command in ("verify", "analyze"):
        done = run(command, tmp_path, "--text", place / "text.txt")
        assert done.exit_code == 4, done.stderr
        assert "give the folder that quantize wrote" in " ".join(done.stderr.split())


def test_a_damaged_graph_ends_with_4(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole = (place / "llama.onnx").read_bytes()
    for content in (b"no graph", whole[: len(whole) // 2]):
        (tmp_path / "broken.onnx").write_bytes(content)
        done = run("evaluate", tmp_path / "broken.onnx", *text_of(place, "--text"))
        assert done.exit_code == 4 and "broken.onnx" in done.stderr, done.stderr


def test_an_export_may_have_the_name_of_a_graph(
    exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = shutil.copytree(exported, tmp_path / "llama.onnx")
    done = run("inspect", copy, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["framework"] == "onnx"


def test_files_of_arrays_are_taken_in_equal_shares(tmp_path: pathlib.Path) -> None:
    graph = tmp_path / "conv.onnx"
    model = conv_model()
    onnx.save(model, graph)
    value = model.graph.input[0]
    size, *shape = [dim.dim_value or 6 for dim in value.type.tensor_type.shape.dim]
    data = np.random.default_rng(0)
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for file, batches in zip(files, (3, 1), strict=True):
        np.save(file, data.normal(size=(batches * size + 1, *shape)).astype(np.float32))
    both = [word for file in files for word in ("--calibration", file)]
    common = ("quantize", graph, "--output", tmp_path / "out", "--technique", "rtn")
    fit = ("--batch-size", str(size), "--num-batches")
    for batches, first in (("2", 1), ("3", 2)):
        done = run(*common, *both, *fit, batches)
        assert done.exit_code == 0, done.stderr
        assert f"{first} of {files[0]}, 1 of {files[1]}" in " ".join(done.stderr.split())
    done = run(*common, *both, *fit, "4")  # the others are not cut to what a short file has
    said = " ".join(done.stderr.split())
    assert done.exit_code == 3 and f"{files[1]}, whose share" in said
    assert f"2 batches of {size} samples are required, got enough for 1" in said
    assert size == 1 or "fill no batch" in said
    done = run(*common, *both, "--num-batches", "1")
    assert done.exit_code == 3 and "a batch of each file" in " ".join(done.stderr.split())


def test_arrays_of_a_file_hold_as_many_samples(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arrays = {"input_ids": np.ones((4, 8), np.int64), "attention_mask": np.ones((3, 8), np.int64)}
    np.savez(tmp_path / "uneven.npz", **arrays)
    given = ("--calibration", tmp_path / "uneven.npz", "--output", tmp_path / "out")
    done = run("quantize", place / "llama.onnx", *given)
    assert done.exit_code == 3
    assert "4 of 'input_ids' and 3 of 'attention_mask'" in " ".join(done.stderr.split())


def test_a_pipe_is_not_blamed_on_a_recipe(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    text = ("--calibration", tmp_path / "pipe.txt", "--output", tmp_path / "out")
    done = run("quantize", place / "llama.onnx", *text)
    said = " ".join(done.stderr.split())
    assert done.exit_code == 2 and "regular file" in said and "the recipe names" not in said
