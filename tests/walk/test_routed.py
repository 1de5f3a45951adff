"""What flows into experts: the same tokens in both streams, counted with the mask of the batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from aimet_ext.walk.blocks import BlockWalk, find_stack
from aimet_ext.walk.routing import RoutedLayers, tokens_of
from aimet_ext.walk.walk import RerunWalk

WIDTH, WIDE, COUNT = 6, 8, 3
X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.ones(2, 7, dtype=torch.long)
MASK[1, 4:] = 0


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = self.layers(WIDTH, WIDE)
        self.down = self.layers(WIDE, WIDTH)

    @staticmethod
    def layers(width, outputs):
        made = [nn.Linear(width, outputs) for _ in range(COUNT)]
        return RoutedLayers(made, transposed=False)

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            column, tokens = tokens_of(number, chosen)
            if len(tokens):
                made = down(functional.silu(up(hidden[tokens])))
                out.index_add_(0, tokens, made * weights[tokens, column, None])
        return out


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, COUNT, bias=False)
        self.experts = Experts()

    def forward(self, x, attention_mask=None):
        x = x + self.mix(x)
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        return x + self.experts(flat, chosen, weights).view_as(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().double().eval()


def walk_of(kind, model, layers, batches, **settings):
    if kind is BlockWalk:
        return BlockWalk(model, find_stack(model, layers), batches, layers, **settings)
    return RerunWalk(model, batches, layers, **settings)


def layers_of(model):
    """All but the routers, which AIMET leaves float."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if "router" not in name]


@torch.no_grad()
def reached(model, place):
    """What an experts' module of a model is called with."""
    calls = []
    module = model.layers[place].experts
    with module.register_forward_pre_hook(lambda _, args: calls.append(args)):
        model(X)
    return calls[0]


@pytest.mark.parametrize("kind", [BlockWalk, RerunWalk])
@pytest.mark.parametrize("streams", ["quantized", "float", "both"])
def test_tokens_of_experts(model, kind, streams):
    """The quantized stream says which tokens; what they are in float is their float input."""
    quantized, original = copy.deepcopy(model), copy.deepcopy(model)
    walk = walk_of(
        kind, model, layers_of(model), [{"x": X, "attention_mask": MASK}], streams=streams
    )
    seen = set()
    for stage in walk.stages():
        ((own, plain, mask),) = stage.batches()
        (name, *_) = stage.layers
        seen.update(stage.layers)
        if "experts" in name:
            place, part, number = (int(name[7]), *name.split(".")[-2:])
            first = quantized if streams != "float" else original
            chosen = reached(first, place)[1]
            tokens = tokens_of(int(number), chosen)[1]
            assert torch.equal(mask, MASK.flatten().bool()[tokens])
            for stream, found in ((quantized, own), (original, plain)):
                if found is not None:
                    x = reached(stream, place)[0][tokens]
                    if part == "down":
                        up = stream.layers[place].experts.up[int(number)]
                        x = functional.silu(functional.linear(x, up.weight, up.bias))
                    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
        for layer in stage.layers:
            rounded = (model.get_submodule(layer).weight.detach() * 4).round() / 4
            walk.hold(layer)
            walk.decide(layer, rounded)
            quantized.get_submodule(layer).weight.data = rounded
    walk.close()
    assert seen == set(layers_of(model))
    if streams == "both":
        differ = reached(quantized, 1)[1] != reached(original, 1)[1]
        assert differ.any()  # the case is of use


