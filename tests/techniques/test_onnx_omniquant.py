"""OmniQuant on ONNX simulations: what PyTorch simulations get, in initializers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import LPBQ, PerTensor, QSpec
from aimet_ext.core.affine import fake_quantize
from aimet_ext.sim.protocol import adapt
from aimet_ext.techniques import omniquant

pytest.importorskip("aimet_onnx")
onnx = pytest.importorskip("onnx")
onnx_models = pytest.importorskip("onnx_models")

KINDS = ("norm_qkv", "v_o", "norm_mlp", "up_down", "q_k")
GRAPHS = ("llama", "qwen2", "qwen3", "genai")
#: Gains are ones and biases zeros, each stored once for all that read it.
MERGED = "merged"
QUICK: dict[str, Any] = {"num_iterations": 2, "search_sweeps": 1, "progress": False}
#: Large steps on a coarse grid that all rows share, so that every scale moves, the q-k one too.
BOLD: dict[str, Any] = {
    "num_iterations": 20,
    "init": "ones",
    "search_sweeps": 0,
    "let_lr": 0.03,
    "lr_schedule": "constant",
    "evaluations": 20,
    "pairs": KINDS,
    "progress": False,
}


@dataclass
class Case:
    """A model in both forms, and batches for both."""

    name: str
    model: Any
    module: Any
    batches: list[dict[str, np.ndarray]]
    torch_batches: list[dict[str, Tensor]] = field(default_factory=list)

    def sim(self, spec: QSpec | None = None, activations: QSpec | None = None) -> Any:
        """An ONNX simulation, 4-bit weights in the blocks, all else float."""
        from onnx_sims import build_sim

        from aimet_ext.onnx.graph import OnnxGraph
        from aimet_ext.onnx.layers import find_layers

        layers = find_layers(OnnxGraph(self.model))
        linears = [n for n, layer in layers.items() if layer.kind == "linear" and "head" not in n]
        specs = dict.fromkeys(linears, spec or QSpec(bitwidth=4))
        return build_sim(self.model, specs, activations, dummy_input=self.batches[0])

    def torch_sim(self, spec: QSpec | None = None) -> Any:
        """A simulation of the same weights."""
        pytest.importorskip("aimet_torch")
        return aimet_ext.create_sim(
            copy.deepcopy(self.module),
            self.torch_batches[0]["input_ids"],
            weights=spec or QSpec(bitwidth=4),
            activations=None,
            lm_head=None,
            embedding=None,
        )


def make_case(
    name: str, ids: Sequence[Tensor], masks: Sequence[Tensor] | None = None, layers: int = 2
) -> Case:
    masks = masks or [torch.ones_like(i) for i in ids]
    pairs = list(zip(ids, masks, strict=True))
    torch_batches = [{"input_ids": i, "attention_mask": m} for i, m in pairs]
    if name == "genai":
        model, module = onnx_models.genai_llama(num_hidden_layers=layers)
        batches = [onnx_models.genai_inputs(model, i, m) for i, m in pairs]
    else:
        family = "qwen2" if name == MERGED else name
        found = onnx_models.exported_llama(layers, family=family, untrained=name == MERGED)
        model, module = found.model, found.module.model
        batches = [{key: v.numpy() for key, v in batch.items()} for batch in torch_batches]
    return Case(name, model, module, batches, torch_batches)


@pytest.fixture(scope="session")
def case(ids: Callable[..., Tensor]) -> Callable[..., Case]:
    """``case(name, layers)``: a model and three batches, one of them padded on the right."""

    def make(name: str = "llama", layers: int = 2) -> Case:
        drawn = [ids(2, 16, 1), ids(3, 24, 2), ids(1, 12, 3)]
        masks = [torch.ones_like(i) for i in drawn]
        masks[1][0, 20:] = 0
        return make_case(name, drawn, masks, layers)

    return make


@pytest.fixture(scope="module", params=[*GRAPHS, MERGED])
def folded(request: Any, case: Callable[..., Case], ids: Callable[..., Tensor]) -> Any:
    """A model, and its simulation after OmniQuant with every kind of pair."""
    found = make_case(request.param, [ids(4, 24, 1)])
    sim = found.sim(QSpec(bitwidth=3, granularity=PerTensor()))
    return found, sim, aimet_ext.apply_omniquant(sim, found.batches, **BOLD)


def float_model(sim: Any) -> Any:
    graph = adapt(sim).graph
    return graph.model(range(len(graph.nodes)), list(graph.inputs), [graph.outputs[0]])


def logits(model: Any, batches: Any) -> list[np.ndarray]:
    return [onnx_models.run_onnx(model, batch)[0] for batch in batches]


def digest(array: Any) -> str:
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"


def encodings(quantizer: Any) -> Any:
    found = quantizer.get_encodings()
    return found and [(e.min, e.max, e.delta, e.offset, e.bw) for e in found]


def state_of(sim: Any) -> dict[str, Any]:
    """Everything of a sim that a failed call must leave as it was."""
    graph = adapt(sim).graph
    state: dict[str, Any] = {name: digest(graph.array(name)) for name in graph.initializers}
    for name, q in sim.qc_quantize_op_dict.items():
        state[f"quantizer {name}"] = (
            (q.enabled, q.bitwidth, q.use_symmetric_encodings, str(q.op_mode)),
            (q.is_encoding_frozen(), q.is_initialized(), encodings(q)),
        )
    ledger = getattr(sim, "aimet_ext_ledger", None)
    state["ledger"] = ledger and (len(ledger.entries), len(ledger.runs), id(ledger))
    return state


def test_all_kinds_of_pairs_were_folded(folded: Any) -> None:
    found, sim, report = folded
    kinds = KINDS[:4] if found.name == "qwen3" else KINDS
    assert "training" in {block.kept for block in report.blocks}
    entries = sim.aimet_ext_ledger.entries
    assert {(entry.block, entry.kind) for entry in entries} == {
        (block.name, kind) for block in report.blocks for kind in kinds
    }
    assert set(report.refused_pairs) == set(KINDS) - set(kinds)


def test_float_function_is_what_it_was(folded: Any) -> None:
    found, sim, _ = folded
    for before, after in zip(
        logits(found.model, found.batches), logits(float_model(sim), found.batches), strict=True
    ):
        assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_scales_lead_from_the_original_to_the_stored_weights(folded: Any, tmp_path: Any) -> None:
    """W' = diag(output) W diag(input), under the names that the PyTorch model has."""
    found, sim, _ = folded
    now = {}
    adaptor = adapt(sim)
    for block in adaptor.find_blocks(None):
        for name, value in adaptor.float_parameters(block.name).items():
            now[f"{block.name}.{name}"] = value.detach().clone()
    scales = sim.aimet_ext_ledger.cumulative()
    assert scales
    for name, axes in scales.items():
        module = found.module.get_submodule(name)
        weight = module.weight.detach().clone()
        if "output" in axes:
            weight = weight * axes["output"].view(-1, *[1] * (weight.ndim - 1))
        if "input" in axes:
            weight = weight * axes["input"]
        torch.testing.assert_close(now[f"{name}.weight"], weight, rtol=1e-5, atol=1e-7)
        if getattr(module, "bias", None) is not None and "output" in axes:
            bias = module.bias.detach() * axes["output"]
            torch.testing.assert_close(now[f"{name}.bias"], bias, rtol=1e-5, atol=1e-7)


