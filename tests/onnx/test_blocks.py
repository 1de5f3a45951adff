"""Decoder blocks of ONNX graphs: found by structure, and the same function in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
onnx_models = pytest.importorskip("onnx_models")

from onnx import numpy_helper  # noqa: E402

from aimet_ext.errors import TransformRefused  # noqa: E402
from aimet_ext.models.description import TopologyDescription  # noqa: E402
from aimet_ext.models.proof import (  # noqa: E402
    probe,
    probe_inputs,
    prove_pairs,
)
from aimet_ext.onnx.blocks.find import (  # noqa: E402
    argument_names,
    capture_blocks,
    find_onnx_blocks,
)
from aimet_ext.onnx.blocks.flow import to_copy  # noqa: E402
from aimet_ext.onnx.blocks.module import OnnxBlock, check_block, read_again, write_back  # noqa: E402
from aimet_ext.onnx.graph import OnnxGraph  # noqa: E402
from aimet_ext.walk.streamed import StreamedBlock  # noqa: E402

LLAMA = {
    "self_attn.q_proj": "attn/q_proj",
    "self_attn.k_proj": "attn/k_proj",
    "self_attn.v_proj": "attn/v_proj",
    "self_attn.o_proj": "attn/o_proj",
    "mlp.gate_proj": "mlp/gate_proj",
    "mlp.up_proj": "mlp/up_proj",
    "mlp.down_proj": "mlp/down_proj",
}
FUSED = {
    "self_attn.qkv_proj": "attn/qkv_proj",
    "self_attn.o_proj": "attn/o_proj",
    "mlp.gate_up_proj": "mlp/gate_up_proj",
    "mlp.down_proj": "mlp/down_proj",
}
GRAPHS = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "genai", "genai-qwen2")


def make(name: str) -> Any:
    if name.startswith("genai"):
        return onnx_models.genai_llama(family=name.partition("-")[2] or "llama")[0]
    changes = {"pad_token_id": 2} if name == "phi3" else {}
    return onnx_models.exported_llama(family=name, **changes).model


def feeds(model: Any, batch: int, seq: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs, the first sequence padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, seq - 3 :] = 0
    found = onnx_models.genai_inputs(model, ids, mask)
    return {key: torch.from_numpy(value) for key, value in found.items()}


def stored(_: str) -> Tensor | None:
    return None


def captured(model: Any, *batches: dict[str, Tensor]) -> Any:
    flow, plans = find_onnx_blocks(OnnxGraph(model))
    return flow, plans, capture_blocks(flow, plans, batches, quantized=stored)


@pytest.mark.parametrize("name", GRAPHS)
def test_roles_are_found(name: str) -> None:
    _, plans = find_onnx_blocks(OnnxGraph(make(name)))
    assert [plan.topology.name for plan in plans] == ["model.layers.0", "model.layers.1"]
    for number, plan in enumerate(plans):
        expected = FUSED if name == "phi3" else LLAMA
        assert plan.topology.linears == tuple(expected)
        for role, layer in plan.layers.items():
            assert f"layers.{number}/" in layer.name
            assert expected[role] in layer.name.replace("self_attn", "attn")
        gains = {role: norm.gain for role, norm in plan.norms.items()}
        assert set(gains) == {"input_layernorm", "post_attention_layernorm"}
        kinds = [pair.kind for pair in plan.topology.pairs]
        normed = name == "qwen3"
        assert kinds == ["norm_qkv", "v_o", "norm_mlp", "up_down"] + ["q_k"] * (not normed)
        assert ("q_k" in plan.topology.unavailable) == normed


@pytest.mark.parametrize("name", ["llama", "phi3", "genai"])
def test_names_do_not_matter(name: str) -> None:
    """The same roles where nodes and tensors are called by numbers."""
    model = make(name)
    _, before = find_onnx_blocks(OnnxGraph(model))
    order = {layer.name: n for n, layer in enumerate(_all_layers(before))}
    names: dict[str, str] = {}
    kept = {value.name for value in (*model.graph.input, *model.graph.output)} | {""}
    for number, node in enumerate(model.graph.node):
        node.name = f"n{order[node.name]}" if node.name in order else f"node{number}"
        for field in (node.input, node.output):
            field[:] = [n if n in kept else names.setdefault(n, f"t{len(names)}") for n in field]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    del model.graph.value_info[:]
    _, after = find_onnx_blocks(OnnxGraph(model))
    assert [layer.name for layer in _all_layers(after)] == [f"n{i}" for i in range(len(order))]


def _all_layers(plans: Any) -> list[Any]:
    return [layer for plan in plans for layer in plan.layers.values()]


@pytest.mark.parametrize("name", GRAPHS)
def test_blocks_are_the_graph_in_torch(name: str) -> None:
    """Run one after another on captured inputs, blocks give what onnxruntime gives."""
    model = make(name)
    batch = feeds(model, 3, 12)
    flow, plans, stream = captured(model, batch)
    for plan in plans:
        block = OnnxBlock(flow, plan, argument_names(plans))
        assert check_block(flow, block, stream.select(0)) < 1e-5
        StreamedBlock(block, "block", {"float": stream}).advance("float")
    reference = flow.graph.model(
        flow.graph.subgraph(flow.graph.inputs, [plans[-1].end]),
        list(flow.graph.inputs),
        [plans[-1].end],
    )
    expected = onnx_models.run_onnx(reference, {k: v.numpy() for k, v in batch.items()})[0]
    mask = batch["attention_mask"].bool()
    assert torch.equal(stream.mask(0), mask)
    difference = (stream.hidden[0] - torch.from_numpy(expected))[mask].abs().max()
    assert difference <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma2", "genai"])
@pytest.mark.parametrize("rows", [[0], [1, 2]])
def test_pairs_hold(name: str, rows: list[int]) -> None:
    """Proved in float64, also on one sequence of a batch, whose shape the graph did not see."""
    model = make(name)
    flow, plans, stream = captured(model, feeds(model, 3, 12))
    for plan in plans:
        block = OnnxBlock(flow, plan, argument_names(plans))
        call = stream.select(0, rows)
        inputs = probe_inputs(block, call.args, call.kwargs)
        prove_pairs(probe(block, (), inputs), dict(block.named_parameters()), plan.topology.pairs)
        whole, part = stream.call(block, 0), stream.call(block, 0, rows)
        torch.testing.assert_close(part, whole[rows], rtol=1e-4, atol=1e-5)
        StreamedBlock(block, "block", {"float": stream}).advance("float")


@pytest.mark.parametrize("name", ["qwen2", "genai"])
def test_parameters_go_back_where_they_came_from(name: str) -> None:
    model = make(name)
    flow, plans, stream = captured(model, feeds(model, 2, 12))
    block = OnnxBlock(flow, plans[0], argument_names(plans))
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    with torch.no_grad():
        for parameter in block.parameters():
            parameter *= 2
    output = stream.call(block, 0)
    write_back(flow, block)
    for tensor in model.graph.initializer:
        factor = 2 if tensor.name in plans[0].stored else 1
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), factor * arrays[tensor.name])
    fresh = OnnxBlock(flow, plans[0], argument_names(plans))
    assert torch.equal(stream.call(fresh, 0), output)
    assert check_block(flow, fresh, stream.select(0)) < 1e-5
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    read_again(flow, block)
    assert torch.equal(stream.call(block, 0), output)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "gemma2"])
def test_what_an_exporter_merged_can_be_copied(name: str) -> None:
    """Of an untrained model, each gain and bias that a pair rescales, and each once."""
    changes = {"pad_token_id": 2} if name == "phi3" else {}
    model = onnx_models.exported_llama(family=name, untrained=True, **changes).model
    flow, plans = find_onnx_blocks(OnnxGraph(model))
    for plan in plans:
        assert {"norm_qkv", "norm_mlp"} <= set(plan.shared) <= set(plan.topology.unavailable)
    found = to_copy(v for plan in plans for every in plan.shared.values() for v in every)
    assert all(vector.reading is not None for vector in found)
    assert len({(vector.reading, vector.stored) for vector in found}) == len(found)
    assert len({vector.name for vector in found}) == len(found)
    gains = [vector for vector in found if vector.name.endswith("norm.weight")]
    assert len(gains) == 2 * len(plans)  # the last norm of the model keeps what is stored
    block = OnnxBlock(flow, plans[0], argument_names(plans))
    names = {n for n, _ in block.named_parameters(remove_duplicate=False)}
    assert {f"{norm}.weight" for norm in plans[0].norms} <= names


def test_description_names_the_roles() -> None:
    description = TopologyDescription(
        name="mine", block_class="any", q="a.q", k="a.k", v="a.v", o="a.o", gate="m.g", up="m.u"
    )
    _, plans = find_onnx_blocks(OnnxGraph(make("llama")), description, stack="decoder")
    assert plans[0].topology.name == "decoder.0"
    assert plans[0].topology.linears == ("a.q", "a.k", "a.v", "a.o", "m.g", "m.u", "mlp.down_proj")


def test_every_mismatch_is_listed() -> None:
    """A weight in two places, and an output that is added to a norm, in one error."""
    model = onnx.ModelProto()
    model.CopyFrom(make("llama"))
    nodes = {node.name: node for node in model.graph.node}
    stem = "/model/model/layers.{}/{}/MatMul"
    nodes[stem.format(0, "self_attn/k_proj")].input[1] = nodes[
        stem.format(0, "self_attn/v_proj")
    ].input[1]
    nodes["/model/model/layers.1/Add"].input[0] = nodes[stem.format(1, "self_attn/q_proj")].input[0]
    with pytest.raises(ValueError, match=r"model\.layers\.0.*one place") as caught:
        find_onnx_blocks(OnnxGraph(model))
    for layer in (stem.format(1, "self_attn/o_proj"), stem.format(1, "mlp/down_proj")):
        assert f"{layer} is added to" in str(caught.value)


def test_blocks_that_receive_different_tensors_are_refused() -> None:
    model = make("genai")
    batch = feeds(model, 2, 12)
    for kind in ("key", "value"):
        for number in range(2):
            past = torch.full((2, 2, 4, 16), float(number))
            batch[f"past_key_values.{number}.{kind}"] = past
    batch["attention_mask"] = torch.cat([torch.ones(2, 4).long(), batch["attention_mask"]], 1)
    with pytest.raises(ValueError, match=r"past_key_values\.1\.key.*model\.layers\.1"):
        captured(model, batch)


def test_masked_batch_and_bad_embedding_are_refused() -> None:
    model = make("llama")
    batch = feeds(model, 2, 12)
    with pytest.raises(ValueError, match="batch 1 must hold a token"):
        captured(model, batch, {**batch, "attention_mask": torch.zeros(2, 12).long()})
    graph = OnnxGraph(model)
    name = "model.model.embed_tokens.weight"
    graph.set_tensor(name, torch.full_like(graph.tensor(name), float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        captured(model, batch)


def test_failing_batch_is_named() -> None:
    model = make("llama")
    batch = feeds(model, 2, 12)
    with pytest.raises(RuntimeError, match="batch 1"):
        captured(model, batch, {**batch, "input_ids": torch.full((2, 12), 1000)})


def test_deviation_names_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    from aimet_ext.onnx.ops import translate as onnx_ops

    model = make("llama")
    flow, plans, stream = captured(model, feeds(model, 2, 12))
    block = OnnxBlock(flow, plans[1], argument_names(plans))
    monkeypatch.setitem(onnx_ops.OPERATORS, ("", "Sigmoid"), lambda a, x, opset: x[0].tanh())
    with pytest.raises(TransformRefused, match=r"model\.layers\.1: .*act_fn/Sigmoid"):
        check_block(flow, block, stream.select(0))


@pytest.fixture(scope="module")
def dynamo_model() -> Any:
    pytest.importorskip("onnxscript")
    module = onnx_models.exported_llama().module
    ids = torch.zeros(2, 8, dtype=torch.long)
    sizes = {0: torch.export.Dim("b", max=64), 1: torch.export.Dim("s", min=2, max=128)}
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            dynamic_shapes=(sizes, sizes),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            verbose=False,
        )
    return program.model_proto


def test_exporter_that_names_nodes_by_number(dynamo_model: Any, request: Any) -> None:
    """torch.onnx.export(dynamo=True): shapes come from the mask, weights are read as they are."""
    flow, plans, stream = captured(dynamo_model, feeds(dynamo_model, 3, 12))
    assert plans[0].topology.linears == tuple(LLAMA)
    for plan in plans:
        block = OnnxBlock(flow, plan, argument_names(plans))
        assert check_block(flow, block, stream.select(0)) < 1e-5
        part = stream.call(block, 0, [0])
        torch.testing.assert_close(part, stream.call(block, 0)[:1], rtol=1e-4, atol=1e-5)
        StreamedBlock(block, "block", {"float": stream}).advance("float")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_attention_is_one_function(name: str) -> None:
    """What the graph spells out, against PyTorch's function, in values and gradients."""
    model = make(name)
    flow, plans, stream = captured(model, feeds(model, 2, 12))
    block = OnnxBlock(flow, plans[0], argument_names(plans))
    assert block._attention is not None
    weight = block.get_parameter("self_attn.q_proj.weight").requires_grad_()
    results = []
    for observer in (None, lambda name, value: value):
        block.observer = observer
        output = stream.call(block, 0)
        output[stream.mask(0)].square().sum().backward()
        results.append((output.detach(), weight.grad))
        weight.grad = None
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_observer_sees_and_replaces(request: Any) -> None:
    """Every tensor passes through it, products before their biases are added too."""
    model = make("qwen2")
    flow, plans, stream = captured(model, feeds(model, 2, 12))
    block = OnnxBlock(flow, plans[0], argument_names(plans))
    expected = stream.call(block, 0)
    seen: dict[str, Tensor] = {}

    def observe(name: str, value: Tensor) -> Tensor:
        seen[name] = value
        return value

    block.observer = observe
    torch.testing.assert_close(stream.call(block, 0), expected)
    layer = plans[0].layers["self_attn.q_proj"]
    before = next(n.output[0] for n in flow.graph.nodes if n.name == layer.name)
    bias = flow.graph.tensor(layer.bias)
    torch.testing.assert_close(seen[before] + bias, seen[layer.uses[0].output])
    assert plans[0].end in seen
    assert plans[0].norms["input_layernorm"].gain in seen
    zero: Callable[..., Tensor] = lambda n, v: v * 0 if n == before else v  # noqa: E731
    block.observer = zero
    assert not torch.allclose(stream.call(block, 0), expected)
