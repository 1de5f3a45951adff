"""What a walk over an ONNX graph keeps between two stages, and what it refuses."""

import contextlib

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models
import onnx_walk_reference as reference
from onnx import TensorProto, helper

from aimet_ext.onnx.walk import schedule as onnx_plan
from aimet_ext.onnx.walk import walk as onnx_walk


def test_only_the_frontier_is_kept():
    """However deep the model: one layer's input for all batches, and one more for a batch."""
    peaks = {}
    for depth in (3, 12):
        model = onnx_models.mlp_model([16] * (depth + 1), relu=False)
        walk, _, _, shells = reference.walk_of(model, reference.rows(10, 8, 16))
        reference.through(walk, shells)
        peaks[depth] = walk.cost["peak_cached_bytes"]
        # The first stage reads an input of the graph: there is nothing to run.
        assert walk.cost["segments"] == depth - 1
    assert peaks == dict.fromkeys((3, 12), 10 * 8 * 16 * 4)


@pytest.mark.parametrize("kind", ["llama", "genai"])
def test_a_decoder_keeps_the_residual_stream_and_one_input(kind):
    """Neither masks nor rotary tables, keys or values; shapes are a few bytes."""
    model, batches = reference.MODELS[kind]()
    walk, _, _, shells = reference.walk_of(model, batches)
    reference.through(walk, shells)
    tokens, small = len(batches) * 2 * 8, 1024
    assert walk.cost["peak_cached_bytes"] <= tokens * (64 + 128) * 4 + small


def test_streams_are_one_until_a_weight_changes():
    """A second copy is kept from the first decided layer on."""
    model, batches = onnx_models.mlp_model([16] * 4), reference.rows(1, 8, 16)
    walk, _, _, shells = reference.walk_of(model, batches, ["fc1", "fc2"], streams="both")
    kept = []
    for stage in walk.stages():
        kept.append(walk.cost["peak_cached_bytes"])
        for layer in stage.layers:
            walk.decide(layer, shells[layer].weight)
    assert kept == [8 * 16 * 4, 2 * 8 * 16 * 4]