def test_technique_is_applied_once(folded: Any) -> None:
    found, sim, _ = folded
    with pytest.raises(ValueError, match="omniquant"):
        aimet_ext.apply_omniquant(sim, found.batches, **QUICK)


@pytest.mark.parametrize("name", GRAPHS)
def test_loss_falls_and_ranges_are_frozen(case: Callable[..., Case], name: str) -> None:
    found = case(name)
    sim = found.sim()
    report = aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    adaptor = adapt(sim)
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    for block in report.blocks:
        assert block.loss_after < block.loss_nearest
    quantizers = adaptor.weight_quantizers()
    assert len(quantizers) == 14
    assert all(quantizer.frozen for quantizer in quantizers.values())
    before = {name: q.grid().scale for name, q in quantizers.items()}
    sim.compute_encodings(found.batches)
    for layer, quantizer in adaptor.weight_quantizers().items():
        assert torch.equal(quantizer.grid().scale, before[layer])


@pytest.mark.parametrize("grid", ["asymmetric", "LPBQ"])
def test_session_computes_with_the_deployed_weights(case: Callable[..., Case], grid: str) -> None:
    """The session, against the float graph with each weight fake-quantized on its grid."""
    spec = {
        "asymmetric": QSpec(bitwidth=4, symmetric=False),
        "LPBQ": QSpec(bitwidth=4, granularity=LPBQ(16)),
    }[grid]
    found = case(layers=1)
    sim = found.sim(spec)
    report = aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    assert all(block.loss_after < block.loss_nearest for block in report.blocks)
    adaptor = adapt(sim)
    quantized = onnx.ModelProto()
    quantized.CopyFrom(float_model(sim))
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    for name, quantizer in adaptor.weight_quantizers().items():
        layer = adaptor.layers[name]
        weight = fake_quantize(quantizer.weight, quantizer.grid()).numpy()
        array = weight.T if layer.transposed else weight
        stored[layer.weight].raw_data = np.ascontiguousarray(array).tobytes()
    for batch in found.batches:
        expected = onnx_models.run_onnx(quantized, batch)[0]
        np.testing.assert_allclose(sim.session.run(None, batch)[0], expected, atol=1e-5)


