"""How blocks are called is proved; a model that does more between them is walked by its graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext.walk.blocks import BlockWalk
from aimet_ext.walk.stream import capture_block_inputs
from aimet_ext.walk.wiring import NotInSequence, block_kinds

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


class Between(Stack):
    """Does something else than to call its blocks one after another."""

    def __init__(self, way: str) -> None:
        super().__init__([None] * 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        first = x
        blocks = list(self.blocks)
        if self.way == "order":
            blocks = blocks[::-1]
        if self.way == "repeated":
            blocks = [*blocks, blocks[0]]
        if self.way == "left out":
            blocks = blocks[:2]
        for number, block in enumerate(blocks):
            if self.way == "residual":
                x = x + block(x)
            elif self.way == "scaled":
                x = block(x) * 0.5
            elif self.way == "skip" and number == 2:
                x = block(x + first)
            elif self.way == "from a block":
                x = block(x, x.mean(-1, keepdim=True) if number else None)
            else:
                x = block(x)
        return x


WAYS = ("order", "repeated", "left out", "residual", "scaled", "skip", "from a block")


def kinds(model: nn.Module) -> tuple[int, ...]:
    found = block_kinds(model, BLOCKS, lambda: model(torch.randn(1, 2, 4)))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return found


@pytest.mark.parametrize(
    ("biases", "expected"),
    [
        ([None, None, None], (0, 0, 0)),
        ([torch.ones(4), torch.ones(4), torch.ones(4)], (0, 0, 0)),
        ([torch.ones(4), torch.zeros(4), torch.ones(4)], (0, 1, 0)),
        ([None, None, torch.zeros(4)], (0, 0, 2)),
        ([torch.ones(4), torch.ones(4), None], (0, 0, 2)),
    ],
)
def test_blocks_of_equal_arguments_are_one_kind(biases: Any, expected: tuple[int, ...]) -> None:
    assert kinds(Stack(biases)) == expected


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_sequence_is_refused(way: str) -> None:
    with pytest.raises(NotInSequence, match=r"blocks\.\d"):
        kinds(Between(way))


def test_a_walk_calls_each_kind_with_its_arguments() -> None:
    model = Stack([torch.ones(4), torch.full((4,), 5.0), torch.ones(4)]).eval()
    x = torch.randn(1, 2, 4)
    walk = BlockWalk(model, BLOCKS, [x], [f"{block}.proj" for block in BLOCKS], streams="float")
    seen = []
    hooks = [
        model.get_submodule(f"{block}.proj").register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        for block in BLOCKS
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    for stage, expected in zip(walk.stages(), list(seen), strict=True):
        ((_, found, _),) = stage.batches()
        assert torch.equal(found, expected)
    walk.close()


def test_a_model_that_fails_behind_its_first_block_is_refused() -> None:
    """Nothing is taken for granted where the wiring could not be proved."""
    model = Stack([None] * 3).eval()
    model.blocks[1].proj.register_forward_hook(lambda *_: 1 / 0)
    walk = BlockWalk(model, BLOCKS, [torch.randn(1, 2, 4)], ["blocks.0.proj"])
    with pytest.raises(ZeroDivisionError):
        next(walk.stages())
    walk.close()


def true_inputs(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Mean square of what reaches each linear layer."""
    seen: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda m, _, out, name=name: seen.setdefault(name, []).append(
                    (out - m.bias).double().square().sum(-1).flatten()
                )
            )
    for batch in batches:
        model(batch)
    return {name: torch.cat(parts).mean() for name, parts in seen.items()}


@pytest.mark.filterwarnings("ignore")  # AIMET uses what torch and AIMET deprecated
@pytest.mark.parametrize("way", ["residual", "scaled", "skip"])
def test_layers_are_judged_on_what_reaches_them(way: str) -> None:
    pytest.importorskip("aimet_torch")
    torch.manual_seed(0)
    model = Between(way).eval()
    batches = [torch.randn(2, 8, 4) for _ in range(2)]
    sim = aimet_ext.create_sim(model, batches[0], activations=None)
    report = aimet_ext.apply_gptq(sim, batches, inp_symmetry="symfp", progress=False)
    assert report.cost["walk"] != "blocks"
    with torch.no_grad():
        truth = true_inputs(model, batches)
    assert {layer.name for layer in report.layers} == truth.keys()
    for layer in report.layers:
        assert layer.signal == pytest.approx(float(truth[layer.name]), rel=1e-4)


# ------------------------------------------------------------------------------------ masks


class Attending(nn.Module):
    """Attention under a mask of a form and name of its own."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.value = nn.Linear(4, 4)

    def attend(self, x: Tensor, hides: Tensor) -> Tensor:
        scores = (x @ x.mT).masked_fill(hides[:, None, :], -1e9)
        return x + scores.softmax(-1) @ self.value(x)


class Known(Attending):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        assert attention_mask is not None
        hides = attention_mask if self.form == "hides" else attention_mask == 0
        return self.attend(x, hides.bool())


class Unknown(Attending):
    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        hides = torch.zeros_like(extra).bool() if self.form == "no mask" else extra == 0
        return self.attend(x, hides)


class Masked(nn.Module):
    def __init__(self, block: type[Attending], form: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(form) for _ in range(2))

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, extra)
        return x


@pytest.mark.parametrize(
    ("block", "form", "extra", "counts"),
    [
        (Known, "attends", [1, 1, 1, 0], [True, True, True, False]),
        (Known, "attends", [True, True, False, False], [True, True, False, False]),
        (Known, "hides", [False, False, True, True], [True] * 4),  # not what the name promises
        (Unknown, "no mask", [0, 1, 2, 3], [True] * 4),  # positions
        (Unknown, "no mask", [0, 0, 1, 1], [True] * 4),  # segments
        (Unknown, "attends", [1, 1, 1, 0], [True] * 4),  # by another name
    ],
)
def test_a_mask_is_what_is_known_to_be_one(
    block: type[Attending], form: str, extra: list[int], counts: list[bool]
) -> None:
    torch.manual_seed(0)
    model = Masked(block, form).eval()
    batch = (torch.randn(1, 4, 4), torch.tensor([extra]))
    stream = capture_block_inputs(model, "blocks.0", [batch])
    assert stream.mask(0).tolist() == [counts]
