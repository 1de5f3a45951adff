"""OmniQuant leaves the float function alone, and deploys exactly what it optimised."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext import LPBQ, Blockwise, PerChannel, PerTensor, QSpec
from aimet_ext.core.affine import fake_quantize
from aimet_ext.core.equivalence import expand, transform
from aimet_ext.models.proof import Float64Casts
from aimet_ext.models.topology import find_blocks
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")

KINDS = ("norm_qkv", "v_o", "norm_mlp", "up_down", "q_k")
FAMILIES = {
    "llama": KINDS,
    "qwen2": KINDS,
    "qwen3": KINDS[:4],
    "mistral": KINDS,
}
#: Large steps on a coarse grid that all rows share, so that every scale moves, the q-k one too.
BOLD = {
    "num_iterations": 20,
    "init": "ones",
    "search_sweeps": 0,
    "let_lr": 0.03,
    "lr_schedule": "constant",
    "evaluations": 20,
    "pairs": KINDS,
    "progress": False,
}


@pytest.fixture(scope="module", params=FAMILIES)
def folded(request: Any, make_sim: Any, tiny_model: Any, ids: Callable[..., Tensor]) -> Any:
    """A family, its original model, and its sim after OmniQuant with every kind of pair."""
    sim = make_sim(request.param, QSpec(bitwidth=3, granularity=PerTensor()))
    report = aimet_ext.apply_omniquant(sim, [ids(4, 24, 1)], **BOLD)
    original = tiny_model(request.param, max_position_embeddings=64)
    return request.param, original, sim, report


def test_all_kinds_of_pairs_were_folded(folded: Any) -> None:
    family, _, sim, report = folded
    trained = {block.name for block in report.blocks if block.kept == "training"}
    assert trained
    entries = sim.aimet_ext_ledger.entries
    assert {(entry.block, entry.kind) for entry in entries} == {
        (block.name, kind) for block in report.blocks for kind in FAMILIES[family]
    }
    assert list(report.refused_pairs) == [k for k in KINDS if k not in FAMILIES[family]]
    for entry in (entry for entry in entries if entry.block in trained):
        moved = entry.sides[-1].factor
        assert float((moved - 1).abs().max()) > 0.01, entry.pair
        assert len(moved.unique()) > 4, entry.pair


def test_the_float_function_in_float32(folded: Any, ids: Callable[..., Tensor]) -> None:
    """max|change| / max|logits| <= 1e-5, in the user's module as it is."""
    _, original, sim, _ = folded
    batch = ids(3, 32, 7)
    mask = torch.ones_like(batch)
    mask[1, 25:] = 0
    with torch.no_grad(), adapt(sim).disabled_quantizers():
        logits = sim.model(batch, mask)
        reference = original(batch, attention_mask=mask, use_cache=False).logits
    change = (logits - reference)[mask.bool()].abs().max()
    assert float(change / reference[mask.bool()].abs().max()) <= 1e-5


def test_the_float_function_in_float64(folded: Any, ids: Callable[..., Tensor]) -> None:
    """The learnt scales, folded in float64 into the original weights: at most 1e-10."""
    _, original, sim, _ = folded
    double = copy.deepcopy(original).double()
    entries = sim.aimet_ext_ledger.entries
    with torch.no_grad():
        for block in find_blocks(double):
            params = dict(double.get_submodule(block.name).named_parameters())
            pairs = {pair.name: pair for pair in block.pairs}
            chosen = []
            for entry in entries:
                if entry.block.endswith(block.name):
                    pair = pairs[entry.pair]
                    chosen.append((pair, learnt_scale(pair, entry)))
            assert chosen
            for name, value in transform(params, chosen).items():
                params[name].copy_(value)
    batch = ids(2, 32, 7)
    with torch.no_grad(), Float64Casts():
        reference = copy.deepcopy(original).double()(batch, use_cache=False).logits
        logits = double(batch, use_cache=False).logits
    assert logits.dtype == torch.float64
    assert float((logits - reference).abs().max() / reference.abs().max()) <= 1e-10
    with torch.no_grad(), Float64Casts():  # the test can fail
        layer = double.get_submodule("model.layers.1.self_attn.o_proj")
        layer.weight[:, 3] *= 1 + 1e-6
        changed = double(batch, use_cache=False).logits
    assert float((changed - reference).abs().max() / reference.abs().max()) > 1e-10