@pytest.fixture
def first_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, list[Tensor]]]:
    """Block, loss and gradients of the first training step of each block."""
    seen: list[tuple[str, float, list[Tensor]]] = []
    step = omniquant._step

    def spy(block: Any, learner: Any, *args: Any) -> float:
        loss = step(block, learner, *args)
        if block.name not in {name for name, *_ in seen}:
            named = dict(learner.named_parameters())
            seen.append((block.name, loss, [p.grad.clone() for p in named.values()]))
        return loss

    monkeypatch.setattr(omniquant, "_step", spy)
    return seen


@pytest.mark.parametrize("name", [*GRAPHS, MERGED])
def test_first_step_is_that_of_the_torch_side(
    case: Callable[..., Case], name: str, first_steps: list[Any]
) -> None:
    found = case(name)
    settings = {**QUICK, "num_iterations": 1, "search_sweeps": 0, "lwc": True, "autocast": False}
    reports = [
        aimet_ext.apply_omniquant(found.sim(), found.batches, **settings),
        None,
    ]
    mine = list(first_steps)
    first_steps.clear()
    reports[1] = aimet_ext.apply_omniquant(found.torch_sim(), found.torch_batches, **settings)
    for (_, loss, gradients), (_, wanted, expected) in zip(mine, first_steps, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-4)
        for gradient, reference in zip(gradients, expected, strict=True):
            assert (gradient - reference).norm() <= 1e-4 * reference.norm()
    for block, reference in zip(reports[0].blocks, reports[1].blocks, strict=True):
        assert block.loss_nearest == pytest.approx(reference.loss_nearest, rel=1e-4)
        assert block.loss_before == pytest.approx(reference.loss_before, rel=1e-4)
        assert block.loss_after == pytest.approx(reference.loss_after, rel=0.02)


def test_scales_file_is_that_of_the_torch_side(case: Callable[..., Case], tmp_path: Any) -> None:
    found = case("qwen2", layers=1)
    files = []
    for number, (sim, batches) in enumerate(
        [(found.sim(), found.batches), (found.torch_sim(), found.torch_batches)]
    ):
        aimet_ext.apply_omniquant(sim, batches, output_path=tmp_path / str(number), **QUICK)
        files.append(aimet_ext.load_scales(tmp_path / str(number)))
    mine, reference = files
    assert set(mine) == set(reference)
    assert [p["sides"] for p in mine.pairs] == [p["sides"] for p in reference.pairs]
    for name, scales in mine.items():
        for axis in ("input", "output"):
            found_scale, wanted = getattr(scales, axis), getattr(reference[name], axis)
            assert (found_scale is None) == (wanted is None)
            if wanted is not None:
                assert found_scale.shape == wanted.shape


