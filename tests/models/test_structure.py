"""Blocks and scale pairs by what is seen in a run, against tables and in decoders of all kinds."""

import dataclasses

import pytest
import torch
from families_reference import FAMILIES
from torch import nn
from torch.nn import functional

from aimet_ext.core.equivalence import transform
from aimet_ext.models.linear_forms import find_linears
from aimet_ext.models.proof import Float64Casts, failing_pairs, probe, random_scale
from aimet_ext.models.topology import find_blocks, select_pairs

WIDTH, HEAD = 24, 6
CONFIGS = {"gemma3": "gemma3_text"}
SIDE = ("module", "axis", "power", "rows", "gain_offset")


def facts(block):
    """All that is known of a block, in values that compare."""
    found = dataclasses.asdict(dataclasses.replace(block, pairs=()))
    sides = lambda pair: [  # noqa: E731
        (
            *(getattr(side, key) for key in SIDE),
            None if side.index is None else side.index.tolist(),
        )
        for side in pair.sides
    ]
    found["pairs"] = [(pair.name, pair.kind, pair.size, sides(pair)) for pair in block.pairs]
    return found


@pytest.mark.parametrize("table", FAMILIES, ids=lambda table: table.name)
def test_what_is_seen_is_what_the_tables_said(tiny_model, table):
    """Names, kinds, rows, index maps, stages and reasons, of all 13 families."""
    heads = {"num_key_value_heads": 4} if table.name in ("gpt2", "opt") else {}
    model = tiny_model(CONFIGS.get(table.name, table.name), **heads)
    for name, layer in find_linears(model, lambda _: False).items():  # GPT-2's Conv1D
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, layer)
    expected = find_blocks(model, table)
    assert len(expected) == 2
    assert list(map(facts, find_blocks(model))) == list(map(facts, expected))


# ---- decoders of all kinds -----------------------------------------------------------------------


class Norm(nn.Module):
    """An RMS norm."""

    def __init__(self, width, offset=0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(width) + 0.5 - offset), offset

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (self.weight + self.offset)


def bare_norm(x):
    return functional.layer_norm(x, x.shape[-1:])


def attend(q, k, v):
    """Attention of [batch, seq, heads, d]; query heads share key heads."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v))
    v = v.repeat_interleave(groups, 1)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, heads=4, kv=2, d=HEAD, fused=None):
        super().__init__()
        self.sizes, self.fused = (heads, kv, d), fused
        if fused:
            self.mix = nn.Linear(WIDTH, (heads + 2 * kv) * d)
        else:
            self.wq = nn.Linear(WIDTH, heads * d)
            self.wk, self.wv = nn.Linear(WIDTH, kv * d), nn.Linear(WIDTH, kv * d)
        self.out = nn.Linear(heads * d, WIDTH)

    def forward(self, x):
        heads, kv, d = self.sizes
        if self.fused == "by group":  # [kv][queries of the group, key, value][d]
            y = self.mix(x).unflatten(-1, (kv, heads // kv + 2, d))
            q, k, v = y[..., :-2, :].flatten(2, 3), y[..., -2, :], y[..., -1, :]
        elif self.fused:
            sizes = (heads * d, kv * d, kv * d)
            q, k, v = (part.unflatten(-1, (-1, d)) for part in self.mix(x).split(sizes, -1))
        else:
            q, k, v = (f(x).unflatten(-1, (-1, d)) for f in (self.wq, self.wk, self.wv))
        return self.out(attend(q, k, v))


class Mlp(nn.Module):
    def __init__(self, kind="gated"):
        super().__init__()
        self.kind = kind
        self.a = nn.Linear(WIDTH, 40 * (2 if kind in ("packed", "woven") else 1))
        if kind in ("gated", "bilinear"):
            self.b = nn.Linear(WIDTH, 40)
        self.c = nn.Linear(40, WIDTH)

    def forward(self, x):
        a = self.a(x)
        if self.kind == "squared":
            return self.c(functional.relu(a).square())
        if self.kind == "relu":
            return self.c(functional.relu(a))
        if self.kind == "packed":
            gate, up = a.chunk(2, -1)
        elif self.kind == "woven":
            gate, up = a[..., ::2], a[..., 1::2]
        else:
            gate, up = a, self.b(x)
        return self.c((gate if self.kind == "bilinear" else functional.silu(gate)) * up)


class Experts(nn.Module):
    """A router and experts that compute the tokens sent to them."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.each = nn.ModuleList([Mlp() for _ in range(3)])

    def forward(self, x):
        flat = x.flatten(0, 1)
        shares, chosen = self.router(flat).softmax(-1).topk(1)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.each):
            tokens = (chosen == number).nonzero()[:, 0]
            if len(tokens):
                total[tokens] += expert(flat[tokens]) * shares[tokens]
        return total.view_as(x)