def learnt_scale(pair: Any, entry: Any) -> Tensor:
    """The scale of a pair ``[size]`` in float64, from the multipliers in the ledger."""
    scale = torch.zeros(pair.size, dtype=torch.float64)
    number = next(i for i, side in enumerate(pair.sides) if side.power == 1)
    side, multiplier = pair.sides[number], entry.sides[number].factor.double()
    assert side.rows is None or side.rows == (0, len(multiplier))
    index = torch.arange(pair.size) if side.index is None else side.index
    scale[index] = multiplier
    assert bool((scale > 0).all())
    for side, kept in zip(pair.sides, entry.sides, strict=True):
        expected = expand(side, scale, len(kept.factor))
        torch.testing.assert_close(kept.factor.double(), expected, rtol=1e-6, atol=0)
    return scale


def test_cumulative_scales_make_the_weights(folded: Any) -> None:
    """W' = diag(output) W diag(input), biases and gains likewise, to float32."""
    _, original, sim, _ = folded
    weights = dict(original.named_parameters())
    scaled = sim.aimet_ext_ledger.cumulative(lambda name: name.removeprefix("model."))
    assert len(scaled) >= 2 * 8
    checked = set()
    for module, axes in scaled.items():
        for kind in ("weight", "bias"):
            name = f"{module}.{kind}"
            if name not in weights:
                continue
            expected = weights[name].detach().double()
            rows = axes.get("output", torch.ones(len(expected))).double()
            expected = expected * rows.view(-1, *[1] * (expected.dim() - 1))
            if "input" in axes and kind == "weight":
                expected = expected * axes["input"].double()
            found = sim.model.get_parameter(f"model.{name}").double()
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9)
            checked.add(name)
    for name, weight in weights.items():
        if name not in checked:
            assert torch.equal(sim.model.get_parameter(f"model.{name}"), weight), name


def grids() -> list[Any]:
    found = []
    for granularity in (PerTensor(), PerChannel(), Blockwise(16), LPBQ(16, 4)):
        for bits in (2, 3, 4, 8):
            for symmetric in (True, False):
                if symmetric or not isinstance(granularity, LPBQ):
                    spec = QSpec(bitwidth=bits, symmetric=symmetric, granularity=granularity)
                    kind = "symmetric" if symmetric else "asymmetric"
                    name = f"{type(granularity).__name__}-{bits}-{kind}"
                    found.append(pytest.param(spec, torch.float32, id=name))
    for granularity in (PerTensor(), PerChannel(), Blockwise(16), LPBQ(16, 4)):
        spec = QSpec(bitwidth=4, granularity=granularity)
        found.append(pytest.param(spec, torch.bfloat16, id=f"{type(granularity).__name__}-bf16"))
    return found


def mean_square(outputs: list[Tensor], targets: list[Tensor]) -> float:
    errors = [
        (o.float() - t.float()).square().flatten() for o, t in zip(outputs, targets, strict=True)
    ]
    return float(torch.cat(errors).double().mean())


