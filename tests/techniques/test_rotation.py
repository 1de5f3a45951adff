"""Rotations leave the float model as it was, family by family, and spread its outliers."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext import QSpec, TransformRefused, load_scales
from aimet_ext.core.affine import fake_quantize
from aimet_ext.core.factors import multiply
from aimet_ext.sim.protocol import adapt

FIRST = "model.model.layers.0.self_attn.q_proj"
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma")


@torch.no_grad()
def logits(sim: Any, batch: Tensor) -> Tensor:
    """Return the logits of the float model."""
    with adapt(sim).disabled_quantizers():
        return sim.model(batch)


def change(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def rotate(sim: Any, dataloader: Any = None, **settings: Any) -> Any:
    return aimet_ext.apply_rotation(sim, dataloader, progress=False, **settings)


@pytest.mark.parametrize(
    ("family", "mode"), [*((name, "hadamard") for name in FAMILIES), ("llama", "random")]
)
def test_the_float_function_stays(make_sim: Any, ids: Any, family: str, mode: str) -> None:
    """Grouped queries, biases, norms of heads, fused projections, gains that add 1."""
    sim = make_sim(family)
    before = logits(sim, ids())
    weight = sim.model.get_submodule("model.model.layers.1.mlp.down_proj").weight.clone()
    report = rotate(sim, mode=mode)
    assert change(logits(sim, ids()), before) < 1e-5 and report.deviation < 1e-5
    assert [part.name for part in report.blocks][-1] == "ends" and len(report.blocks) == 3
    assert max(part.deviation for part in report.blocks) < 1e-12
    assert set(report.rotations) == {"r1", "r2"} and not report.refused
    assert ("Hadamard" in report.rotations["r1"]) == (mode == "hadamard")
    assert not torch.equal(
        sim.model.get_submodule("model.model.layers.1.mlp.down_proj").weight, weight
    )
    gain = sim.model.get_submodule("model.model.layers.0.input_layernorm").weight
    assert torch.equal(gain, torch.full_like(gain, 0.0 if family == "gemma" else 1.0))


_ALL_HEADS: dict[str, Any] = {"num_key_value_heads": 4, "tie": True}
#: Families of LayerNorms, and what their configs have beside the common sizes.
LAYER_NORMS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **_ALL_HEADS},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, **_ALL_HEADS},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "starcoder2": {"use_bias": True},
    "nemotron": {},
}


def kinds_of(sim: Any) -> dict[str, type]:
    modules = sim.model.named_modules()
    return {name: type(module) for name, module in modules if "quantizers" not in name}


@pytest.mark.parametrize(
    ("family", "mode"), [*((name, "hadamard") for name in LAYER_NORMS), ("opt", "random")]
)
def test_layer_norms_keep_their_operators(
    tiny_model: Any, ids: Any, family: str, mode: str
) -> None:
    """The rotation keeps the mean that they take away; positions are turned, biases too."""
    settings = dict(LAYER_NORMS[family])
    tie = settings.pop("tie", False)
    model = tiny_model(family, **settings, tie_word_embeddings=tie)
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    sim = aimet_ext.create_sim(model, ids(), activations=None)
    kinds = kinds_of(sim)
    before = logits(sim, ids())
    report = rotate(sim, mode=mode)
    assert kinds_of(sim) == kinds
    assert change(logits(sim, ids()), before) < 1e-5
    assert max(part.deviation for part in report.blocks) < 1e-12
    assert ("mean kept" in report.rotations["r1"]) == (mode == "hadamard")
    assert "r2" in report.rotations


@pytest.mark.parametrize("family", ["gpt2", "opt", "nemotron"])
def test_scale_pairs_of_layer_norms_hold(tiny_model: Any, ids: Any, family: str) -> None:
    """The same tables serve OmniQuant."""
    settings = dict(LAYER_NORMS[family])
    settings.pop("tie", None)
    sizes = {"num_hidden_layers": 1, "n_layer": 1}
    sim = aimet_ext.create_sim(tiny_model(family, **{**settings, **sizes}), ids(), activations=None)
    before = logits(sim, ids())
    aimet_ext.apply_omniquant(sim, [ids()], 1, search_sweeps=1, progress=False)
    assert change(logits(sim, ids()), before) < 1e-5


def test_a_bias_where_a_gain_is_zero_is_refused(tiny_model: Any, ids: Any, state_of: Any) -> None:
    model = tiny_model("starcoder2")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[7] = 0
    sim = aimet_ext.create_sim(model, ids(), activations=None)
    before = state_of(sim)
    with pytest.raises(ValueError, match=r"layernorm: gains other than 0 are required where the"):
        rotate(sim)
    assert state_of(sim) == before


def test_a_width_without_hadamard_matrix_is_rotated_at_random(tiny_model: Any, ids: Any) -> None:
    model = tiny_model("llama", hidden_size=92, head_dim=10)
    sim = aimet_ext.create_sim(model, ids(), activations=None)
    before = logits(sim, ids())
    report = rotate(sim)
    assert report.rotations == {
        "r1": "92 channels of the hidden states, random orthogonal",
        "r2": "10 channels of each head, random orthogonal",
    }
    assert change(logits(sim, ids()), before) < 1e-5


def test_a_tied_head_gets_a_weight_of_its_own(tiny_model: Any, ids: Any) -> None:
    """And a quantizer: its gains are those of the last norm, the embedding's are none."""
    model = tiny_model("llama", tie_word_embeddings=True)
    same = QSpec(bitwidth=8)
    sim = aimet_ext.create_sim(model, ids(), lm_head=same, embedding=same, activations=None)
    inner = sim.model.model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    before = logits(sim, ids())
    rotate(sim)
    assert change(logits(sim, ids()), before) < 1e-5
    head, table = inner.lm_head, inner.model.embed_tokens
    assert head.weight is not table.weight
    assert head.param_quantizers["weight"] is not table.param_quantizers["weight"]
    assert inner.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True and model.lm_head.weight is (
        model.model.embed_tokens.weight
    )


