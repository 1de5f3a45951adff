"""Simulations of models with packed weights: quantized whole, decided, exported, loaded."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import aimet_ext
from aimet_ext.artifact.export import write_model
from aimet_ext.models.attention import every_module
from aimet_ext.sim.protocol import adapt

aimet_torch = pytest.importorskip("aimet_torch")

from aimet_torch.nn import QuantizationMixin  # noqa: E402
from aimet_torch.utils import remove_all_quantizers  # noqa: E402

IDS = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))
MOE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
BLOCK = "model.model.layers.0."
UP = [f"{BLOCK}mlp.experts.gate_up_proj.{number}" for number in range(4)]
DOWN = [f"{BLOCK}mlp.experts.down_proj.{number}" for number in range(4)]


@pytest.fixture(autouse=True)
def _unknown_modules_are_float():
    QuantizationMixin.ignore_unknown_modules(True)
    yield
    QuantizationMixin.ignore_unknown_modules(False)


@pytest.fixture
def moe_sim(tiny_model):
    """``moe_sim()``: a simulation of a small Mixtral; ``lonely``: no token goes to its expert 4."""

    def build(lonely=False, **settings):
        model = tiny_model("mixtral", **{**MOE, "num_local_experts": 4 + lonely})
        if lonely:
            gate = model.model.layers[0].mlp.gate.weight.data
            gate.copy_(torch.tensor([1.0, 2.0, -1.0, -2.0, 0.0])[:, None] * gate[0])
        return aimet_ext.create_sim(model, IDS[:2], **{"activations": None, **settings})

    return build


@torch.no_grad()
def run(sim, *batch):
    return sim.model(*batch).as_subclass(torch.Tensor)


# ---- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("technique", ["gptq", "seq_mse", "adaround"])
@pytest.mark.parametrize("inp_symmetry", ["symqt", "asym"])
def test_experts_are_decided(moe_sim, technique, inp_symmetry):
    """Each on the tokens that are sent to it in the quantized stream; no layer gets worse."""
    sim, settings = moe_sim(), {"num_iterations": 20} if technique == "adaround" else {}
    apply = getattr(aimet_ext, f"apply_{technique}")
    batches = [IDS[:4], IDS[4:]]
    report = apply(sim, batches, inp_symmetry=inp_symmetry, progress=False, **settings)
    layers = {layer.name: layer for layer in report.layers}
    assert {*UP, *DOWN} <= layers.keys()
    for names in (UP, DOWN):
        assert sum(layers[name].tokens for name in names) == 2 * IDS.numel()
        assert all(layers[name].loss_after <= layers[name].loss_nearest for name in names)
    assert all(adapt(sim).weight_quantizer(name).frozen for name in (*UP, *DOWN))


def test_padding_is_not_counted_for_experts(moe_sim):
    mask = torch.ones_like(IDS)
    mask[:, :5] = 0
    report = aimet_ext.apply_gptq(
        moe_sim(), [{"input_ids": IDS, "attention_mask": mask}], progress=False
    )
    layers = {layer.name: layer for layer in report.layers}
    assert sum(layers[name].tokens for name in UP) == 2 * int(mask.sum())


@pytest.mark.parametrize("inp_symmetry", ["symqt", "asym"])
def test_an_expert_without_tokens_is_decided_by_those_of_all(moe_sim, inp_symmetry):
    """On these it beats plain rounding, and the report says how far it leans on them."""
    sim, original = moe_sim(lonely=True), moe_sim(lonely=True)
    settings = {"inp_symmetry": inp_symmetry, "progress": False}
    report = aimet_ext.apply_gptq(sim, [IDS[:4], IDS[4:]], **settings)
    layers = {layer.name: layer for layer in report.layers}
    for name in (f"{BLOCK}mlp.experts.gate_up_proj.4", f"{BLOCK}mlp.experts.down_proj.4"):
        layer = layers[name]
        assert (layer.tokens, layer.leaned) == (0, 1.0) and layer.rows_nearest < layer.rows
        assert layer.loss_after < 0.9 * layer.loss_nearest
        assert f"leans on the tokens of all experts: {name} saw 0, and by 100% all" in str(report)
    assert all(layers[name].tokens > 0 for name in (*UP, *DOWN))
    every = [layers[f"{BLOCK}mlp.experts.gate_up_proj.{number}"] for number in range(5)]
    assert [layer.expert for layer in every] == [0, 1, 2, 3, 4]
    tokens = [layer.tokens for layer in every]
    fewest = min(filter(None, tokens))
    (line,) = (line for line in report.notes if line.startswith("tokens of experts"))
    assert "2 of 10 layers got none" in line
    assert f"are {fewest} of {BLOCK}mlp.experts" in line and f"{fewest / sum(tokens):.1%}" in line
    assert all(layer.expert is None for n, layer in layers.items() if "experts" not in n)
    assert all(layer.leaned == 0 for name, layer in layers.items() if "experts" not in name)
    # On the text itself, all of which is sent to it.
    for s in (sim, original):
        gate = s.model.get_submodule(f"{BLOCK}mlp.gate").weight
        gate.data[:] = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])[:, None] * gate.data[0]
    plain = moe_sim(lonely=True)
    aimet_ext.apply_rtn(plain, progress=False)
    x = torch.cat(inputs_of(original, f"{BLOCK}mlp.experts.gate_up_proj.4"))
    ours, theirs, true = (
        s.model.get_submodule(f"{BLOCK}mlp.experts.gate_up_proj.4").weight.as_subclass(torch.Tensor)
        for s in (sim, plain, original)
    )
    assert (x @ (ours - true).T).norm() < 0.95 * (x @ (theirs - true).T).norm()


@torch.no_grad()
def inputs_of(sim, name):
    """What reaches a layer in float."""
    seen = []
    layer = sim.model.get_submodule(name)
    with (
        remove_all_quantizers(sim.model),
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ):
        sim.model(IDS)
    return seen


def test_without_data_of_the_block_an_expert_keeps_plain_rounding(moe_sim):
    """AIMET's own way believes the tokens that come, and none come."""
    sim, plain = moe_sim(lonely=True), moe_sim(lonely=True)
    report = aimet_ext.apply_seq_mse(sim, [IDS[:4], IDS[4:]], mode="compatible", progress=False)
    for name in (f"{BLOCK}mlp.experts.gate_up_proj.4", f"{BLOCK}mlp.experts.down_proj.4"):
        (layer,) = [layer for layer in report.layers if layer.name == name]
        assert (layer.tokens, layer.rows_nearest, layer.leaned) == (0, layer.rows, 0)
        assert f"plain rounding, for want of tokens: {name}" in str(report)
        (own, other) = (adapt(s).weight_quantizer(name).grid().scale for s in (sim, plain))
        torch.testing.assert_close(own, other, rtol=1e-3, atol=0)