@pytest.mark.parametrize("kind", [BlockWalk, RerunWalk])
def test_an_expert_that_no_token_reaches(model, kind):
    with torch.no_grad():
        one = model.layers[0].router.weight[0].clone()
        model.layers[0].router.weight.copy_(torch.stack([one, -one, 0 * one]))
        model.layers[0].mix.weight.zero_()
        model.layers[0].mix.bias.copy_(one * 1e3)
    X_ = X * 1e-3
    walk = walk_of(kind, model, layers_of(model), [X_])
    counts = {}
    for stage in walk.stages():
        for layer in stage.layers:
            counts[layer] = sum(len(x) for x, _, _ in stage.batches())
            walk.decide(layer, model.get_submodule(layer).weight.detach())
    walk.close()
    # Of these routers' three scores, the second is the lowest for every token.
    assert counts.get("layers.0.experts.up.1", 0) == counts.get("layers.0.experts.down.1", 0) == 0
    assert counts["layers.0.experts.up.0"] == X[..., 0].numel()
    assert counts.keys() == set(layers_of(model))


def test_calls_of_experts_are_kept(model):
    """A block runs once up to its experts, however many these are, and not for each of them."""
    layers = layers_of(model)
    walk = walk_of(BlockWalk, model, layers, [X])
    for stage in walk.stages():
        list(stage.batches())
        for layer in stage.layers:
            walk.decide(layer, model.get_submodule(layer).weight.detach())
    walk.close()
    # For each block: a look, the first layer, the experts' call; and the way on to the next one.
    assert walk.cost["block_calls"] <= 2 * 4


class Groups(Experts):
    """The same experts, called with the tokens of each."""

    def forward(self, hidden, chosen=None, weights=None):
        if chosen is None:
            hidden, chosen, weights = self.routing(hidden)
        return super().forward(hidden, chosen, weights)

    def routing(self, hidden):
        owner = torch.arange(COUNT).repeat_interleave(len(hidden) // COUNT)
        chosen = torch.where(hidden.any(-1), owner, -1)[:, None]
        return hidden, chosen, torch.ones_like(chosen).to(hidden)


class Grouped(Block):
    def __init__(self):
        super().__init__()
        self.experts = Groups()

    def forward(self, x, attention_mask=None):
        x = x + self.mix(x)
        flat = x.flatten(0, 1)
        chosen = self.router(flat).argmax(-1)
        groups = [flat * (chosen == number)[:, None] for number in range(COUNT)]
        made = self.experts(torch.cat(groups)).unflatten(0, (COUNT, -1)).sum(0)
        return x + made.view_as(x)


@pytest.mark.parametrize("kind", [BlockWalk, RerunWalk])
def test_tokens_of_experts_in_groups(kind):
    """Where the float stream sends a token elsewhere, it counts without an error of inputs."""
    torch.manual_seed(0)
    model = Model().double().eval()
    model.layers = nn.ModuleList(Grouped() for _ in range(2)).double()
    original, quantized = copy.deepcopy(model), copy.deepcopy(model)
    batches = [{"x": X, "attention_mask": MASK}]
    walk = walk_of(kind, model, layers_of(model), batches, streams="both")
    elsewhere = 0
    for stage in walk.stages():
        ((own, plain, mask),) = stage.batches()
        if stage.layers[0].endswith(("up.0", "up.1", "up.2")) and "layers.1" in stage.layers[0]:
            number = int(stage.layers[0][-1])
            rows, others = (
                reached(m, 1)[0].unflatten(0, (COUNT, -1))[number] for m in (quantized, original)
            )
            sent = rows.any(-1)
            torch.testing.assert_close(own, rows[sent], rtol=1e-12, atol=1e-12)
            known = others.any(-1)[sent]
            torch.testing.assert_close(plain[known], others[sent][known], rtol=1e-12, atol=1e-12)
            assert torch.equal(plain[~known], own[~known])
            assert torch.equal(mask, MASK.flatten().bool()[sent])
            elsewhere += int((~known).sum())
        for layer in stage.layers:
            rounded = (model.get_submodule(layer).weight.detach() * 4).round() / 4
            walk.hold(layer)
            walk.decide(layer, rounded)
            quantized.get_submodule(layer).weight.data = rounded
    walk.close()
    assert elsewhere  # the case is of use
