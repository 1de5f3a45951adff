"""Walking an ONNX graph: every layer's input is that of the whole model."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnx_models
import onnx_walk_reference as reference
from onnx import TensorProto, helper, numpy_helper

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import find_layers
from aimet_ext.onnx.shells import shell
from aimet_ext.onnx.walk.walk import OnnxWalk


@pytest.mark.parametrize("kind", reference.MODELS)
@pytest.mark.parametrize("streams", ["quantized", "float", "both"])
def test_inputs_are_those_of_the_whole_model(kind, streams):
    """With the weights decided so far in one stream and the original ones in the other."""
    model, batches = reference.MODELS[kind]()
    original = onnx.ModelProto()
    original.CopyFrom(model)
    _, layers, _ = reference.opened(model)
    names = [name for name, layer in layers.items() if layer.kind != "embedding"]
    fixed = names.pop(1)
    decided = {fixed: reference.opened(model)[2][fixed].weight * 0.5}
    walk, graph, _, shells = reference.walk_of(
        model, batches, names, streams=streams, effective=decided
    )
    order = []
    for stage in walk.stages():
        order += stage.layers
        use = layers[stage.layers[0]].uses[0]
        expected = [
            tuple(
                reference.layer_inputs(original, [use.input], batch, weights)[use.input]
                for weights in (decided, {})
            )
            for batch in batches
        ]
        for _ in range(2):  # as often as one likes
            inputs = list(stage.batches())
            assert len(inputs) == len(batches)
            for found, wanted in zip(inputs, expected, strict=True):
                for value, other in zip(found[:2], wanted, strict=True):
                    if value is not None and value.shape == other.shape:  # padded ones: below
                        torch.testing.assert_close(value, other, rtol=1e-4, atol=2e-5)
                assert (found[0] is None) == (streams == "float")
                assert (found[1] is None) == (streams == "quantized")
        for layer in stage.layers:
            weight = shells[layer].weight
            decided[layer] = torch.round(weight * 8) / 8
            walk.hold(layer)
            stored = layers[layer]
            # A simulation may write what it decided, or anything else.
            graph.set_tensor(stored.weight, -3 * graph.tensor(stored.weight))
            walk.decide(layer, decided[layer])
    assert sorted(order) == sorted(names)
    walk.close()


def test_tied_weights_are_told_apart():
    """A head that is decided leaves the embedding that holds the same weight as it is."""
    model, batches = reference.llama(tie_word_embeddings=True)
    _, layers, _ = reference.opened(model)
    names = [name for name in layers if layers[name].kind != "embedding"]
    (head,) = (name for name in names if "lm_head" in name)
    heads = {head: torch.zeros(128, 64)}
    walk, *_ = reference.walk_of(model, batches, names[:-1], effective=heads)
    first = next(walk.stages())
    tensor = layers[first.layers[0]].uses[0].input
    expected = reference.layer_inputs(model, [tensor], batches[0], {})[tensor]
    torch.testing.assert_close(next(first.batches())[0], expected, rtol=1e-5, atol=1e-6)
    walk.close()


def test_an_embedding_may_have_another_weight_from_the_start():
    """In the quantized stream alone; it is asked for once."""
    model, batches = reference.llama()
    _, layers, shells = reference.opened(model)
    (table,) = (name for name, layer in layers.items() if layer.kind == "embedding")
    asked = []

    class Weights(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    fixed = Weights({table: shells[table].weight.round()})
    names = [name for name in layers if name != table]
    walk, *_ = reference.walk_of(model, batches, names, streams="both", effective=fixed)
    for number, stage in enumerate(walk.stages()):
        tensor = layers[stage.layers[0]].uses[0].input
        if number in (0, 2):
            found = next(stage.batches())
            for value, weights in zip(found[:2], (dict(fixed), {}), strict=True):
                expected = reference.layer_inputs(model, [tensor], batches[0], weights)[tensor]
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        for layer in stage.layers:
            walk.decide(layer, shells[layer].weight)
    walk.close()
    assert asked[0] == table and len(set(asked)) == 1


def shared_model():
    """``fc`` is applied twice, ``between`` once in the middle, ``last`` to the sum of both."""
    random = np.random.default_rng(3)
    weights = {
        name: (random.standard_normal((8, 8)) / 3).astype(np.float32) for name in ("w", "v", "u")
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "fc"),
        helper.make_node("Tanh", ["a"], ["b"], "tanh"),
        helper.make_node("MatMul", ["b", "v"], ["c"], "between"),
        helper.make_node("MatMul", ["c", "w"], ["d"], "fc_again"),
        helper.make_node("Add", ["d", "b"], ["e"], "add"),
        helper.make_node("MatMul", ["e", "u"], ["y"], "last"),
    ]
    info = (TensorProto.FLOAT, ["n", 8])
    return onnx_models.finish(nodes, {"x": info}, {"y": info}, weights)


@pytest.mark.parametrize("streams", ["quantized", "float", "both"])
def test_a_layer_used_twice_sees_both_inputs(streams):
    """At its first use; the second is computed with the weights as they are then."""
    model, batches = shared_model(), reference.rows()
    original = shared_model()
    walk, graph, layers, shells = reference.walk_of(model, batches, streams=streams)
    decided = {}
    for stage in walk.stages():
        uses = layers[stage.layers[0]].uses
        inputs = list(stage.batches())
        assert len(inputs) == len(batches) * len(uses)
        wanted = [
            [
                reference.layer_inputs(original, [use.input], batch, weights)[use.input]
                for weights in (decided, {})
            ]
            for batch in batches
            for use in uses
        ]
        for found, expected in zip(inputs, wanted, strict=True):
            for value, other in zip(found[:2], expected, strict=True):
                if value is not None:
                    torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
        for layer in stage.layers:
            walk.hold(layer)
            decided[layer] = shells[layer].weight.mul(4).round() / 4
            graph.set_tensor(layers[layer].weight, torch.zeros(8, 8))
            walk.decide(layer, decided[layer])
    assert walk.cost["later_uses"] == ["fc"]
    assert [*decided] == ["fc", "between", "last"]
    walk.close()


def test_external_data_is_read_part_by_part(tmp_path):
    """A model whose weights are in a file beside it, as models over 2 GB have to be."""
    widths = (8, 64, 64, 4)
    onnx.save(
        onnx_models.mlp_model(widths),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )
    light = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    graph = OnnxGraph(light, base_dir=str(tmp_path))
    layers = find_layers(graph)
    shells = {name: shell(graph, layer) for name, layer in layers.items()}
    walk = OnnxWalk(graph, layers, shells, reference.rows(), [*layers])
    whole, *_ = reference.walk_of(onnx_models.mlp_model(widths), reference.rows())
    for one, other in zip(walk.stages(), whole.stages(), strict=True):
        for mine, theirs in zip(one.batches(), other.batches(), strict=True):
            assert torch.equal(mine[0], theirs[0])
        for layer in one.layers:
            walk.decide(layer, shells[layer].weight)
            whole.decide(layer, shells[layer].weight)


def converted(model, numpy_type, elem_type):
    """A copy whose floats, inputs and outputs included, have another type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(numpy_type)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.elem_type = elem_type
    return copy


