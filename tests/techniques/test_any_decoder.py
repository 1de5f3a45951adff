"""Block-wise techniques on decoder blocks that no table ever knew."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")

BRIEF = {"num_iterations": 4, "progress": False}
EXPERTS = {
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}
PARALLEL = {"num_key_value_heads": 2, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Four batches of ids, [2, 24]."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (2, 24), generator=generator) for _ in range(4)]


def simulated(model: Any, batches: Any) -> Any:
    return aimet_ext.create_sim(model, batches[0], activations=None)


@pytest.mark.parametrize(
    "apply", [aimet_ext.apply_awq, aimet_ext.apply_smoothquant, aimet_ext.apply_omniquant]
)
def test_experts_are_rescaled_with_their_router(tiny_model: Any, batches: Any, apply: Any) -> None:
    """The float function stays; experts' layers, their norm and the router have new weights."""
    model = tiny_model("mixtral", **EXPERTS)
    sim = simulated(model, batches)
    before = {name: value.clone() for name, value in sim.model.named_parameters()}
    brief = BRIEF if apply is aimet_ext.apply_omniquant else {"progress": False}
    report = apply(sim, batches, **brief)
    assert not report.refused_pairs
    with adapt(sim).disabled_quantizers(), torch.no_grad():
        float_logits = model(input_ids=batches[-1], use_cache=False).logits
        if apply is not aimet_ext.apply_omniquant or report.blocks[0].kept != "nearest":
            changed = {n for n, v in sim.model.named_parameters() if not torch.equal(v, before[n])}
            assert {"gate", "post_attention_layernorm"} <= {name.split(".")[-2] for name in changed}
        change = (sim.model(batches[-1]) - float_logits).abs().max() / float_logits.abs().max()
    assert change <= 1e-5
    assert sum(block.loss_after for block in report.blocks) > 0


def with_an_idle_expert(tiny_model: Any) -> Any:
    model = tiny_model("mixtral", **EXPERTS)
    with torch.no_grad():
        router = model.model.layers[0].mlp.gate
        router.weight[:2] = router.weight[:1] * torch.tensor([[90.0], [-90.0]])
        router.weight[5] = router.weight[2:5].mean(0)  # never the best of these
    return model


def test_experts_without_tokens_keep_plain_rounding(
    tiny_model: Any, batches: Any, caplog: Any
) -> None:
    sim = simulated(with_an_idle_expert(tiny_model), batches)
    with caplog.at_level(logging.WARNING):
        report = aimet_ext.apply_awq(sim, batches[:1], progress=False)
    assert "no token of the batches is sent to" in caplog.text
    assert "layers.0.mlp.experts.down_proj.5" in caplog.text
    assert all(block.loss_after <= block.loss_nearest for block in report.blocks)


@pytest.mark.parametrize("name", ["autoround", "omniquant"])
def test_experts_without_tokens_are_decided_on_those_of_all(
    tiny_model: Any, batches: Any, caplog: Any, name: str
) -> None:
    """Their error on what the others get is lower than that of plain rounding."""
    model = with_an_idle_expert(tiny_model)
    sims = [simulated(model, batches) for _ in range(3)]
    original, ours, plain = sims
    aimet_ext.apply_rtn(plain, progress=False)
    with caplog.at_level(logging.WARNING):
        settings = {"let": False} if name == "omniquant" else {}
        getattr(aimet_ext, f"apply_{name}")(ours, batches[:1], **settings, **BRIEF)
    assert "no token of the batches" not in caplog.text
    experts = "model.model.layers.0.mlp.experts"
    seen: list[Tensor] = []
    with torch.no_grad(), adapt(original).disabled_quantizers():
        holder = original.model.get_submodule(experts)
        hook = holder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        original.model(batches[-1])
        hook.remove()
    layer = f"{experts}.gate_up_proj.5"
    every = [sim.model.get_submodule(layer) for sim in sims]
    with torch.no_grad():
        weights = [m.param_quantizers["weight"](m.weight) for m in every[1:]]
        lost = [float((seen[0] @ (w - every[0].weight).T).square().sum()) for w in weights]
    assert lost[0] < lost[1]