def test_experts_are_exported_and_loaded(moe_sim, tmp_path):
    """With an expert that no token of the calibration reached, which other text may reach."""
    transformers = pytest.importorskip("transformers")
    sim = moe_sim(lonely=True, activations=16)
    sim.compute_encodings(lambda model: model(IDS))
    aimet_ext.export(sim, tmp_path / "out", "model", IDS)
    again = aimet_ext.load(tmp_path / "out")
    assert torch.equal(run(again, IDS), run(sim, IDS))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with remove_all_quantizers(sim.model), torch.no_grad():
        expected = run(sim, IDS)
        mask = model(IDS).logits
    torch.testing.assert_close(mask, expected, rtol=1e-4, atol=1e-5)


def test_experts_that_are_called_in_groups(tiny_model, tmp_path):
    """Those of Llama 4: their tokens alone count, without padding, in both streams."""
    one_expert = {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    model = tiny_model(
        "llama4_text",
        **{**MOE, **one_expert, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
    )
    sim = aimet_ext.create_sim(model, IDS[:2], activations=None)
    assert all("router" in name for name in sim.aimet_ext_settings["left_float"])
    with remove_all_quantizers(sim.model):
        expected = run(sim, IDS)
    plain = (run(sim, IDS) - expected).norm()
    mask = torch.ones_like(IDS)
    mask[:, :5] = 0
    batches = [{"input_ids": IDS, "attention_mask": mask}]
    report = aimet_ext.apply_gptq(sim, batches, inp_symmetry="asym", progress=False)
    layers = {layer.name: layer for layer in report.layers if "experts" in layer.name}
    for part in ("gate_up_proj", "down_proj"):
        assert sum(x.tokens for n, x in layers.items() if part in n) == int(mask.sum())
    assert (run(sim, IDS) - expected).norm() < 0.9 * plain
    aimet_ext.export(sim, tmp_path / "out", "model", IDS)
    assert torch.equal(run(aimet_ext.load(tmp_path / "out"), IDS), run(sim, IDS))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: v.shape for n, v in stored.items()} == {
        n: v.shape for n, v in model.state_dict().items()
    }


# ---- attention -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """``nn.MultiheadAttention`` of any settings, and a layer behind it."""

    def __init__(self, call, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, **settings)
        self.last = nn.Linear(16, 4)
        self.call = call

    def forward(self, x):
        return self.last(self.call(self.attention, x)[0])


def own(attention, x):
    return attention(x, x, x)


def without_weights(attention, x):
    return attention(x, x, x, need_weights=False)


def padded(attention, x):
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[0, -2:] = True
    return attention(x, x, x, key_padding_mask=mask)


def causal(attention, x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return attention(x, x, x, attn_mask=mask, need_weights=False)


def crossed(attention, x):
    return attention(x, x[..., :12], x[..., 2:12])


ATTENTIONS = {
    "plain": (own, {}),
    "batch_first": (own, {"batch_first": True}),
    "without_weights": (without_weights, {"batch_first": True}),
    "padded": (padded, {"batch_first": True}),
    "causal": (causal, {"batch_first": True}),
    "no_bias": (own, {"bias": False}),
    "other_widths": (crossed, {"kdim": 12, "vdim": 10, "batch_first": True}),
    "added": (own, {"add_bias_kv": True, "add_zero_attn": True}),
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_projections_of_an_attention_are_decided(name, tmp_path):
    """Same function without quantizers, and the state of the model's own names in the export."""
    call, settings = ATTENTIONS[name]
    torch.manual_seed(0)
    model, x = Attention(call, **settings).eval(), torch.randn(3, 5, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
    sim = aimet_ext.create_sim(model, (x,), activations=None)
    with remove_all_quantizers(sim.model):
        torch.testing.assert_close(run(sim, x), expected, rtol=1e-5, atol=1e-6)
    written = write_model(tmp_path, sim.model, adapt(sim).float_state())
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == before.keys() and not written["tied"]
    assert all(torch.equal(stored[key], value) for key, value in before.items())
    report = aimet_ext.apply_gptq(sim, [(x,)], progress=False)
    layers = {layer.name for layer in report.layers}
    assert layers == {"last", *(f"attention.{part}" for part in PROJECTIONS)}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 16)


def test_an_encoder_does_not_go_around_its_layers():
    """torch has a fast path that reads weights and calls no module, so no quantizer either."""
    model, x = encoder()
    sim = aimet_ext.create_sim(model, (x,), activations=None)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, -2:] = True
    with torch.no_grad():
        for padding in (None, mask):
            with every_module():
                expected = model(x, src_key_padding_mask=padding)
            with remove_all_quantizers(sim.model):
                float_ = sim.model(x, src_key_padding_mask=padding)
            keep = torch.ones_like(mask) if padding is None else ~mask
            torch.testing.assert_close(float_[keep], expected[keep], rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                quantized = sim.model(x, src_key_padding_mask=padding)
            assert (quantized - expected)[keep].abs().max() > 1e-2


def test_an_encoder_is_exported_and_loaded(tmp_path):
    model, x = encoder()
    sim = aimet_ext.create_sim(model, (x,))
    sim.compute_encodings(lambda module: module(x))
    aimet_ext.export(sim, tmp_path / "out", "model", x)
    other = aimet_ext.create_sim(encoder()[0], (x,))
    for value in adapt(other).float_state().values():
        value.mul_(3)
    again = aimet_ext.load(tmp_path / "out", sim=other)
    assert torch.equal(run(again, x), run(sim, x))


def test_tensors_that_view_one_another_are_stored(tmp_path):
    """AIMET's attention in a simulation built by hand has projections that view its in_proj."""
    model, x = encoder()
    sim = aimet_torch.QuantizationSimModel(model, x)
    state = adapt(sim).float_state()
    write_model(tmp_path, sim.model, state)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in state.items())