@pytest.mark.parametrize(
    ("numpy_type", "dtype"), [(np.float16, torch.float16), (np.float64, torch.float64)]
)
def test_other_precisions(numpy_type, dtype):
    """Values stay in the model's own type, decided weights go into it."""
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(numpy_type))
    model = converted(onnx_models.mlp_model((8, 32, 32, 4)), numpy_type, elem_type)
    batches = [{"x": batch["x"].to(dtype)} for batch in reference.rows()]
    walk, _, layers, shells = reference.walk_of(model, batches, streams="both")
    decided = {}
    for stage in walk.stages():
        (name,) = stage.layers
        tensor = layers[name].uses[0].input
        for found, batch in zip(stage.batches(), batches, strict=True):
            for value, weights in zip(found[:2], (decided, {}), strict=True):
                expected = reference.layer_inputs(model, [tensor], batch, weights)[tensor]
                assert value.dtype == dtype
                torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-2)
        decided[name] = shells[name].weight * 0.5
        walk.decide(name, decided[name].double())
    walk.close()


def test_weights_in_constant_nodes():
    """Some exporters store weights there."""
    model, batches = reference.linear_model()
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    del model.graph.initializer[:]
    for name, tensor in stored.items():
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], name, value=tensor))
    walk, _, _, _ = reference.walk_of(model, batches)
    decided = {}
    for stage in walk.stages():
        (name,) = stage.layers
        plain, _ = reference.linear_model()
        use = f"relu{int(name[-1]) - 1}_out" if name != "fc0" else "x"
        expected = reference.layer_inputs(plain, [use], batches[0], decided)[use]
        found = next(stage.batches())[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        decided[name] = torch.full(reference.opened(plain)[2][name].weight.shape, 0.25)
        walk.decide(name, decided[name])
    walk.close()


def test_aimet_quantizers_are_seen_through():
    """The inputs are those of the float model, whatever the quantizers would do."""
    pytest.importorskip("aimet_onnx", reason="AIMET is an extra")
    from aimet_onnx import QuantizationSimModel

    model, batches = reference.linear_model(bias="add")
    sim = QuantizationSimModel(reference.linear_model(bias="add")[0], param_type="int4")
    plain, _, _, shells = reference.walk_of(model, batches)
    simulated, *_ = reference.walk_of(sim.model.model, batches)
    for one, other in zip(plain.stages(), simulated.stages(), strict=True):
        assert one.layers == other.layers and [*one.activations] == [*other.activations]
        for mine, theirs in zip(one.batches(), other.batches(), strict=True):
            assert torch.equal(mine[0], theirs[0])
        for layer in one.layers:
            plain.decide(layer, shells[layer].weight)
            simulated.decide(layer, shells[layer].weight)