def test_a_rotated_model_with_a_tied_head_is_exported(
    tiny_model: Any, ids: Any, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("onnx")
    sim = aimet_ext.create_sim(tiny_model("llama", tie_word_embeddings=True), ids())
    rotate(sim)
    sim.compute_encodings(lambda model: model(ids()))
    with torch.no_grad():
        expected = sim.model(ids())
        aimet_ext.export(sim, tmp_path / "out", "tiny", ids())
        assert torch.equal(aimet_ext.load(tmp_path / "out").model(ids()), expected)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [({"r2": False}, {"norm_gain", "r1"}), ({"r1": False}, {"r2"})],
    ids=["r1", "r2"],
)
def test_one_rotation_alone(make_sim: Any, ids: Any, settings: Any, kinds: set[str]) -> None:
    sim = make_sim("phi3")
    before = logits(sim, ids())
    rows = sim.model.get_submodule("model.model.layers.0.self_attn.qkv_proj").weight.clone()
    report = rotate(sim, **settings)
    assert change(logits(sim, ids()), before) < 1e-5
    assert {entry.kind for entry in sim.aimet_ext_ledger.entries} == kinds
    if "r2" in kinds:
        assert list(report.rotations) == ["r2"]
        now = sim.model.get_submodule("model.model.layers.0.self_attn.qkv_proj").weight
        assert torch.equal(now[:96], rows[:96]) and not torch.equal(now[96:], rows[96:])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_norms_behind_layers_leave_the_heads_alone_to_be_rotated(
    make_sim: Any, ids: Any, state_of: Any, family: str
) -> None:
    sim = make_sim(family)
    state, before = state_of(sim), logits(sim, ids())
    text = (
        r"layers\.0: layers must be added to the hidden states as they are for r1, but "
        "post_attention_layernorm, post_feedforward_layernorm normalises.*pass r1=False"
    )
    with pytest.raises(TransformRefused, match=text):
        rotate(sim)
    assert state_of(sim) == state
    rotate(sim, r1=False)
    assert change(logits(sim, ids()), before) < 1e-5


def test_multipliers_of_hidden_states_and_logits(tiny_model: Any, ids: Any) -> None:
    model = tiny_model(
        "granite",
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=7.0,
        attention_multiplier=0.2,
    )
    sim = aimet_ext.create_sim(model, ids(), activations=None)
    before = logits(sim, ids())
    table = aimet_ext.TopologyDescription(name="granite", block_class="GraniteDecoderLayer")
    rotate(sim, topology=table)
    assert change(logits(sim, ids()), before) < 1e-5