def test_omniquant_does_not_fit_an_expert_to_few_tokens(tiny_model: Any, batches: Any) -> None:
    """On tokens that come later the layers of experts have lower errors than plain rounding's."""
    model = tiny_model("mixtral", **EXPERTS)
    sims = [simulated(model, batches) for _ in range(3)]
    original, ours, plain = sims
    aimet_ext.apply_rtn(plain, progress=False)
    few = batches[0][:1, :12]  # four tokens an expert, of 64 inputs
    aimet_ext.apply_omniquant(ours, [few], let=False, num_iterations=40, progress=False)
    layers = {n: m for n, m in original.model.named_modules() if ".experts.gate_up_proj." in n}
    ratios = []
    for name, layer in layers.items():
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, args, kept=seen: kept.append(args[0]))
        with torch.no_grad(), adapt(original).disabled_quantizers():
            original.model(torch.cat(batches[1:]))
        hook.remove()
        if not seen:
            continue
        others = [sim.model.get_submodule(name) for sim in (ours, plain)]
        with torch.no_grad():
            lost = [
                (seen[0] @ (m.param_quantizers["weight"](m.weight) - layer.weight).T).square().sum()
                for m in others
            ]
        ratios.append(float((lost[0] / lost[1]).log()))
    assert len(ratios) >= 4 and sum(ratios) < 0


STREAMS = {
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "altup_num_inputs": 3,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
}


@pytest.fixture(scope="module")
def of_streams(tiny_model: Any) -> Any:
    """A Gemma 3n, whose blocks pass on hidden states [streams, batch, seq, hidden]."""
    model = tiny_model("gemma3n_text", **STREAMS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif not bool(parameter.any()):
                parameter.fill_(0.1)
    return model


@pytest.mark.parametrize("name", ["omniquant", "awq", "smoothquant", "autoround"])
def test_blocks_may_pass_several_streams_on(of_streams: Any, batches: Any, name: str) -> None:
    """Sequences are minibatches whatever axis they lie on, and the float function stays."""
    sim = simulated(of_streams, batches)
    settings = {"batch_size": 1, **BRIEF} if name in ("omniquant", "autoround") else {}
    report = getattr(aimet_ext, f"apply_{name}")(sim, batches, **settings)
    assert len(report.blocks) == 2
    if name != "smoothquant":  # which judges nothing
        assert all(block.loss_after < block.loss_nearest for block in report.blocks)
    if name == "autoround":
        return  # it rounds weights
    with adapt(sim).disabled_quantizers(), torch.no_grad():
        wanted = of_streams(input_ids=batches[-1], use_cache=False).logits
        change = (sim.model(batches[-1]) - wanted).abs().max() / wanted.abs().max()
    assert change <= 1e-5


@pytest.mark.parametrize("name", ["omniquant", "awq"])
def test_padding_counts_in_no_stream(of_streams: Any, batches: Any, name: str) -> None:
    """Ids behind the mask change nothing that is decided."""
    mask = torch.ones_like(batches[0])
    mask[1, 16:] = 0
    settings = BRIEF if name == "omniquant" else {"progress": False}

    def decided(ids: Tensor) -> dict[str, Tensor]:
        sim = simulated(of_streams, batches)
        data = [{"input_ids": ids, "attention_mask": mask}]
        getattr(aimet_ext, f"apply_{name}")(sim, data, **settings)
        return {n: p.detach().clone() for n, p in sim.model.named_parameters()}

    one = decided(batches[0])
    other = decided(torch.where(mask == 1, batches[0], 5))
    for name_, value in one.items():
        torch.testing.assert_close(other[name_], value, rtol=1e-3, atol=1e-4)


def test_parallel_attention_and_mlp(tiny_model: Any, batches: Any) -> None:
    """One norm that both read; the two that are left out are named."""
    sim = simulated(tiny_model("cohere", **PARALLEL), batches)
    report = aimet_ext.apply_omniquant(sim, batches, **BRIEF)
    assert set(report.refused_pairs) == {"norm_mlp"}
    assert all(block.loss_after < block.loss_nearest for block in report.blocks)


def test_a_pair_that_does_not_hold_is_left_out(tiny_model: Any, batches: Any, caplog: Any) -> None:
    """Cohere's rotary embeddings turn neighbours: scales tied over half a head are none."""
    sim = simulated(tiny_model("cohere", **PARALLEL), batches)
    with caplog.at_level(logging.WARNING):
        report = aimet_ext.apply_omniquant(sim, batches, pairs=("v_o", "q_k"), **BRIEF)
    assert set(report.refused_pairs) == {"q_k"}
    reason = report.refused_pairs["q_k"]
    assert reason.startswith("model.model.layers.0: q_proj->k_proj")
    assert "max|change|" in reason
    assert reason in caplog.text
    assert all(block.loss_after < block.loss_nearest for block in report.blocks)