@pytest.mark.parametrize(("spec", "dtype"), grids())
def test_what_is_optimised_is_deployed(
    make_sim: Any,
    tiny_model: Any,
    ids: Callable[..., Tensor],
    block_outputs: Any,
    spec: QSpec,
    dtype: torch.dtype,
) -> None:
    """The losses of the report are what the sim and its twin by plain rounding give."""
    sim = make_sim(spec=spec, layers=1, dtype=dtype)
    plain = copy.deepcopy(sim)
    batches = [ids(2, 16, 1), ids(3, 24, 2)]
    types = {name: type(module) for name, module in sim.model.named_modules()}
    sweeps = 1 if spec.bitwidth == 3 else 0
    report = aimet_ext.apply_omniquant(sim, batches, 2, search_sweeps=sweeps, progress=False)
    (block,) = report.blocks

    original = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=64).to(dtype)
    targets = block_outputs(original.model, 0, batches)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    after = mean_square(block_outputs(sim.model, 0, batches), targets)
    nearest = mean_square(block_outputs(plain.model, 0, batches), targets)
    assert block.loss_after == pytest.approx(after, rel=tolerance)
    assert block.loss_nearest == pytest.approx(nearest, rel=tolerance)
    assert block.loss_after <= block.loss_nearest
    if block.kept != "nearest":
        assert block.loss_after < block.loss_nearest

    assert types == {name: type(module) for name, module in sim.model.named_modules()}
    for name, quantizer in adapt(sim).weight_quantizers().items():
        assert quantizer.frozen, name
        assert quantizer.spec() == spec
        with torch.no_grad():
            deployed = quantizer.quantizer(quantizer.weight)
        assert torch.equal(deployed, fake_quantize(quantizer.weight.detach(), quantizer.grid()))
        if isinstance(spec.granularity, LPBQ):
            check_lpbq(quantizer, spec.granularity)


def check_lpbq(quantizer: Any, granularity: LPBQ) -> None:
    """Still AIMET's LPBQ: scales are integers times one float per row, the top one present."""
    assert type(quantizer.quantizer).__name__ == "GroupedBlockQuantizeDequantize"
    assert quantizer.quantizer.decompressed_bw == quantizer.bitwidth + granularity.scale_bits
    scale = quantizer.grid().scale
    top = 2**granularity.scale_bits
    unit = scale.amax(1, keepdim=True) / top
    integers = scale / unit
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
    assert bool((integers.round().amax(1) == top).all())
    assert bool((integers.round() >= 1).all())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_losses_of_later_blocks_are_of_the_quantized_stream(
    make_sim: Any, tiny_model: Any, ids: Callable[..., Tensor], block_outputs: Any, family: str
) -> None:
    """The second block gets what the first one, as deployed, gives; the target is all float."""
    sim = make_sim(family, QSpec(bitwidth=3))
    batches = [ids(2, 16, 1), ids(3, 24, 2)]
    report = aimet_ext.apply_omniquant(sim, batches, 3, search_sweeps=1, progress=False)
    original = tiny_model(family, max_position_embeddings=64).model
    for number, block in enumerate(report.blocks):
        outputs = block_outputs(sim.model, number, batches)
        loss = mean_square(outputs, block_outputs(original, number, batches))
        assert block.loss_after == pytest.approx(loss, rel=1e-4)
        assert block.loss_after < block.loss_nearest
        assert block.loss_after <= block.loss_before


def test_quantized_embeddings_feed_the_quantized_stream(
    make_sim: Any, tiny_model: Any, ids: Callable[..., Tensor], block_outputs: Any
) -> None:
    sim = make_sim(layers=1, embedding=QSpec(bitwidth=4))
    batches = [ids(2, 16, 1), ids(3, 24, 2)]
    report = aimet_ext.apply_omniquant(sim, batches, 2, search_sweeps=1, progress=False)
    original = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=64).model
    loss = mean_square(block_outputs(sim.model, 0, batches), block_outputs(original, 0, batches))
    assert report.blocks[0].loss_after == pytest.approx(loss, rel=1e-4)