@pytest.mark.parametrize("streams", ["quantized", "float", "both"])
@pytest.mark.parametrize("kind", ["gemm", "llama", "tied llama", "genai"])
def test_a_session_holds_few_of_the_weights_passed_by(monkeypatch, kind, streams):
    """Cut where few tensors pass, and with the same outcome bit for bit."""
    model, batches = reference.MODELS[kind]()
    _, layers, shells = reference.opened(model)
    linear = [name for name, layer in layers.items() if layer.kind == "linear"]
    last, others = linear[-1], [shells[name].weight for name in linear[:-1]]
    effective = {n: w * 0.9 for n, w in zip(linear, others, strict=False)}
    most = max(weight.numel() for weight in [*others, shells[last].weight])
    elements, held = [], []

    class Watched(onnx_walk.Part):
        def __init__(self, *args, weights, **settings):
            super().__init__(*args, weights=weights, **settings)
            elements.append(sum(w.numel() for w in weights.values()))
            held.append(sum(layers[n].kind == "linear" for n in weights))

    def inputs():
        settings = {"streams": streams, "effective": effective}
        walk, *_ = reference.walk_of(model, batches, [last], **settings)
        with contextlib.closing(walk):
            stage = next(walk.stages())
            return list(stage.batches()), walk.cost["segments"]

    whole, once = inputs()
    monkeypatch.setattr(onnx_walk, "Part", Watched)
    monkeypatch.setattr(onnx_plan, "_AT_ONCE", most)
    cut, often = inputs()
    assert often > once
    for mine, theirs in zip(cut, whole, strict=True):
        for one, other in zip(mine[:2], theirs[:2], strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    total = sum(weight.numel() for weight in others)
    if streams != "float":
        assert 0 < max(elements) <= most < total
        assert sum(held) >= len(others)


def test_nothing_runs_after_the_last_stage():
    model, batches = reference.linear_model()
    walk, _, _, shells = reference.walk_of(model, batches)
    runs = []
    for stage in walk.stages():
        runs.append(walk.cost["segments"])
        for layer in stage.layers:
            walk.decide(layer, shells[layer].weight)
    assert walk.cost["segments"] == runs[-1] == 2


def test_cache_dir_holds_the_values_and_is_left_empty(tmp_path):
    """The same values as in memory, bit for bit."""
    model, batches = onnx_models.conv_model(), reference.images()
    on_disk, _, _, shells = reference.walk_of(model, batches, streams="both", cache_dir=tmp_path)
    in_memory, *_ = reference.walk_of(model, batches, streams="both")
    for number, (one, other) in enumerate(zip(on_disk.stages(), in_memory.stages(), strict=True)):
        assert number == 0 or any(tmp_path.rglob("*.safetensors"))
        for mine, theirs in zip(one.batches(), other.batches(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine[:2], theirs[:2], strict=True))
        for layer in one.layers:
            weight = shells[layer].weight * 0.9
            on_disk.decide(layer, weight)
            in_memory.decide(layer, weight)
    assert on_disk.cost == in_memory.cost
    on_disk.close()
    assert not list(tmp_path.iterdir())


def test_what_a_walk_refuses():
    model, batches = reference.linear_model()
    with pytest.raises(ValueError, match=r"names must name layers of the graph, got 'fc9'"):
        reference.walk_of(model, batches, ["fc9"])
    with pytest.raises(ValueError, match=r"'fc0' is there twice"):
        reference.walk_of(model, batches, ["fc0", "fc0"])
    with pytest.raises(ValueError, match=r"effective must name layers of the graph, got 'no'"):
        reference.walk_of(model, batches, ["fc0"], effective={"no": torch.ones(1)})
    with pytest.raises(ValueError, match=r"at least one, got none"):
        reference.walk_of(model, [])
    with pytest.raises(ValueError, match=r"batch 1 must hold the model's inputs x; x is missing"):
        reference.walk_of(model, [batches[0], {"z": batches[0]["x"]}])
    with pytest.raises(ValueError, match=r"batch 0: input 'x' must be float32, got float64"):
        reference.walk_of(model, [{"x": batches[0]["x"].double()}])
    with pytest.raises(ValueError, match=r"input 'x' must be of shape \[batch, 8\], got \[5, 7\]"):
        reference.walk_of(model, [{"x": batches[0]["x"][:, :7]}])
    decoder, prompts_ = reference.llama()
    (table,) = (n for n, found in reference.opened(decoder)[1].items() if found.kind == "embedding")
    with pytest.raises(TypeError, match=rf"layer '{table}': .*nn.Linear"):
        reference.walk_of(decoder, prompts_, [table])


def test_what_a_stage_refuses():
    model, batches = reference.linear_model()
    walk, _, _, shells = reference.walk_of(model, batches)
    stages = walk.stages()
    first = next(stages)
    with pytest.raises(ValueError, match=r"one of the 3 walked to, got 'fc9'"):
        walk.decide("fc9", torch.ones(1))
    with pytest.raises(
        ValueError, match=r"weight of 'fc0' must be of shape \[16, 8\], got \[8, 16\]"
    ):
        walk.decide("fc0", torch.ones(8, 16))
    reading = first.batches()
    next(reading)
    with pytest.raises(AssertionError, match="must be decided first"):
        next(stages)
    walk, _, _, shells = reference.walk_of(model, batches)
    stages = walk.stages()
    first = next(stages)
    reading = first.batches()
    next(reading)
    walk.decide("fc0", shells["fc0"].weight)
    next(stages)
    with pytest.raises(RuntimeError, match=r"the stage of fc0 is over"):
        next(reading)


def test_a_model_that_fails_says_on_which_batch():
    """Two inputs that only fit each other if their batches are equal."""
    nodes = [
        helper.make_node("Add", ["x", "z"], ["a"], "add"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "fc"),
    ]
    infos = {name: (TensorProto.FLOAT, [size, 8]) for name, size in (("x", "n"), ("z", "m"))}
    outputs = {"y": (TensorProto.FLOAT, ["n", 4])}
    model = onnx_models.finish(nodes, infos, outputs, {"w": np.ones((8, 4), np.float32)})
    good = {"x": torch.ones(2, 8), "z": torch.ones(2, 8)}
    walk, *_ = reference.walk_of(model, [good, {**good, "z": torch.ones(3, 8)}])
    with pytest.raises(RuntimeError, match=r"the model failed on batch 1 with"):
        next(walk.stages())