class Heads(nn.Module):
    """An output layer with a further module beside it."""

    def __init__(self, head: nn.Linear, extra: nn.Module) -> None:
        super().__init__()
        self.head, self.extra = head, extra

    def forward(self, hidden: Tensor) -> Tensor:
        further: Tensor = self.extra(hidden[..., : getattr(self.extra, "in_features", 64)])
        return self.head(hidden) + further.mean(-1, keepdim=True)


def with_further(model: Any, extra: nn.Module, ids: Tensor) -> Any:
    model.lm_head = Heads(model.lm_head, extra)
    return aimet_ext.create_sim(model, ids, activations=None, embedding=None)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (nn.Linear(16, 4), r"lm_head\.extra \(weight \[4, 16\].*is neither an embedding"),
        (nn.LayerNorm(64), "one norm outside of the blocks, found"),
    ],
)
def test_what_else_has_a_weight_beside_the_blocks_is_named(
    tiny_llama: Any, ids: Any, state_of: Any, extra: nn.Module, text: str
) -> None:
    sim = with_further(tiny_llama, extra, ids())
    before = state_of(sim)
    with pytest.raises(TransformRefused, match=f"{text}.*pass r1=False"):
        rotate(sim)
    assert state_of(sim) == before


def test_a_second_output_layer_is_rotated_too(tiny_llama: Any, ids: Any) -> None:
    sim = with_further(tiny_llama, nn.Linear(64, 5), ids())
    before = logits(sim, ids())
    rotate(sim)
    assert change(logits(sim, ids()), before) < 1e-5


def test_gains_of_zero_prune_their_channels(make_sim: Any, ids: Any) -> None:
    sim = make_sim()
    with torch.no_grad():
        sim.model.get_submodule("model.model.layers.0.input_layernorm").weight[5] = 0
        sim.model.get_submodule("model.model.norm").weight[:2] = torch.tensor([0.0, -1.0])
    before = logits(sim, ids())
    rotate(sim)
    assert change(logits(sim, ids()), before) < 1e-5


def test_a_model_that_is_rotated_already(tiny_model: Any, ids: Any) -> None:
    """As AIMET's SpinQuant leaves it: gains of one, a head of its own."""
    first = aimet_ext.create_sim(tiny_model("qwen2"), ids(), activations=None)
    rotate(first, r2=False)
    model = copy.deepcopy(tiny_model("qwen2"))
    model.load_state_dict(
        {n.removeprefix("model."): v for n, v in adapt(first).float_state().items()}
    )
    sim = aimet_ext.create_sim(model, ids(), activations=None)
    before = logits(sim, ids())
    rotate(sim, seed=4)
    assert change(logits(sim, ids()), before) < 1e-5
    assert {entry.kind for entry in sim.aimet_ext_ledger.entries} == {"r1", "r2"}


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision(make_sim: Any, ids: Any, dtype: torch.dtype) -> None:
    sim = make_sim(dtype=dtype)
    before = logits(sim, ids())
    report = rotate(sim)
    assert max(part.deviation for part in report.blocks) < 1e-12
    assert change(logits(sim, ids()), before) < 16 * torch.finfo(dtype).eps
    assert sim.model.get_submodule(FIRST).weight.dtype is dtype


# ---- what it leaves behind ----------------------------------------------------------------------


def test_the_ledger_maps_every_weight(make_sim: Any, tmp_path: pathlib.Path) -> None:
    """W' = OUT W IN and b' = OUT b, from the file that is written."""
    sim = make_sim("qwen2")
    rename, before = adapt(sim).original_names(), dict(adapt(sim).float_state())
    before = {name: value.clone() for name, value in before.items()}
    rotate(sim, output_path=tmp_path / "out")
    scales = load_scales(tmp_path / "out")
    for name, now in adapt(sim).float_state().items():
        module = rename(name).rpartition(".")[0]
        value, factors = before[name].double(), scales[module]
        if factors.output is not None:
            value = multiply(value, factors.output, 0, "left")
        if factors.input is not None and value.dim() > 1:
            value = multiply(value, factors.input, 1, "right")
        assert change(value, now.double()) < 1e-6, name
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "report.json",
        "scales.safetensors",
    ]