def test_a_sim_made_by_hand(tiny_model: Any, ids: Callable[..., Tensor]) -> None:
    """AIMET's constructor, a wrapper of one's own, AIMET's default quantizers."""
    import aimet_torch

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.net = model

        def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            return self.net(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits

    def inputs(seed: int) -> tuple[Tensor, ...]:
        mask = torch.full((16, 16), -1e9).triu(1).expand(2, 1, 16, 16).contiguous()
        return ids(2, 16, seed), mask, torch.arange(16).expand(2, 16).contiguous()

    wrapped = Logits(tiny_model("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sim = aimet_torch.QuantizationSimModel(wrapped, inputs(0), default_param_bw=4)
    with torch.no_grad():
        reference = wrapped(*inputs(5))
    report = aimet_ext.apply_omniquant(sim, [inputs(1), inputs(2)], 2, progress=False)
    assert [block.name for block in report.blocks] == ["net.model.layers.0", "net.model.layers.1"]
    assert all(block.loss_after <= block.loss_nearest for block in report.blocks)
    with torch.no_grad(), adapt(sim).disabled_quantizers():
        logits = sim.model(*inputs(5))
    assert float((logits - reference).abs().max() / reference.abs().max()) <= 1e-5
    sim.compute_encodings(lambda model: model(*inputs(1)))
    assert torch.isfinite(sim.model(*inputs(5))).all()


#: An MLP as wide as the residual stream.
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
BRIEF = {"num_iterations": 2, "evaluations": 1, "search_sweeps": 1, "progress": False}


def test_a_model_in_float64(tiny_model: Any, ids: Callable[..., Tensor]) -> None:
    """It is decided as in float32, up to what float32 rounds."""
    reports = []
    for dtype in (torch.float32, torch.float64):
        model = tiny_model("llama", **SMALL).to(dtype)
        spec = QSpec(bitwidth=3, symmetric=False)
        sim = aimet_ext.create_sim(model, ids(1, 8, 1), weights=spec, activations=None)
        reports.append(aimet_ext.apply_omniquant(sim, [ids(2, 16, 1)], **BRIEF))
        assert sim.model(ids(1, 8, 1)).dtype is dtype
    (narrow,), (wide,) = (report.blocks for report in reports)
    assert wide.loss_nearest == pytest.approx(narrow.loss_nearest, rel=1e-3)
    assert wide.loss_after < wide.loss_nearest
    assert wide.loss_after == pytest.approx(narrow.loss_after, rel=0.1)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        causal = torch.full_like(scores, -1e4).triu(1)
        return self.o((scores / 6 + causal).softmax(-1) @ self.v(x))


class _FlatBlock(nn.Module):
    def __init__(self, width: int, flat: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        tokens = x.flatten(0, 1) if self.flat else x  # as OPT does
        return x + self.down(torch.relu(self.up(self.norm2(tokens)))).view(x.shape)


class _FlatModel(nn.Module):
    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.blocks = nn.ModuleList([_FlatBlock(16, flat)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_layers_that_see_all_tokens_in_one_row() -> None:
    """A block decides the same whether or not its MLP flattens ``[batch, seq]``; padding too."""
    topology = aimet_ext.TopologyDescription(
        name="flat",
        block_class="_FlatBlock",
        attention_norm="norm1",
        mlp_norm="norm2",
        **{part: f"attention.{part}" for part in "qkvo"},
        gate=None,
        up="up",
        down="down",
    )
    ids = torch.arange(24).reshape(2, 12) * 5 % 64
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][0, 7:] = 0
    losses = []
    for flat in (True, False):
        torch.manual_seed(0)
        sim = aimet_ext.create_sim(_FlatModel(flat).eval(), ids, activations=None)
        (block,) = aimet_ext.apply_omniquant(sim, [batch], **BRIEF, topology=topology).blocks
        losses.append((block.loss_nearest, block.loss_after))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][1] < losses[0][0]


def test_scales_are_powers_of_two_where_a_block_amplifies_what_others_round() -> None:
    """Behind a delta rule: there scales of any size cost ten times the rounding of float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        head_dim=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    batches = list(torch.randint(3, 128, (6, 2, 32)))
    sim = aimet_ext.create_sim(model, batches[0], weights=QSpec(bitwidth=3), activations=None)
    report = aimet_ext.apply_omniquant(sim, batches[:4], num_iterations=4, progress=False)
    assert all(block.loss_after < block.loss_nearest for block in report.blocks)
    norms = [e for e in sim.aimet_ext_ledger.entries if e.pair.startswith("input_layernorm")]
    linear, full = (entry.sides[-1].factor for entry in norms)
    assert torch.equal(linear.log2(), linear.log2().round())
    assert len(linear.unique()) > 1
    assert len(full.unique()) > 32
    with torch.no_grad(), adapt(sim).disabled_quantizers():
        for batch in batches[4:]:
            wanted = model(input_ids=batch, use_cache=False).logits
            change = (sim.model(batch) - wanted).abs().max() / wanted.abs().max()
            assert float(change) <= 2e-6
