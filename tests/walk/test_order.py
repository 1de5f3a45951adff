"""In which order a module calls its layers, what they share, and what need not run again."""

from functools import partial

import block_reference
import pytest
import torch
from torch import nn
from torch.nn import functional

from aimet_ext.walk.blocks import Stack, layers_around
from aimet_ext.walk.order import layer_order


class Net(nn.Module):
    """Calls three layers as a function says."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.wide = nn.Conv1d(4, 4, 3, padding=1)
        self.narrow = nn.Conv1d(4, 4, 1)
        self.norm = nn.BatchNorm1d(4)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def order_of(forward, layers="abc", inputs=None):
    inputs = torch.randn(2, 4, 4) if inputs is None else inputs
    module = Net(forward).eval()
    return layer_order(module, [*layers], [partial(module, inputs)])


def in_place(net, x):
    y = net.a(x)
    x.add_(1)
    return net.b(x) + net.c(x) + y


@pytest.mark.parametrize(
    ("forward", "order", "stages"),
    [
        (lambda net, x: net.b(x) + net.a(x) + net.c(x), "bac", ["bac"]),
        (lambda net, x: net.a(net.c(net.b(x))), "bca", ["b", "c", "a"]),
        (lambda net, x: net.a(x) + net.b(net.a.weight @ x) + net.c(x), "abc", ["ac", "b"]),
        (lambda net, x: net.a(x) + net.b(x.clone()) + net.c(input=x), "abc", ["ac", "b"]),
        (in_place, "abc", ["a", "bc"]),
    ],
)
def test_layers_that_read_one_tensor_share_a_stage(forward, order, stages):
    """Next to each other or not; not if the tensor was changed in between."""
    found = order_of(forward)
    assert found.order == [*order]
    assert found.stages == [tuple(names) for names in stages]


def test_layers_that_read_a_tensor_differently_do_not_share_a_stage():
    """A linear layer and convolutions of two sizes."""
    found = order_of(lambda net, x: net.a(x) + net.wide(x) + net.narrow(x), ["a", "wide", "narrow"])
    assert found.stages == [("a",), ("wide",), ("narrow",)]


def test_a_batch_norm_must_be_folded():
    with pytest.raises(ValueError, match=r"after layer 'block\.wide' must be folded"):
        module = Net(lambda net, x: net.norm(net.wide(x))).eval()
        layer_order(module, ["wide"], [partial(module, torch.randn(2, 4, 4))], "block.")


def test_relus_that_alone_read_an_output():
    found = order_of(lambda net, x: net.a(x).relu() + functional.relu(y := net.b(x)) + y + net.c(x))
    assert found.activations == {"a": functional.relu}


class Part(nn.Module):
    def __init__(self, ending):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.ending = ending

    def forward(self, x):
        return self.ending(self, self.first(x))


class Parts(nn.Module):
    def __init__(self, ending):
        super().__init__()
        self.part = Part(ending)

    def forward(self, x):
        output = self.part(x)
        return (x + (output if isinstance(output, torch.Tensor) else output[0]), x, 3)


@pytest.mark.parametrize(
    ("ending", "layer"),
    [
        (lambda part, x: part.last(x), "part.last"),
        (lambda part, x: (part.last(x), None), "part.last"),
        (lambda part, x: [part.last(x)], "part.last"),
        (lambda part, x: part.last(x).add_(1), None),
        (lambda part, x: part.last(x) * 1, None),
        (lambda part, x: (part.last(x), x), None),
        (lambda part, x: (part.last(x), (x, x)), None),
        (lambda part, x: (x, part.last(x))[0], None),
    ],
)
def test_parts_that_end_with_a_layer(ending, layer):
    """Only where the output is the layer's and nothing else, unchanged."""
    module, x = Parts(ending), torch.randn(2, 4)
    found = layer_order(module, ["part.first", "part.last"], [partial(module, x)])
    assert {part: end for part, (end, _) in found.parts.items()} == (
        {"part": layer} if layer else {}
    )
    if layer:
        _, wrap = found.parts["part"]
        expected = module.part(x)
        torch.testing.assert_close(wrap(module.part.last(module.part.first(x))), expected)
    output = found.returns(x)
    assert isinstance(output, tuple) and output[0] is x and len(output) == 3


def test_layers_before_and_after_blocks():
    model, (batch, _) = block_reference.Plain().double().eval(), block_reference.plain_batches()
    names = ["head", "neck", "side", "stem", "gain"]
    stack = Stack(("blocks.0", "blocks.2"))
    before, [after] = layers_around(model, [stack], names, [partial(model, batch)])
    assert before == ["stem", "gain"]
    assert after.order == ["side", "neck", "head"]
    assert after.stages == [("side", "neck"), ("head",)]
    assert after.activations == {"neck": functional.relu}


def test_nothing_is_run_without_layers_around():
    before, [after] = layers_around(nn.Linear(1, 1), [Stack(("a",))], [], [pytest.fail])
    assert (before, after.order, after.stages) == ([], [], [])


def test_all_hooks_are_gone():
    module = Net(lambda net, x: net.a(x)).eval()
    with pytest.raises(ValueError, match=r"never received data: at\.b, at\.c;"):
        layer_order(module, [*"abc"], [partial(module, torch.randn(2, 4))] * 2, "at.")
    twice = Net(lambda net, x: net.a(net.a(x))).eval()
    with pytest.raises(ValueError, match=r"'at\.a' is called again"):
        layer_order(twice, ["a"], [partial(twice, torch.randn(2, 4))], "at.")
    for net in (module, twice):
        for child in net.modules():
            assert not child._forward_hooks and not child._forward_pre_hooks