def test_one_matrix_is_shared_by_all_layers(make_sim: Any) -> None:
    sim = make_sim()
    rotate(sim)
    stacks = [
        side.factor
        for entry in sim.aimet_ext_ledger.entries
        for side in entry.sides
        if side.factor.dim() == 3 and side.factor.shape[-1] == 64
    ]
    assert len(stacks) > 15 and len({stack.data_ptr() for stack in stacks}) == 2  # R and its Rᵀ


def test_ranges_are_free_and_stale_ones_are_named(make_sim: Any, ids: Any) -> None:
    sim = make_sim("qwen2", activations=16, lm_head=QSpec(bitwidth=8))
    sim.compute_encodings(lambda model: model(ids()))
    adaptor = adapt(sim)
    report = rotate(sim, [ids()])
    assert FIRST in report.reset_encodings and "model.lm_head" in report.reset_encodings
    assert not any(q.frozen for q in adaptor.weight_quantizers().values())
    assert not any(name.endswith("lm_head.output_quantizers.0") for name in report.reset_encodings)
    for end in ("o_proj.output_quantizers.0", "input_layernorm.output_quantizers.0"):
        assert any(name.endswith(end) for name in report.reset_encodings), end
    for name, quantizer in adaptor.activation_quantizers().items():
        if name in report.reset_encodings:
            assert not quantizer.is_initialized()
    sim.compute_encodings(lambda model: model(ids()))
    assert all(q.is_initialized() for q in adaptor.activation_quantizers().values())


@pytest.mark.parametrize("after", ["omniquant", "gptq"])
def test_other_techniques_follow(make_sim: Any, ids: Any, after: str) -> None:
    quick = {
        "omniquant": {"num_iterations": 1, "search_sweeps": 1},
        "gptq": {"scale_candidates": 2, "refine_sweeps": 0},
    }
    sim = make_sim(layers=1)
    rotate(sim)
    function = getattr(aimet_ext, f"apply_{after}")
    function(sim, [ids()], progress=False, **quick[after])
    assert sim.aimet_ext_ledger.techniques == ("rotation", after)
    with pytest.raises(ValueError, match=r"rotat|already applied|froze"):
        rotate(sim)


def planted(tiny_model: Callable[..., Any]) -> Any:
    """A Llama with two columns in each weight that are far larger than all others.

    The norms before them make up for it.
    """
    model = tiny_model("llama", num_hidden_layers=1)
    block = model.model.layers[0]
    columns = [3, 40]
    with torch.no_grad():
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight[columns] /= 30
        for name, layer in block.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                layer.weight[:, columns] *= 30
    return model


def test_rounding_after_it_is_better_on_outliers(tiny_model: Any, ids: Any) -> None:
    errors = []
    for rotated in (False, True):
        sim = aimet_ext.create_sim(
            planted(tiny_model), ids(), activations=None, lm_head=None, embedding=None
        )
        before = logits(sim, ids())
        if rotated:
            rotate(sim)
        sim.compute_encodings(lambda model: model(ids()))
        with torch.no_grad():
            errors.append(float((sim.model(ids()) - before).square().mean()))
    assert errors[1] < 0.2 * errors[0]


# ---- calls, errors, undo ------------------------------------------------------------------------


def test_forms_of_data_and_none_give_one_result(make_sim: Any, ids: Any, result_of: Any) -> None:
    results = []
    forms: list[Any] = [
        None,
        [ids(2, 16, 1)],
        [{"input_ids": ids(2, 16, 1), "attention_mask": torch.ones(2, 16, dtype=torch.long)}],
    ]
    for data in forms:
        sim = make_sim(layers=1)
        rotate(sim, data)
        results.append({k: v for k, v in result_of(sim).items() if not k.startswith("ledger")})
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ([], ValueError, "at least one batch"),
        (["hello"], TypeError, "batch 0 must be a tensor of ids"),
        ([torch.ones(2, 4, dtype=torch.long)], ValueError, "at least 8 tokens"),
        ([torch.ones(1, 65, dtype=torch.long)], (ValueError, RuntimeError), "64 tokens"),
        ([torch.full((1, 8), 999)], (ValueError, RuntimeError), "batch 0"),
    ],
)
def test_bad_data(make_sim: Any, state_of: Any, data: Any, error: Any, text: str) -> None:
    sim = make_sim()
    before = state_of(sim)
    with pytest.raises(error, match=text):
        rotate(sim, data)
    assert state_of(sim) == before


