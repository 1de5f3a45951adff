"""Walking a model that runs again for every stage: what is shared, skipped, counted, restored."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from aimet_ext.walk.walk import RerunWalk


class Attention(nn.Module):
    """Three layers that read one tensor, one of them of another kind, and one that reads a copy."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 2)
        self.conv = nn.Conv1d(4, 4, 1)
        self.copy = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        x = self.norm(x)
        scores = self.query(x) * self.key(x).sum(-1, keepdim=True)
        scores = scores + self.conv(x) + self.copy(x.clone())
        return self.out(input=scores)


def decide_all(walk, model):
    stages = []
    for stage in walk.stages():
        stages.append(stage.layers)
        for layer in stage.layers:
            walk.decide(layer, model.get_submodule(layer).weight)
    return stages


def test_layers_that_read_one_tensor_share_a_stage():
    """One tensor, not equal ones, and read in the same way."""
    model = Attention().eval()
    walk = RerunWalk(
        model, [torch.randn(4, 4)], ["out", "copy", "conv", "key", "query"], streams="both"
    )
    assert decide_all(walk, model) == [("query", "key"), ("conv",), ("copy",), ("out",)]


def test_some_layers_only():
    """Those of a part of the model; the others compute as they are."""
    model, batch = Attention().eval(), torch.randn(4, 4)
    walk = RerunWalk(model, [batch], ["key", "out"])
    assert walk.layers == ("key", "out")
    assert decide_all(walk, model) == [("key",), ("out",)]


def test_forward_passes_are_counted():
    """One to look, and for each stage one per batch and stream, which are one at the start."""
    model, calls = Attention().eval(), []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    walk = RerunWalk(model, [torch.randn(4, 4)] * 3, ["query", "out"], streams="both")
    expected = 1
    for stage, passes in zip(walk.stages(), (3, 6), strict=True):
        assert len(list(stage.batches())) == 3
        expected += passes
        assert walk.cost == {"walk": "rerun", "forward_passes": expected}
        for layer in stage.layers:
            walk.decide(layer, model.get_submodule(layer).weight)
    assert len(calls) == expected


def test_a_pass_ends_at_the_layer():
    """What comes behind it is not computed, nor does the user's code take the end for an error."""
    model, late, caught = Attention().eval(), [], []

    def forward_fn(model, batch):
        try:
            return model(batch["x"])
        except Exception as error:  # noqa: BLE001 - it is what is tested
            caught.append(error)

    walk = RerunWalk(model, [{"x": torch.randn(4, 4)}], ["query"], forward_fn=forward_fn)
    model.out.register_forward_hook(lambda *_: late.append(1))
    stage = next(walk.stages())
    assert len(list(stage.batches())) == 1
    assert not late
    assert not caught


def test_the_model_is_left_as_it_was():
    """Parameters, hooks and the batch, although a pass ends in the middle with other weights."""
    model, batch = Attention().eval(), torch.randn(4, 4)
    parameters, before = dict(model.named_parameters()), batch.clone()
    model.norm.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    weight = torch.randn(4, 4)
    walk = RerunWalk(model, [batch], ["out"], effective={"query": weight})
    next(next(walk.stages()).batches())
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert not any(torch.equal(value, weight) for value in model.parameters())
    assert torch.equal(batch, before)
    assert not model.out._forward_pre_hooks
    assert not model.query._forward_hooks