def test_a_graph_of_one_batch_size(ids: Callable[..., Tensor]) -> None:
    """Steps are taken on fewer sequences than the graph was exported for."""
    free = make_case("llama", [ids(4, 12, 1)], layers=1)
    names = list(free.batches[0])
    args = tuple(torch.from_numpy(free.batches[0][name]) for name in names)
    module = onnx_models.exported_llama(1, family="llama").module
    model = onnx_models.exported_module(module, args, names, ["logits"], None)
    fixed = Case("fixed", model, free.module, free.batches)
    reports = [
        aimet_ext.apply_omniquant(found.sim(), found.batches, batch_size=3, **QUICK)
        for found in (free, fixed)
    ]
    for one, two in zip(*(report.blocks for report in reports), strict=True):
        assert two.loss_nearest == pytest.approx(one.loss_nearest, rel=1e-4)
        assert two.loss_after == pytest.approx(one.loss_after, rel=1e-3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_sim_alone(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    found = case()
    sim = found.sim(activations=QSpec(bitwidth=16, symmetric=False))
    sim.compute_encodings(found.batches)
    outputs = sim.session.run(None, found.batches[0])[0]
    before = state_of(sim)
    train = omniquant.train_block

    def fail(block: Any, *args: Any, **kwargs: Any) -> Any:
        if block.name.endswith("1"):
            raise error("stop")
        return train(block, *args, **kwargs)

    monkeypatch.setattr(omniquant, "train_block", fail)
    with pytest.raises(error, match="stop"):
        aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    assert state_of(sim) == before
    np.testing.assert_array_equal(sim.session.run(None, found.batches[0])[0], outputs)


def test_checkpoint_goes_on_to_the_same_bits(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    found = case()
    whole = found.sim()
    aimet_ext.apply_omniquant(whole, found.batches, **QUICK)
    train = omniquant.train_block

    def fail(block: Any, *args: Any, **kwargs: Any) -> Any:
        if block.name.endswith("1"):
            raise RuntimeError("stop")
        return train(block, *args, **kwargs)

    sim = found.sim()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        patch.setattr(omniquant, "train_block", fail)
        aimet_ext.apply_omniquant(sim, found.batches, checkpoint_dir=tmp_path, **QUICK)
    report = aimet_ext.apply_omniquant(sim, found.batches, checkpoint_dir=tmp_path, **QUICK)
    assert [block.resumed for block in report.blocks] == [True, False]
    one, two = state_of(sim), state_of(whole)
    assert {k: v for k, v in one.items() if k != "ledger"} == {
        k: v for k, v in two.items() if k != "ledger"
    }


@pytest.mark.parametrize("how", ["module", "node"])
def test_excluded_layers_are_left_alone(case: Callable[..., Case], how: str) -> None:
    found = case(layers=1)
    node = "/model/model/layers.0/self_attn/v_proj/MatMul"
    name = {"module": "model.layers.0.self_attn.v_proj", "node": node}[how]
    sim = found.sim()
    quantizer = adapt(sim).weight_quantizer(node)
    weight = quantizer.weight
    report = aimet_ext.apply_omniquant(sim, found.batches, modules_to_exclude=[name], **QUICK)
    assert not quantizer.frozen
    assert torch.equal(quantizer.weight, weight)
    assert "v_proj" in report.refused_pairs["v_o"]


def test_padding_counts_nowhere(ids: Callable[..., Tensor]) -> None:
    """Other ids under mask 0 change nothing."""
    first, other = ids(2, 16, 1), ids(2, 16, 1)
    mask = torch.ones_like(first)
    mask[:, 12:] = 0
    other[:, 12:] = ids(2, 4, 9)
    states = []
    for name, drawn in (("genai", first), ("genai", other)):
        found = make_case(name, [drawn], [mask], layers=1)
        sim = found.sim()
        aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
        adaptor = adapt(sim)
        states.append({n: q.grid().scale for n, q in adaptor.weight_quantizers().items()})
    for name, scale in states[0].items():
        torch.testing.assert_close(scale, states[1][name], rtol=1e-5, atol=0)


def test_stale_activation_ranges_are_renewed_and_named(case: Callable[..., Case]) -> None:
    found = case(layers=1)
    sim = found.sim(activations=QSpec(bitwidth=16, symmetric=False))
    sim.compute_encodings(found.batches)
    report = aimet_ext.apply_omniquant(sim, found.batches, **{**QUICK, "init": "smoothquant"})
    reset = [name for block in report.blocks for name in block.reset_encodings]
    assert any("input_layernorm" in name for name in reset)
    embedded = "/model/model/embed_tokens/Gather_output_0"
    assert embedded not in reset
    renewed = {name: sim.qc_quantize_op_dict[name].get_encodings() for name in reset}
    assert all(renewed.values())
    sim.compute_encodings(found.batches)
    for name, (encoding,) in renewed.items():  # as near as the float blocks are to the sim's
        (again,) = sim.qc_quantize_op_dict[name].get_encodings()
        assert encoding.max - encoding.min == pytest.approx(again.max - again.min, rel=0.3)


def test_trains_with_activation_quantizers(case: Callable[..., Case]) -> None:
    found = case(layers=1)
    sim = found.sim(activations=QSpec(bitwidth=8, symmetric=False))
    on = aimet_ext.apply_omniquant(sim, found.batches, **QUICK, quantize_activations=True)
    off = aimet_ext.apply_omniquant(found.sim(), found.batches, **QUICK)
    for one, two in zip(on.blocks, off.blocks, strict=True):
        assert one.loss_after > two.loss_after


def reading_one_gain(case: Case, through: str | None = None) -> Case:
    """The same model, but all norms of the blocks read one gain.

    :param through: name of a tensor by which they do, the output of one Identity node.
    """
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    gains = [t.name for t in model.graph.initializer if "layers" in t.name and "norm" in t.name]
    for node in model.graph.node:
        node.input[:] = [(through or gains[0]) if name in gains else name for name in node.input]
    for tensor in [t for t in model.graph.initializer if t.name in gains[1:]]:
        model.graph.initializer.remove(tensor)
    if through is not None:
        model.graph.node.insert(
            0, onnx.helper.make_node("Identity", [gains[0]], [through], name="one_gain")
        )
    return Case(case.name, model, case.module, case.batches)


@pytest.mark.parametrize("name", ["llama", "genai"])
def test_gain_that_is_shared_is_copied_for_each_norm(case: Callable[..., Case], name: str) -> None:
    found = reading_one_gain(case(name))
    sim = found.sim(activations=QSpec(bitwidth=16, symmetric=False))
    (gain,) = [n for n in adapt(sim).graph.initializers if "layers" in n and "norm" in n]
    report = aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    assert not report.refused_pairs
    kinds = {(entry.block, entry.kind) for entry in sim.aimet_ext_ledger.entries}
    assert {("model.layers.0", "norm_qkv"), ("model.layers.1", "norm_mlp")} <= kinds
    stem = "model.layers.{}.{}.weight"
    copies = [
        stem.format(number, norm)
        for number in (0, 1)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ][1:]  # the first norm keeps what was stored
    graph = adapt(sim).graph
    assert set(copies) <= set(graph.initializers)
    assert len({digest(graph.array(n)) for n in (gain, *copies)}) == 4
    before, after = (logits(m, found.batches[:1])[0] for m in (found.model, float_model(sim)))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    for copied in copies:
        mine, original = (sim.qc_quantize_op_dict.get(n) for n in (copied, gain))
        assert (mine is None) == (original is None)
        assert original is None or (mine.bitwidth, mine.enabled) == (16, True)


def test_gain_that_cannot_be_copied_is_refused_by_name(case: Callable[..., Case]) -> None:
    found = reading_one_gain(case(), through="everywhere")
    sim = found.sim()
    report = aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    for kind in ("norm_qkv", "norm_mlp"):
        assert "layers.0.input_layernorm.weight" in report.refused_pairs[kind]
    assert {e.kind for e in sim.aimet_ext_ledger.entries}.isdisjoint(["norm_qkv", "norm_mlp"])
    before, after = (logits(m, found.batches[:1])[0] for m in (found.model, float_model(sim)))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_nothing_is_copied_that_is_not_rescaled(case: Callable[..., Case]) -> None:
    found = case(MERGED)
    plain, some = found.sim(), found.sim()
    stored = set(adapt(plain).graph.initializers)
    aimet_ext.apply_omniquant(plain, found.batches, let=False, **QUICK)
    assert set(adapt(plain).graph.initializers) == stored
    aimet_ext.apply_omniquant(some, found.batches, pairs=("norm_mlp",), **QUICK)
    stem = "model.layers.{}.post_attention_layernorm.weight"
    assert set(adapt(some).graph.initializers) - stored == {stem.format(0), stem.format(1)}


@pytest.mark.parametrize("config", [None, "htp_v75"])
def test_failure_takes_copies_out_again(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, config: str | None
) -> None:
    """The model byte by byte, and AIMET's own view of it."""
    import aimet_onnx

    found = case(MERGED)
    model = onnx.ModelProto()
    model.CopyFrom(found.model)
    sim = aimet_onnx.QuantizationSimModel(model, param_type="int4", config_file=config)
    sim.compute_encodings(found.batches[:1])
    session = sim.session
    outputs = session.run(None, found.batches[0])[0]

    def view() -> Any:
        graph = sim.connected_graph
        products = {
            name: [op.name for op in product.consumers]
            for name, product in graph.get_all_products().items()
        }
        ops = {
            name: ([p.name for p in op.inputs], list(op.parameters))
            for name, op in graph.get_all_ops().items()
        }
        names = (list(sim.param_names), list(sim.activation_names), list(sim._producers))
        return products, ops, names, list(sim.qc_quantize_op_dict), dict(sim.activation_dtypes)

    before = sim.model.model.SerializeToString(deterministic=True), view(), state_of(sim)
    with pytest.raises(ValueError, match="modules_to_exclude"):
        aimet_ext.apply_omniquant(sim, found.batches, modules_to_exclude=["none"], **QUICK)
    assert (sim.model.model.SerializeToString(deterministic=True), view(), state_of(sim)) == before
    assert sim.session is session
    train = omniquant.train_block

    def fail(block: Any, *args: Any, **kwargs: Any) -> Any:
        if block.name.endswith("1"):
            raise RuntimeError("stop")
        return train(block, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        patch.setattr(omniquant, "train_block", fail)
        aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    assert (sim.model.model.SerializeToString(deterministic=True), view(), state_of(sim)) == before
    np.testing.assert_array_equal(sim.session.run(None, found.batches[0])[0], outputs)
    assert not aimet_ext.apply_omniquant(sim, found.batches, **QUICK).refused_pairs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_with_copies_is_read_back(case: Callable[..., Case], tmp_path: Any) -> None:
    """Encodings, QDQ and :func:`load` give the same bits; the scales are those of the modules."""
    found = case(MERGED)
    sim = found.sim(activations=QSpec(bitwidth=16, symmetric=False))
    aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    sim.compute_encodings(found.batches)
    aimet_ext.export(sim, tmp_path, "model", found.batches[0])
    loaded = aimet_ext.load(tmp_path)
    for batch in found.batches:
        one, two = (s.session.run(None, batch)[0] for s in (sim, loaded))
        np.testing.assert_array_equal(one, two)
    scales = aimet_ext.load_scales(tmp_path)
    assert scales["model.layers.1.post_attention_layernorm"].output is not None


def test_rounded_weights_are_refused(case: Callable[..., Case]) -> None:
    found = case(layers=1)
    sim = found.sim()
    aimet_ext.apply_gptq(sim, found.batches, progress=False, refine_sweeps=1, scale_candidates=2)
    before = state_of(sim)
    with pytest.raises(ValueError, match="gptq"):
        aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    assert state_of(sim) == before


def test_wrong_translation_is_refused_and_named(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aimet_ext.errors import TransformRefused
    from aimet_ext.onnx.ops import translate as onnx_ops

    found = case(layers=1)
    sim = found.sim()
    before = state_of(sim)
    monkeypatch.setitem(onnx_ops.OPERATORS, ("", "Sigmoid"), lambda a, x, opset: x[0].tanh())
    with pytest.raises(TransformRefused, match=r"model\.layers\.0.*layers\.0/mlp/act_fn/Sigmoid"):
        aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    assert state_of(sim) == before


def test_operator_without_translation_is_refused_and_named(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aimet_ext.errors import TransformRefused
    from aimet_ext.onnx.ops import translate as onnx_ops

    found = case(layers=1)
    sim = found.sim()
    monkeypatch.delitem(onnx_ops.OPERATORS, ("", "Sigmoid"))
    with pytest.raises(TransformRefused, match=r"Sigmoid"):
        aimet_ext.apply_omniquant(sim, found.batches, **QUICK)


def test_forward_fn_is_refused(case: Callable[..., Case]) -> None:
    found = case(layers=1)
    with pytest.raises(TypeError, match="forward_fn"):
        aimet_ext.apply_omniquant(
            found.sim(), found.batches, forward_fn=lambda model, batch: None, **QUICK
        )


def test_model_without_blocks_is_refused() -> None:
    from onnx_sims import build_sim

    sim = build_sim(onnx_models.mlp_model((16, 32, 8)), QSpec(bitwidth=4), None)
    with pytest.raises(ValueError, match="no decoder block"):
        aimet_ext.apply_omniquant(sim, [np.zeros((2, 16), np.float32)], **QUICK)


@pytest.mark.parametrize("config", [None, "htp_v75"])
def test_simulation_of_plain_aimet(case: Callable[..., Case], config: str | None) -> None:
    """Built by hand, nodes fused as the configuration says; AIMET's own calls go on working."""
    import aimet_onnx

    found = case("qwen2", layers=1)
    model = onnx.ModelProto()
    model.CopyFrom(found.model)
    sim = aimet_onnx.QuantizationSimModel(
        model, param_type="int4", activation_type="int16", config_file=config
    )
    report = aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    assert all(block.loss_after < block.loss_nearest for block in report.blocks)
    before, after = (logits(m, found.batches[:1])[0] for m in (found.model, float_model(sim)))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    sim.compute_encodings(found.batches)
    assert np.isfinite(sim.session.run(None, found.batches[0])[0]).all()
    quantized = sim.to_onnx_qdq()
    assert any(node.op_type == "DequantizeLinear" for node in quantized.graph.node)


def test_half_precision(ids: Callable[..., Tensor]) -> None:
    """Stored types stay, and the float function up to the last places."""
    module = aimet_ext.prepare_model(
        onnx_models.tiny_causal_lm("llama", num_hidden_layers=1).half()
    )
    drawn = ids(2, 16, 1)
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "seq"} for name in names}
    model = onnx_models.exported_module(
        module, (drawn, torch.ones_like(drawn)), names, ["logits"], axes
    )
    batch = {"input_ids": drawn.numpy(), "attention_mask": np.ones_like(drawn.numpy())}
    found = Case("half", model, module, [batch])
    sim = found.sim()
    report = aimet_ext.apply_omniquant(sim, found.batches, **QUICK)
    assert all(block.loss_after < block.loss_nearest for block in report.blocks)
    graph = adapt(sim).graph
    for tensor in model.graph.initializer:
        assert graph.initializers[tensor.name].data_type == tensor.data_type
    unit = float(np.finfo(np.float16).eps)
    before = logits(model, found.batches)[0].astype(np.float32)
    after = logits(float_model(sim), found.batches)[0].astype(np.float32)
    assert np.abs(after - before).max() <= 16 * unit * np.abs(before).max()