class Conv(nn.Module):
    """A gated short convolution over time."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)

    def forward(self, x):
        b, c, x = self.into(x).chunk(3, -1)
        seq = x.shape[1]
        return self.out(c * self.conv((b * x).transpose(1, 2))[..., :seq].transpose(1, 2))


class Block(nn.Module):
    """Two norms, what mixes tokens and what does not, added one by one or at once."""

    def __init__(self, norms, mixer, mlp, *, parallel=False, sandwich=False, shared=False):
        super().__init__()
        self.one, self.two = norms()
        self.mixer, self.mlp = mixer(), mlp()
        self.parallel, self.shared = parallel, shared
        self.after = nn.LayerNorm(WIDTH) if sandwich else None

    def forward(self, x):
        read = self.one(x)
        if self.shared:  # what is normalised goes on
            return read + self.mixer(read) + self.mlp(self.two(x))
        if self.parallel:
            return x + self.mixer(read) + self.mlp(read)
        x = x + self.mixer(read)
        y = self.mlp(self.two(x))
        return x + (y if self.after is None else self.after(y))


class Decoder(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(32, WIDTH), nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rms(offset=0.0):
    return lambda: (Norm(WIDTH, offset), Norm(WIDTH, offset))


def layer_norms():
    return nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)


class Bare(nn.Module):
    def forward(self, x):
        return bare_norm(x)


DECODERS = {
    "sequential": (lambda: Block(rms(), Attention, Mlp), "norm_qkv v_o norm_mlp up_down"),
    "gain of 1 + weight": (
        lambda: Block(rms(1.0), Attention, Mlp),
        "norm_qkv v_o norm_mlp up_down",
    ),
    "biased norms": (lambda: Block(layer_norms, Attention, Mlp), "norm_qkv v_o norm_mlp up_down"),
    "parallel": (lambda: Block(rms(), Attention, Mlp, parallel=True), "norm_qkv v_o up_down"),
    "fused": (
        lambda: Block(rms(), lambda: Attention(fused="rows"), lambda: Mlp("packed")),
        "norm_qkv v_o norm_mlp up_down",
    ),
    "woven": (
        lambda: Block(rms(), lambda: Attention(fused="by group"), lambda: Mlp("woven")),
        "norm_qkv v_o norm_mlp up_down",
    ),
    "odd heads": (
        lambda: Block(rms(), lambda: Attention(heads=6, kv=2, d=5), Mlp),
        "norm_qkv v_o norm_mlp up_down",
    ),
    "one value head": (
        lambda: Block(rms(), lambda: Attention(heads=4, kv=1, d=7), Mlp),
        "norm_qkv v_o norm_mlp up_down",
    ),
    "squared": (lambda: Block(rms(), Attention, lambda: Mlp("squared")), "norm_qkv v_o norm_mlp"),
    "relu": (lambda: Block(rms(), Attention, lambda: Mlp("relu")), "norm_qkv v_o norm_mlp"),
    "bilinear": (
        lambda: Block(rms(), Attention, lambda: Mlp("bilinear")),
        "norm_qkv v_o norm_mlp up_down",
    ),
    "sandwich": (
        lambda: Block(rms(), Attention, Mlp, sandwich=True),
        "norm_qkv v_o norm_mlp up_down",
    ),
    "no gains": (lambda: Block(lambda: (Bare(), Bare()), Attention, Mlp), "v_o up_down"),
    "normed stream": (
        lambda: Block(rms(), Attention, Mlp, shared=True),
        "v_o norm_mlp up_down",
    ),
    "convolution": (lambda: Block(rms(), Conv, Mlp), "norm_qkv v_o norm_mlp up_down"),
    "experts": (
        lambda: Block(rms(), Attention, Experts),
        "norm_qkv v_o norm_mlp up_down up_down up_down",
    ),
}


def decoder(*names):
    torch.manual_seed(0)
    return Decoder([DECODERS[name][0]() for name in names for _ in range(2)]).eval()


def batch(length=24):
    return torch.randint(0, 32, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def blocks_of(model):
    return find_blocks(model, run=lambda: model(batch()))


@pytest.mark.parametrize("name", DECODERS)
def test_every_pair_leaves_the_function_as_it_is(name):
    """All that can be proved is found, whatever its names; all at once on a longer text."""
    model = decoder(name)
    blocks = blocks_of(model)
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1"]
    kinds = [pair.kind for pair in blocks[0].pairs if pair.kind != "q_k"]
    assert kinds == DECODERS[name][1].split()
    values = {name: value.detach().double() for name, value in model.named_parameters()}
    changed = dict(values)
    for number, block in enumerate(blocks):
        prefix = f"{block.name}."
        own = {n.removeprefix(prefix): v for n, v in changed.items() if n.startswith(prefix)}
        scales = [(p, random_scale(p.size, number)) for p in block.pairs if p.kind != "q_k"]
        changed |= {prefix + n: v for n, v in transform(own, scales).items()}
    moved = [n for n in values if not torch.equal(values[n], changed[n])]
    assert len(moved) >= 2 * len(kinds)
    with Float64Casts(), torch.no_grad():
        before, after = (
            torch.func.functional_call(model, v, (batch(60),)) for v in (values, changed)
        )
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()


def test_layers_are_in_the_order_of_their_calls():
    (block, _) = blocks_of(decoder("parallel"))
    first = ("mixer.wq", "mixer.wk", "mixer.wv", "mlp.a", "mlp.b")
    assert block.stages == (first, ("mixer.out",), ("mlp.c",))
    assert [side.module for side in select_pairs(block, ["norm_qkv"])[0].sides] == ["one", *first]
    assert block.unavailable["norm_mlp"]


def test_rows_of_one_layer_have_the_scales_of_their_columns():
    """Values lie behind the queries and keys of each group, up between the rows of the gate."""
    (block, _) = blocks_of(decoder("woven"))
    values, output = select_pairs(block, ["v_o"])[0].sides
    assert values.rows == (18, 48)
    entries = values.index.tolist()
    assert entries == [*range(6), *[-1] * 18, *range(6, 12)]
    assert output.index.view(4, 6).tolist() == [[*range(6)]] * 2 + [[*range(6, 12)]] * 2
    up, down = select_pairs(block, ["up_down"])[0].sides
    assert up.rows == (1, 80)
    assert up.index.tolist()[:3] == [0, -1, 1]
    assert down.index is None
    assert block.mlp is None


def test_a_gain_that_is_added_to_a_constant_is_told():
    (block, _) = blocks_of(decoder("gain of 1 + weight"))
    assert {pair.sides[0].gain_offset for pair in select_pairs(block, ["norm_qkv"])} == {1.0}


def test_a_norm_between_a_layer_and_the_hidden_states_is_told():
    (block, _) = blocks_of(decoder("sandwich"))
    assert block.between == ("after",)
    assert block.writers == ("mixer.out", "mlp.c")


def test_what_is_read_by_more_than_layers_is_left_out_with_the_reason():
    (block, _) = blocks_of(decoder("normed stream"))
    assert block.unavailable["norm_qkv"].startswith("one is read by more than layers")
    (block, _) = blocks_of(decoder("squared"))
    assert block.unavailable["up_down"].startswith("mlp.a goes through the activation")


def test_routers_and_all_experts_read_their_norm():
    (block, _) = blocks_of(decoder("experts"))
    (norm,) = select_pairs(block, ["norm_mlp"])
    inner = [f"mlp.each.{number}.{layer}" for number in range(3) for layer in "ab"]
    assert [side.module for side in norm.sides] == ["two", "mlp.router", *inner]
    assert len({pair.name for pair in block.pairs}) == len(block.pairs)


def test_experts_that_no_token_reached_are_no_silent_readers():
    model = decoder("experts")
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.bias[2] = -1e3
    (block, _) = blocks_of(model)
    assert "mlp.each.2.a" in block.unavailable["norm_mlp"]
    assert not select_pairs(block, ["norm_mlp"])
    assert len(select_pairs(block, ["up_down"])) == 2
    assert "mlp.each.2.a" in block.linears


def test_blocks_of_several_kinds_have_each_what_is_found_in_them():
    model = decoder("sequential", "convolution", "no gains", "experts")
    blocks = blocks_of(model)
    kinds = [[p.kind for p in block.pairs if p.kind != "q_k"] for block in blocks]
    assert kinds[::2] == kinds[1::2]
    assert kinds[::2] == [
        DECODERS[name][1].split() for name in ("sequential", "convolution", "no gains", "experts")
    ]


def test_parameters_of_several_modules_are_scaled_by_nobody():
    model = decoder("sequential")
    model.blocks[1].mixer.wv = model.blocks[0].mixer.wv
    model.blocks[1].mixer.out.weight = model.blocks[0].mixer.out.weight
    for block in blocks_of(model):
        assert not select_pairs(block, ["v_o"])
        assert "mixer.out shares parameters" in block.unavailable["v_o"]


def test_a_block_that_cannot_be_looked_at_is_no_error():
    class Strange(Block):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.never = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return torch.from_numpy(super().forward(x).numpy())  # no gradient gets through

    torch.manual_seed(0)
    model = Decoder([Strange(rms(), Attention, Mlp) for _ in range(2)]).eval()
    (block, _) = blocks_of(model)
    assert not block.pairs
    assert "cannot be run one by one" in block.unavailable["v_o"]
    assert block.stages[0] == ("mixer.wq", "mixer.wk", "mixer.wv")
    assert block.linears[-1] == "mlp.c"


def test_a_model_that_random_ids_do_not_suit_has_blocks_without_pairs():
    class Odd(Decoder):
        def forward(self, ids, needed):
            return super().forward(ids)

    model = Odd([DECODERS["sequential"][0]() for _ in range(2)]).eval()
    found = find_blocks(model)
    assert [block.name for block in found] == ["blocks.0", "blocks.1"]
    assert not found[0].pairs
    assert "missing 1 required" in found[0].unavailable["v_o"]
    assert find_blocks(model, run=lambda: model(batch(), 1))[0].pairs


@pytest.mark.parametrize("name", ["sequential", "woven", "convolution"])
def test_a_wrong_map_is_rejected(name):
    """One column with its neighbour's scale, in every pair: the proof refuses each."""
    model = decoder(name)
    (block, _) = blocks_of(model)
    module = model.blocks[0]
    x = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(0))
    block_fn, params = probe(module, (x,), {}), dict(module.named_parameters())
    pairs = select_pairs(block, ["norm_qkv", "v_o", "norm_mlp", "up_down"])
    assert len(pairs) == 4
    assert not failing_pairs(block_fn, params, pairs)
    wrong = []
    for pair in pairs:
        *others, last = pair.sides
        index = torch.arange(pair.size) if last.index is None else last.index.clone()
        index[[0, 1]] = index[[1, 0]]
        wrong.append(
            dataclasses.replace(pair, sides=(*others, dataclasses.replace(last, index=index)))
        )
    assert len(failing_pairs(block_fn, params, wrong)) == 4