def test_forward_fn(make_sim: Any, ids: Any) -> None:
    sim = make_sim(layers=1)
    before = logits(sim, ids())
    rotate(sim, [{"tokens": ids()}], forward_fn=lambda model, batch: model(batch["tokens"]))
    assert change(logits(sim, ids()), before) < 1e-5


@pytest.mark.parametrize(
    ("damage", "settings", "text"),
    [
        (lambda sim: sim.model.get_submodule(FIRST).weight.fill_(torch.nan), {}, f"{FIRST}.*NaN"),
        (
            lambda sim: adapt(sim).weight_quantizer(FIRST).freeze(),
            {},
            f"{FIRST}.*froze its range, which a rotation would make wrong",
        ),
        (
            lambda sim: sim.model.get_submodule(FIRST).weight.copy_(
                fake_quantize(
                    sim.model.get_submodule(FIRST).weight,
                    adapt(sim).weight_quantizer(FIRST).grid(),
                )
            ),
            {},
            f"{FIRST}.*rounded to a grid already",
        ),
        (lambda sim: None, {"modules_to_exclude": [FIRST]}, f"modules_to_exclude.*{FIRST}"),
        (lambda sim: None, {"r1": False, "r2": False}, "r1 or r2 must be true"),
        (lambda sim: None, {"mode": "fast"}, "mode"),
    ],
    ids=["NaN", "frozen", "rounded", "exclude", "nothing", "mode"],
)
def test_refused(make_sim: Any, state_of: Any, damage: Any, settings: Any, text: str) -> None:
    sim = make_sim()
    with torch.no_grad():
        damage(sim)
    before = state_of(sim)
    with pytest.raises(ValueError, match=text):
        rotate(sim, **settings)
    assert state_of(sim) == before


def test_twice_is_refused(make_sim: Any, state_of: Any) -> None:
    sim = make_sim()
    rotate(sim)
    before = state_of(sim)
    with pytest.raises(ValueError, match="rotation was already applied to"):
        rotate(sim)
    assert state_of(sim) == before


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("_ends", MemoryError()),
        ("check_outputs", KeyboardInterrupt()),
        ("write_scales", KeyboardInterrupt()),
    ],
)
def test_a_failure_undoes_all(
    tiny_model: Any,
    ids: Any,
    state_of: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    place: str,
    tmp_path: pathlib.Path,
) -> None:
    """The last things that can fail; the head is tied again."""
    from aimet_ext.techniques.rotating import run

    sim = aimet_ext.create_sim(tiny_model("llama", tie_word_embeddings=True), ids(), activations=16)
    sim.compute_encodings(lambda model: model(ids()))
    before = state_of(sim)
    identity = {name: id(parameter) for name, parameter in sim.model.named_parameters()}

    def failing(*args: Any, **rest: Any) -> None:
        raise error

    owner = run.RotationRun if place == "_ends" else run
    monkeypatch.setattr(owner, place, failing)
    with pytest.raises(type(error)):
        rotate(sim, output_path=tmp_path / "out")
    assert state_of(sim) == before
    assert identity == {name: id(parameter) for name, parameter in sim.model.named_parameters()}
    assert sim.model.model.config.tie_word_embeddings is True
    assert sim.model.model.lm_head.weight is sim.model.model.model.embed_tokens.weight


def test_a_block_that_a_rotation_would_change_is_named(
    make_sim: Any, state_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reader less is turned: the proof on the model itself fails, by name."""
    from aimet_ext.techniques.rotating import fold

    sim, turn = make_sim(), fold.turn
    before = state_of(sim)
    monkeypatch.setattr(
        fold,
        "turn",
        lambda params, step: {} if step.module == "mlp.up_proj" else turn(params, step),
    )
    with pytest.raises(TransformRefused, match=r"layers\.0: rotations must leave the float func"):
        rotate(sim)
    assert state_of(sim) == before


def test_a_checkpoint_of_nothing_is_refused(make_sim: Any, state_of: Any, tmp_path: Any) -> None:
    sim = make_sim(layers=1)
    before = state_of(sim)
    with pytest.raises(ValueError, match=r"checkpoint_dir must be left out: apply_rotation\(\)"):
        aimet_ext.apply_rotation(sim, checkpoint_dir=tmp_path / "kept", progress=False)
    assert state_of(sim) == before and not (tmp_path / "kept").exists()