def test_a_tied_weight_changes_where_it_was_decided():
    """The other layer has a quantizer, and a decision, of its own."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).eval()
    model[1].weight = model[0].weight
    batch = torch.randn(2, 4)
    walk = RerunWalk(model, [batch], ["0", "1"])
    stages = walk.stages()
    next(stages)
    walk.decide("0", torch.eye(4))
    assert torch.equal(next(next(stages).batches())[0], batch)
    walk.decide("1", torch.eye(4))
    assert next(stages, None) is None


class Experts(nn.Module):
    """Each batch goes to one expert; the router looks at its sign."""

    def __init__(self):
        super().__init__()
        self.plus, self.minus, self.zero = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() == 0:
            return self.last(self.zero(x))
        return self.last(functional.relu(self.plus(x) if x.sum() > 0 else self.minus(x)))


def test_batches_may_take_different_ways():
    """A stage gives the batches that reach it; one that none reaches is an error."""
    model, batches = Experts().eval(), [torch.ones(2, 4), -torch.ones(2, 4), torch.ones(3, 4)]
    walk = RerunWalk(model, iter(batches), ["last", "minus", "plus"])
    seen = {}
    for stage in walk.stages():
        seen[stage.layers] = [len(x) for x, _, _ in stage.batches()]
        for layer in stage.layers:
            walk.decide(layer, model.get_submodule(layer).weight)
    assert seen == {("plus",): [2, 3], ("last",): [2, 2, 3], ("minus",): [2]}
    with pytest.raises(ValueError, match="never received data: zero;"):
        RerunWalk(model, batches, ["last", "zero"])


class Rectified(nn.Module):
    """A layer, the ReLU at hand behind modules that do nothing, and another layer."""

    def __init__(self, relu):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.nothing = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
        self.relu = relu

    def forward(self, x):
        return self.last(self.relu(self.nothing(self.layer(x))))


@pytest.mark.parametrize(
    ("relu", "found"),
    [
        (nn.ReLU(), functional.relu),
        (nn.ReLU(inplace=True), functional.relu),
        (nn.ReLU6(), functional.relu6),
        (torch.relu, functional.relu),
        (torch.Tensor.relu_, functional.relu),
        (nn.GELU(), None),
        (lambda x: x.relu() + x, None),
        (lambda x: torch.cat([x.relu(), x])[: len(x)], None),
    ],
)
def test_following_relus(relu, found):
    """In place or not, module or function, as long as nothing else reads the output."""
    model = Rectified(relu).eval()
    walk = RerunWalk(model, [torch.randn(2, 4)], ["layer", "last"])
    stage = next(walk.stages())
    assert stage.activations == ({} if found is None else {"layer": found})


def test_no_activation_is_kept_alive():
    """While the first pass watches, a value dies as it would without."""
    model, alive = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).eval(), []
    values = []

    def count(module, args, output):
        gc.collect()
        alive.append(sum(value() is not None for value in values))
        values.append(weakref.ref(output))

    for layer in model:
        layer.register_forward_hook(count)
    RerunWalk(model, [torch.randn(2, 4)], ["0", "1", "2", "3"])
    assert max(alive) <= 1


def test_failures_of_the_forward_fn_are_reported():
    """With the number of the batch."""

    def forward_fn(model, batch):
        return model(batch["missing"])

    with pytest.raises(RuntimeError, match="forward_fn failed on batch 0 with KeyError"):
        RerunWalk(Attention().eval(), [{}], ["out"], forward_fn=forward_fn)


class Looped(nn.Module):
    """Calls two layers three times, in turn."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for _ in range(3):
            x = x + self.down(self.up(x).relu() * self.gate(x).sigmoid())
        return self.head(x)


@torch.no_grad()
def test_a_layer_that_is_called_again_gets_the_inputs_of_all_calls():
    """As hooks on a copy with the decided weights see them, batch by batch and call by call."""
    model, batches = Looped().eval(), [torch.randn(5, 4) for _ in range(2)]
    original, decided = copy.deepcopy(model), copy.deepcopy(model)
    names = ["up", "gate", "down", "head"]
    walk = RerunWalk(model, batches, names, streams="both")
    stages = []
    for stage in walk.stages():
        stages.append(stage.layers)
        expected = [seen_by(each, stage.layers[0], batches) for each in (decided, original)]
        given = list(zip(*((q, f) for q, f, _ in stage.batches()), strict=True))
        assert len(given[0]) == len(expected[0]) == (2 if "head" in stage.layers else 6)
        for ours, theirs in zip(given, expected, strict=True):
            assert all(map(torch.equal, ours, theirs))
        for layer in stage.layers:
            weight = model.get_submodule(layer).weight.round(decimals=1)
            decided.get_submodule(layer).weight.copy_(weight)
            walk.decide(layer, weight)
    assert stages == [("up", "gate"), ("down",), ("head",)]


def test_a_relu_counts_if_it_reads_every_call():
    model = Looped().eval()
    walk = RerunWalk(model, [torch.randn(5, 4)], ["up"])
    assert next(walk.stages()).activations == {"up": functional.relu}


def seen_by(model, layer, batches):
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    for batch in batches:
        model(batch)
    hook.remove()
    return seen


class Settling(nn.Module):
    """Calls a layer until what it returns is small, and once at least."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        x = self.first(x)
        while x.abs().max() > 1:
            x = self.again(x)
        return self.again(x)


@torch.no_grad()
def test_calls_of_one_stream_alone_are_left_out_and_told():
    """The common calls are paired; whatever is read again, each call counts once."""
    model = Settling().eval()
    model.again.weight.copy_(torch.eye(4) / 2)
    shorter = model.first.weight / 8
    batches = [torch.randn(5, 4) * 20, torch.randn(5, 4) * 50]
    decided = copy.deepcopy(model)
    decided.first.weight.copy_(shorter)
    expected = [[seen_by(each, "again", [batch]) for batch in batches] for each in (decided, model)]
    fewer = [len(seen) for seen in expected[0]]
    extra = sum(len(seen) for seen in expected[1]) - sum(fewer)
    assert min(fewer) >= 1 and extra >= 2
    walk = RerunWalk(model, batches, ["first", "again"], streams="both")
    for stage in walk.stages():
        if stage.layers == ("first",):
            assert "calls_left_out" not in walk.cost
            walk.decide("first", shorter)
            continue
        for _ in range(2):
            given = [(q, f) for q, f, _ in stage.batches()]
        pairs = [
            pair
            for quantized, original in zip(*expected, strict=True)
            for pair in zip(quantized, original[: len(quantized)], strict=True)
        ]
        assert len(given) == sum(fewer)
        assert all(torch.equal(a, b) for ours, own in zip(given, pairs, strict=True)
                   for a, b in zip(ours, own, strict=True))  # fmt: skip
        assert walk.cost["calls_left_out"] == {"again": extra}
        walk.decide("again", model.again.weight)
