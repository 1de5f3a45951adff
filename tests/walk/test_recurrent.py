"""Recurrent layers that call their matrices compute what torch's own do, in every form of input."""

import copy

import pytest
import torch
from recurrent_reference import rows_of_weights
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from aimet_ext.walk.recurrent import Unrolled, matrices
from aimet_ext.walk.traced import walk_graph
from aimet_ext.walk.walk import RerunWalk

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


def pair(kind, **settings):
    """A layer, and one whose matrices are modules."""
    torch.manual_seed(0)
    settings = {"num_layers": 2, "bidirectional": True, **settings}
    own = KINDS[kind](3, 4, **settings).double().eval()
    return own, unrolled(copy.deepcopy(own))


def unrolled(module):
    for name in matrices(module):
        weight = module._parameters.pop(name)
        linear = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
        linear.weight = weight
        module._modules[name] = linear
    vars(module)["forward"] = Unrolled(module)
    return module


def states(kind, module, batch):
    sizes = [module.proj_size or module.hidden_size, module.hidden_size]
    count = module.num_layers * (1 + module.bidirectional)
    shape = (count,) if batch is None else (count, batch)
    made = [torch.randn(*shape, size, dtype=torch.float64) for size in sizes]
    return tuple(made) if kind == "LSTM" else made[1]


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, PackedSequence):
            torch.testing.assert_close(mine.data, other.data)
            assert_same(mine[1:], other[1:])
        elif isinstance(mine, tuple):
            assert_same(mine, other)
        elif mine is not None or other is not None:
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"batch_first": True}, {"bias": False}, {"bidirectional": False}, {"num_layers": 1}],
    ids=str,
)
def test_output_and_last_states(kind, given, settings):
    own, ours = pair(kind, **settings)
    x = torch.randn(5, 5, 3, dtype=torch.float64)
    hx = states(kind, own, 5) if given else None
    assert_same(ours(x, hx), own(x, hx))
    hx = states(kind, own, None) if given else None
    assert_same(ours(x[0], hx), own(x[0], hx))  # a single sequence


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nonlinearities(nonlinearity):
    own, ours = pair("RNN", nonlinearity=nonlinearity)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    assert_same(ours(x), own(x))


def test_projections():
    own, ours = pair("LSTM", proj_size=2)
    hx = states("LSTM", own, 2)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    assert_same(ours(x), own(x))
    assert_same(ours(x, hx), own(x, hx))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_packed_sequences(kind, given):
    """Each row of theirs is one of a sequence by itself, whatever order they come in."""
    own, ours = pair(kind)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    lengths = torch.tensor([2, 6, 1, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    hx = states(kind, own, 4) if given else None
    seen = {}
    for name in matrices(ours):
        ours._modules[name].register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    assert_same(ours(packed, hx), own(packed, hx))
    together = dict(seen)
    alone = {name: [] for name in seen}
    for n, length in enumerate(lengths):
        part = None if hx is None else tuple(s[:, n : n + 1].contiguous() for s in hx)
        part = hx[:, n : n + 1].contiguous() if torch.is_tensor(hx) else part
        ours(x[:length, n : n + 1], part)
        for name, rows in seen.items():
            alone[name].append(rows.flatten(0, 1))
    for name, rows in together.items():
        expected = torch.cat(alone[name])
        torch.testing.assert_close(rows.T @ rows, expected.T @ expected)


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(3, 3)
        self.rnn = KINDS[kind](3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.rnn(self.enter(x))[0])


@pytest.mark.parametrize("walk", [walk_graph, RerunWalk])
@pytest.mark.parametrize("kind", KINDS)
def test_walks_give_each_matrix_its_rows(walk, kind):
    """In both streams, those of a loop over steps with the weights decided so far."""
    model = Tagger(kind).double().eval()
    plain, decided = copy.deepcopy(model), copy.deepcopy(model)
    unrolled(model.rnn)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    names = [f"rnn.{name}" for name in matrices(plain.rnn)]
    going = walk(
        model,
        [x],
        ["enter", *names[:-1], "head"],
        streams="both",
        effective={names[-1]: model.get_submodule(names[-1]).weight * 0.5},
    )
    assert going.cost["walk"] == ("graph" if walk is walk_graph else "rerun")
    with torch.no_grad():
        getattr(decided.rnn, names[-1].removeprefix("rnn.")).mul_(0.5)
    order = []
    for stage in going.stages():
        ((quantized, original, mask),) = stage.batches()
        assert mask is None
        for layer in stage.layers:
            order.append(layer)
            for model_now, came in ((decided, quantized), (plain, original)):
                torch.testing.assert_close(came, rows_of(model_now, layer, x))
        for layer in stage.layers:
            name = layer.removeprefix("rnn.")
            owner = decided.rnn if layer.startswith("rnn.") else getattr(decided, layer)
            weight = getattr(owner, name if layer.startswith("rnn.") else "weight")
            going.hold(layer)
            going.decide(layer, weight * 0.7)
            with torch.no_grad():
                weight.mul_(0.7)
                model.get_submodule(layer).weight.fill_(torch.nan)  # both streams have their own
    going.close()
    assert order == [
        "enter",
        *[n for end in ("0", "1") for k in ("ih", "hh") for n in names[:-1] if f"{k}_l{end}" in n],
        "head",
    ]


@torch.no_grad()
def rows_of(model, layer, x):
    """The input of a layer, ``[batch, steps, in]``."""
    if layer == "enter":
        return x
    output, rows = rows_of_weights(model.rnn, model.enter(x))
    if layer == "head":
        return output
    found = rows[layer.removeprefix("rnn.")].unflatten(0, (x.shape[1], -1)).transpose(0, 1)
    return found.flip(1) if layer.endswith("reverse") and "hh" in layer else found
