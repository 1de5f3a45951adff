"""Blocks that are called in different ways are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aimet_ext.walk.blocks import BlockWalk
from aimet_ext.walk.streamed import check_same_arguments

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, bias: Tensor | None = None, *, cache: object = None) -> Tensor:
        out = self.proj(x)
        return out if bias is None else out + bias


class Stack(nn.Module):
    """Passes its blocks one bias each."""

    def __init__(self, biases: list[Tensor | None]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in biases)
        self.biases = biases

    def forward(self, x: Tensor) -> Tensor:
        for block, bias in zip(self.blocks, self.biases, strict=True):
            x = block(x, bias, cache=object())
        return x


def check(biases: list[Tensor | None]) -> None:
    model = Stack(biases)
    check_same_arguments(model, BLOCKS, lambda: model(torch.ones(1, 2, 4)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_equal_arguments_and_caches_of_any_kind_pass() -> None:
    check([None, None, None])
    check([torch.ones(4), torch.ones(4), torch.ones(4)])


@pytest.mark.parametrize(
    "biases",
    [
        [torch.ones(4), torch.ones(4), torch.zeros(4)],
        [None, None, torch.zeros(4)],
        [torch.ones(4), torch.ones(4), None],
    ],
    ids=["another value", "only later", "only before"],
)
def test_an_argument_that_differs_is_named(biases: list[Tensor | None]) -> None:
    with pytest.raises(ValueError, match=r"blocks\.2 must receive what blocks\.0.*argument 1"):
        check(biases)


def test_a_walk_refuses_such_a_model() -> None:
    model = Stack([torch.ones(4), torch.zeros(4), torch.ones(4)]).eval()
    layers = [f"{block}.proj" for block in BLOCKS]
    walk = BlockWalk(model, BLOCKS, [torch.ones(1, 2, 4)], layers)
    with pytest.raises(ValueError, match="called in different ways"):
        next(walk.stages())
    walk.close()
