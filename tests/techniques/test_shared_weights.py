"""Blocks that share layers, as those of Zamba2 do, beside layers of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blockwise_reference import block_losses
from torch import Tensor, nn

import aimet_ext

pytest.importorskip("aimet_torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # AIMET uses what torch and AIMET deprecated

BLOCKS, WIDTH = 3, 12
MIX = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) * 0.3
BLOCKWISE = {
    "omniquant": {"num_iterations": 20, "batch_size": 2},
    "autoround": {"num_iterations": 20},
}


class Block(nn.Module):
    """A layer of all blocks, with the adapter of this one among those of all."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.norm = nn.LayerNorm(WIDTH)
        self.core = nn.Linear(WIDTH, WIDTH)
        self.adapters = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.norm(hidden_states)
        x = self.core(x) + self.adapters[self.number](x)
        return hidden_states + self.out(torch.tanh(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(number) for number in range(BLOCKS))
        first, *others = self.blocks
        for block in others:
            block.core.weight = first.core.weight
            for ours, theirs in zip(block.adapters, first.adapters, strict=True):
                ours.weight = theirs.weight
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def data(*seeds: int) -> list[Tensor]:
    """Sequences whose tokens resemble each other, ``[batch, seq, width]`` each."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.randn(4, 10, WIDTH, generator=g).cumsum(1) @ MIX / 2 for g in generators]


DATA, HELD_OUT = data(*range(6)), data(*range(100, 104))


@torch.no_grad()
def error(sim: Any, model: nn.Module) -> float:
    return float(sum((sim.model(x) - model(x)).square().sum() for x in HELD_OUT))


def simulated(model: nn.Module, bits: int = 4) -> Any:
    weights = aimet_ext.QSpec(bitwidth=bits)
    return aimet_ext.create_sim(model, DATA[0], weights=weights, lm_head=weights, activations=None)


@pytest.mark.parametrize("name", ["gptq", "seq_mse", "adaround"])
def test_layers_are_decided_on_the_inputs_of_all_blocks(name: str) -> None:
    model = Model().eval()
    sim = simulated(model)
    plain = error(sim, model)
    settings = {"num_iterations": 50} if name == "adaround" else {}
    report = getattr(aimet_ext, f"apply_{name}")(sim, DATA, progress=False, **settings)
    tokens = sum(x[..., 0].numel() for x in DATA)
    seen = {layer.name: layer.tokens for layer in report.layers}
    own = [f"blocks.{n}.{layer}" for n in range(BLOCKS) for layer in (f"adapters.{n}", "out")]
    assert seen == {"blocks.0.core": BLOCKS * tokens, **dict.fromkeys([*own, "head"], tokens)}
    assert "shares its weight" in report.cost["reason"]
    assert error(sim, model) < plain


def test_weights_of_tokens_count_alike_there() -> None:
    sims = [simulated(Model().eval()) for _ in range(2)]
    for sim, weights in zip(sims, ("none", "loss"), strict=True):
        aimet_ext.apply_gptq(sim, DATA, token_weights=weights, progress=False)
    ours, theirs = (dict(sim.model.named_parameters()) for sim in sims)
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert "blocks.0.core.weight" in same and "head.weight" not in same


@pytest.mark.parametrize("name", BLOCKWISE)
def test_what_blocks_are_decided_by_is_what_they_compute_then(name: str) -> None:
    """A shared layer is decided with its first block; later ones aim at the float model still."""
    model = Model().eval()
    sim = simulated(model, 3)
    plain = error(sim, model)
    report = getattr(aimet_ext, f"apply_{name}")(sim, DATA, progress=False, **BLOCKWISE[name])
    assert error(sim, model) < plain
    assert [block.loss_after for block in report.blocks] == pytest.approx(
        block_losses(sim, model, DATA), rel=1e-4
    )
    for block in sim.model.blocks:
        quantizer = block.core.param_quantizers["weight"]
        assert quantizer is sim.model.blocks[0].core.param_quantizers["weight"]
        assert not quantizer.is_overwrite_allowed()
        assert not block.adapters[block.number].param_quantizers["weight"].is_overwrite_allowed()


def test_a_failure_in_a_later_block_puts_the_shared_weight_back() -> None:
    sim = simulated(Model().eval())
    before = {name: value.clone() for name, value in sim.model.named_parameters()}

    def fail(block: Any, args: Any, output: Any) -> None:
        if not torch.equal(block.core.weight, before["blocks.0.core.weight"]):
            raise OSError("the shared weight has changed")

    sim.model.blocks[2].register_forward_hook(fail)
    with pytest.raises(OSError, match="has changed"):
        aimet_ext.apply_autoround(sim, DATA, progress=False, **BLOCKWISE["autoround"])
    after = dict(sim.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Any) -> None:
    settings = {**BLOCKWISE["autoround"], "checkpoint_dir": tmp_path, "progress": False}
    whole, resumed = (simulated(Model().eval()) for _ in range(2))
    aimet_ext.apply_autoround(whole, DATA, **settings)
    sorted(tmp_path.rglob("*2*.safetensors"))[-1].unlink()
    report = aimet_ext.apply_autoround(resumed, DATA, **settings)
    assert [block.resumed for block in report.blocks] == [True, True, False]
    ours, theirs = (dict(sim.model.named_parameters()) for sim in (whole, resumed))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_export_is_read_back_bit_by_bit(tmp_path: Any) -> None:
    model = Model().eval()
    sim = aimet_ext.create_sim(model, DATA[0], activations=16)
    aimet_ext.apply_autoround(sim, DATA, progress=False, **BLOCKWISE["autoround"])
    sim.compute_encodings(lambda module: [module(x) for x in DATA])
    aimet_ext.export(sim, tmp_path / "out", "model", DATA[0], progress=False)
    again = aimet_ext.load(tmp_path / "out", sim=simulated(model), progress=False)
    with torch.no_grad():
        assert torch.equal(again.model(HELD_OUT[0]), sim.model(HELD_OUT[0]))


@pytest.mark.parametrize("name", ["gptq", *BLOCKWISE])
def test_zamba2_comes_closer_to_float_than_rounding(tiny_model: Any, name: str) -> None:
    """Adapters are decided with the blocks that call them, whichever weights they stand beside."""
    model = tiny_model(
        "zamba2",
        num_key_value_heads=4,
        tie_word_embeddings=True,
        head_dim=32,
        layers_block_type=["hybrid", "hybrid"],
        use_shared_attention_adapter=True,
        mamba_d_state=16,
        n_mamba_heads=8,
        chunk_size=16,
        adapter_rank=8,
    )
    generator = torch.Generator().manual_seed(1)
    *batches, held_out = torch.randint(3, 128, (5, 2, 24), generator=generator)
    sim = aimet_ext.create_sim(model, batches[0], activations=None)
    with torch.no_grad():
        wanted = model(held_out, use_cache=False).logits
        plain = (sim.model(held_out) - wanted).square().sum()
        getattr(aimet_ext, f"apply_{name}")(
            sim, batches, progress=False, **({} if name == "gptq" else {"num_iterations": 10})
        )
        assert (sim.model(held_out) - wanted).square().sum() < plain
