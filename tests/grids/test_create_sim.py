"""One call makes a simulation that AIMET's own tools, and ours, can go on with."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from aimet_ext.evaluation.perplexity import evaluate_perplexity
from aimet_ext.grids.create import arguments_from_settings, create_sim
from aimet_ext.models.huggingface import prepare_model
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import LPBQ, Blockwise, PerChannel, PerTensor, QSpec

aimet_torch = pytest.importorskip("aimet_torch")

BLOCK = "model.model.layers.0."
DOWN, Q = BLOCK + "mlp.down_proj", BLOCK + "self_attn.q_proj"
HEAD, EMBED, NORM = "model.lm_head", "model.model.embed_tokens", BLOCK + "input_layernorm"


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))


def spec_of(sim, name: str) -> QSpec | None:
    quantizer = adapt(sim).weight_quantizer(name)
    return None if quantizer is None else quantizer.spec()


def calibrated(sim, ids):
    sim.compute_encodings(lambda model: model(ids))
    return sim


@pytest.fixture(scope="module")
def default_sim(tiny_model, ids):
    return create_sim(tiny_model("llama"), ids)


class TestDefaults:
    def test_weights(self, default_sim):
        sim = default_sim
        linears = adapt(sim).weight_quantizers(
            name for name, m in sim.model.named_modules() if isinstance(m, nn.Linear)
        )
        assert len(linears) == 2 * 7 + 1
        for name, quantizer in linears.items():
            assert quantizer.spec() == QSpec(bitwidth=8 if name == HEAD else 4)
            assert quantizer.initialized and not quantizer.frozen
        assert spec_of(sim, EMBED) == QSpec(bitwidth=8, granularity=PerTensor())
        assert adapt(sim).weight_quantizer(NORM).bitwidth == 16

    def test_activations(self, default_sim):
        quantizers = adapt(default_sim).activation_quantizers()
        assert len(quantizers) > 20
        assert {q.bitwidth for q in quantizers.values()} == {16}
        assert not any(q.symmetric for q in quantizers.values())

    def test_settings_are_json_and_build_the_same_sim(self, default_sim, tiny_model, ids):
        settings = json.loads(json.dumps(default_sim.aimet_ext_settings))
        again = create_sim(tiny_model("llama"), ids, **arguments_from_settings(settings))
        assert again.aimet_ext_settings == default_sim.aimet_ext_settings
        assert str(again.model) == str(default_sim.model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_weights_only_runs_at_once_and_is_plain_rounding(tiny_model, ids, family):
    model = tiny_model(family)
    original = copy.deepcopy(model.state_dict())
    sim = create_sim(model, ids, activations=None)
    assert not adapt(sim).activation_quantizers()
    assert spec_of(sim, NORM) is None
    with torch.no_grad():
        logits, reference = sim.model(ids), prepare_model(model)(ids)
        assert not torch.equal(logits, reference)
        with adapt(sim).disabled_quantizers():
            assert torch.equal(sim.model(ids), reference)
        other = ids.repeat(2, 2)
        assert sim.model(other, torch.ones_like(other)).shape == (4, 32, 128)
    assert all(torch.equal(original[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "spec",
    [
        QSpec(bitwidth=3, granularity=PerTensor()),
        QSpec(bitwidth=2, symmetric=False, granularity=Blockwise(16)),
        QSpec(bitwidth=4, granularity=LPBQ(32, 3)),
        QSpec(bitwidth=8, symmetric=False),
    ],
    ids=str,
)
def test_every_granularity_is_set(tiny_llama, ids, spec):
    sim = create_sim(tiny_llama, ids, weights=spec, activations=None, lm_head=None, embedding=spec)
    assert spec_of(sim, Q) == spec_of(sim, DOWN) == spec_of(sim, EMBED) == spec
    assert spec_of(sim, HEAD) is None
    assert sim.model(ids).isfinite().all()


def test_overrides_fit_names_of_checkpoint_or_model_and_the_first_counts(tiny_llama, ids):
    sim = create_sim(
        tiny_llama,
        ids,
        activations=8,
        overrides={
            "*.layers.0.mlp.down_proj": QSpec(bitwidth=3),
            "model.layers.*.mlp.*": QSpec(bitwidth=8),
            "model.model.layers.1.self_attn.q_proj": None,
        },
    )
    assert spec_of(sim, DOWN).bitwidth == 3
    assert spec_of(sim, BLOCK + "mlp.up_proj").bitwidth == 8
    assert spec_of(sim, "model.model.layers.1.self_attn.q_proj") is None
    assert spec_of(sim, Q).bitwidth == 4
    with pytest.raises(ValueError, match=r"must fit a layer with a weight, '\*\.experts\.\*' fits"):
        create_sim(tiny_llama, ids, overrides={"*.experts.*": None})


@pytest.mark.parametrize("place", ["weights", "lm_head", "embedding", "*.q_proj"])
def test_widths_that_no_weight_can_have_are_refused(tiny_llama, ids, place):
    name = f"overrides['{place}']" if "*" in place else place
    for bits in (9, 15, 17, 32):
        spec = QSpec(bitwidth=bits)
        with pytest.raises(ValueError) as caught:
            create_sim(
                tiny_llama, ids, **({"overrides": {place: spec}} if "*" in place else {place: spec})
            )
        assert str(caught.value).startswith(
            f"{name}: weights of 2 to 8 bits, or of 16, are required"
        )
        assert f"got {bits} bits" in str(caught.value)


def test_overrides_must_be_specs(tiny_llama, ids):
    with pytest.raises(TypeError, match=r"overrides\['\*'\] must be a QSpec, .* got 'int4'"):
        create_sim(tiny_llama, ids, overrides={"*": "int4"})


def test_activations_take_a_spec(tiny_llama, ids):
    sim = create_sim(tiny_llama, ids, activations=QSpec(bitwidth=8, symmetric=True))
    for quantizer in adapt(sim).activation_quantizers().values():
        assert (quantizer.qmin, quantizer.qmax, quantizer.symmetric) == (-128, 127, True)
    assert calibrated(sim, ids).model(ids).isfinite().all()


class TestTiedEmbeddings:
    def test_one_weight_has_one_quantizer(self, tiny_model, ids):
        sim = create_sim(tiny_model("llama", tie_word_embeddings=True), ids)
        embed, head = sim.model.get_submodule(EMBED), sim.model.get_submodule(HEAD)
        assert embed.weight is head.weight
        assert embed.param_quantizers["weight"] is head.param_quantizers["weight"]
        copied = copy.deepcopy(sim).model
        embed, head = copied.get_submodule(EMBED), copied.get_submodule(HEAD)
        assert embed.weight is head.weight
        assert embed.param_quantizers["weight"] is head.param_quantizers["weight"]
        with adapt(sim).disabled_quantizers(weights=True, activations=False):
            assert spec_of(sim, HEAD) is spec_of(sim, EMBED) is None
        assert spec_of(sim, HEAD) == QSpec(bitwidth=8)

    def test_two_specs_for_it_are_refused(self, tiny_model, ids):
        model = tiny_model("llama", tie_word_embeddings=True)
        with pytest.raises(ValueError, match="share one weight and need the same spec"):
            create_sim(model, ids, lm_head=None, embedding=QSpec(bitwidth=8))
        for embedding in (None, "auto"):
            sim = create_sim(model, ids, lm_head=None, embedding=embedding, activations=None)
            assert spec_of(sim, HEAD) is spec_of(sim, EMBED) is None

    def test_alone_an_embedding_has_one_scale_and_the_heads_bits(self, tiny_model, ids):
        wide = QSpec(bitwidth=16, symmetric=False)
        sim = create_sim(tiny_model("llama"), ids, lm_head=wide, activations=None)
        assert spec_of(sim, EMBED) == QSpec(bitwidth=16, granularity=PerTensor())
        sim = create_sim(tiny_model("llama"), ids, lm_head=None, activations=None)
        assert spec_of(sim, EMBED) == QSpec(bitwidth=8, granularity=PerTensor())


class TestIndivisibleWidths:
    @pytest.fixture
    def model(self, tiny_model):
        return tiny_model("llama", intermediate_size=100)

    def test_error_names_every_layer(self, model, ids):
        with pytest.raises(
            ValueError, match=r"layers\.0\.mlp\.down_proj \(width 100, block size 32"
        ):
            create_sim(model, ids, weights=QSpec(granularity=Blockwise(32)))

    def test_error_counts_the_others_and_says_what_divides_all(self, tiny_model, ids):
        model = tiny_model("llama", intermediate_size=100)  # the other layers are 64 wide
        with pytest.raises(ValueError) as caught:
            create_sim(model, ids, weights=QSpec(granularity=Blockwise(48)))
        message = str(caught.value)
        assert message.count("block size 48") == 4 and " and 10 more; choose another" in message
        assert message.endswith("sizes that divide all layers with blocks: 4, 2")
        create_sim(model, ids, weights=QSpec(granularity=Blockwise(4)))

    def test_per_channel_is_recorded(self, model, ids, caplog):
        spec = QSpec(granularity=LPBQ(32), on_indivisible="per_channel")
        sim = create_sim(model, ids, weights=spec, activations=None)
        assert "2 layers have one range a row" in caplog.text and DOWN in caplog.text
        assert spec_of(sim, Q).granularity == LPBQ(32)
        assert spec_of(sim, DOWN).granularity == PerChannel()
        assert DOWN in sim.aimet_ext_settings["per_channel_instead"]

    @pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
    def test_padding_leaves_the_function_and_the_original(self, tiny_model, ids, family):
        model = tiny_model(family, intermediate_size=100)
        spec = QSpec(granularity=LPBQ(32), on_indivisible="pad")
        sim = create_sim(model, ids, weights=spec, activations=None)
        assert spec_of(sim, DOWN).granularity == LPBQ(32)
        assert sim.model.get_submodule(DOWN).in_features == 128
        assert sim.model.config.intermediate_size == 128 and model.config.intermediate_size == 100
        assert set(sim.aimet_ext_settings["padded_mlp_widths"].values()) == {128}
        with torch.no_grad(), adapt(sim).disabled_quantizers():
            torch.testing.assert_close(sim.model(ids), prepare_model(model)(ids))
        rebuilt = type(model)(sim.model.config)  # the config fits the weights
        parameters = adapt(sim).float_parameters("model")
        assert {name: p.shape for name, p in rebuilt.named_parameters()} == {
            name: p.shape for name, p in parameters.items()
        }

    def test_attention_cannot_be_padded(self, tiny_model, ids):
        spec = QSpec(granularity=Blockwise(48), on_indivisible="pad")
        with pytest.raises(ValueError, match=r"read something else: .*q_proj"):
            create_sim(tiny_model("llama"), ids, weights=spec)


class TestItStaysAimets:
    @pytest.fixture
    def sim(self, tiny_llama, ids):
        return calibrated(create_sim(tiny_llama, ids), ids)

    def test_perplexity_and_deep_copy(self, sim, ids, tiny_llama):
        quantized = evaluate_perplexity(sim, [ids])
        assert quantized != evaluate_perplexity(tiny_llama, [ids])
        assert evaluate_perplexity(copy.deepcopy(sim), [ids]) == quantized

    def test_a_training_step(self, sim, ids):
        optimizer = torch.optim.SGD(sim.model.parameters(), lr=0.1)
        weight = sim.model.get_submodule(Q).weight
        maximum = sim.model.get_submodule(Q).param_quantizers["weight"].max
        before = weight.detach().clone(), maximum.detach().clone()
        logits = sim.model(ids)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        assert not torch.equal(weight, before[0]) and not torch.equal(maximum, before[1])
        assert sim.model(ids).isfinite().all()

    def test_quantizers_are_saved_and_loaded(self, sim, ids, tiny_llama):
        other = create_sim(tiny_llama, ids)
        other.model.load_state_dict(sim.quantizer_state_dict(), strict=False)
        assert torch.equal(other.model(ids), sim.model(ids))

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("activations", [16, None])
    def test_onnx_export(self, tiny_model, ids, tmp_path, tied, activations):
        pytest.importorskip("onnx")
        model = tiny_model("llama", tie_word_embeddings=tied)
        sim = calibrated(create_sim(model, ids, activations=activations), ids)
        logits = sim.model(ids)
        path = tmp_path / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sim.onnx.export(
                (ids,), str(path), input_names=["ids"], output_names=["logits"], dynamo=False
            )
        assert path.is_file() and torch.equal(sim.model(ids), logits)
        encodings = json.loads((tmp_path / "model.encodings").read_text())
        widths = [e["bw"] for e in encodings["param_encodings"] if "proj.weight" in e["name"]]
        assert widths == [4] * 14
        names = {entry["name"] for entry in encodings["activation_encodings"]}
        rows = {name for name in names if name.endswith("embed_tokens/Gather_output_0")}
        assert bool(names - rows) == (activations is not None)  # rows of weights are on their grid


def test_nothing_warns_and_a_bad_sample_is_named(tiny_model, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_sim(tiny_model("llama"), ids)
    model = tiny_model("llama", max_position_embeddings=8)
    with pytest.raises(ValueError, match=r"at most 8 tokens.*got 16"):
        create_sim(model, ids)
    with pytest.raises(TypeError, match=r"sample_input_ids must be .* got str"):
        create_sim(model, "text")
    for name in ("weights", "lm_head", "embedding", "activations"):
        with pytest.raises(TypeError, match=rf"{name} must be a QSpec, or None.*got 'int4'; write"):
            create_sim(model, ids, **{name: "int4"})
    with pytest.raises(TypeError, match=r"causal language model.*got LlamaModel"):
        create_sim(model.model, ids)


def test_bfloat16_stays(tiny_model, ids):
    sim = create_sim(tiny_model("llama").to(torch.bfloat16), ids, activations=None)
    assert sim.model(ids).dtype == torch.bfloat16
    assert sim.model.get_submodule(Q).weight.dtype == torch.bfloat16


def test_a_module_of_ones_own_and_a_sample_as_mapping(tiny_llama, ids, tmp_path):
    class Mine(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            return self.inner(tokens)

    sim = create_sim(Mine(prepare_model(tiny_llama)), (ids,), activations=None)
    assert spec_of(sim, "inner." + HEAD) == QSpec(bitwidth=8)
    config = {
        "defaults": {"ops": {}, "params": {}},
        "params": {},
        "op_type": {},
        "supergroups": [],
        "model_input": {},
        "model_output": {},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    sim = create_sim(tiny_llama, {"input_ids": ids}, config_file=path)
    assert sim.aimet_ext_settings["config_file"] == config
    assert not adapt(sim).activation_quantizers()


def test_in_place_it_is_the_model_itself(tiny_model, ids):
    copied = create_sim(tiny_model("llama"), ids)
    model = tiny_model("llama")
    weights = {name: (value, value.clone()) for name, value in model.named_parameters()}
    sim = create_sim(model, ids, in_place=True)
    assert sim.model.model is model
    for name, (value, was) in weights.items():
        assert sim.model.model.get_parameter(name) is value and torch.equal(value, was)
    assert adapt(sim).settings == adapt(copied).settings
    assert torch.equal(calibrated(sim, ids).model(ids), calibrated(copied, ids).model(ids))


def test_the_model_is_run_once_more_than_by_aimet(tiny_model, ids):
    runs = []
    model = tiny_model("llama", num_hidden_layers=1)
    model.register_forward_pre_hook(lambda *_: runs.append(None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of AIMET's and of transformers
        aimet_torch.QuantizationSimModel(prepare_model(model), ids)
    own = len(runs)
    create_sim(model, ids)
    assert len(runs) - own == own + 1


def test_in_place_padding_widens_the_model_itself(tiny_model, ids):
    spec = QSpec(bitwidth=4, granularity=Blockwise(32), on_indivisible="pad")
    model = tiny_model("llama", intermediate_size=40)
    sim = create_sim(model, ids, weights=spec, in_place=True)
    assert sim.model.model is model and model.model.layers[0].mlp.down_proj.in_features == 64
