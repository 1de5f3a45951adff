"""Attention that a graph spells out, product by product, computed by PyTorch's one function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from aimet_ext.onnx.ops.steps import Step

__all__ = ["FusedAttention", "find_attention"]


@dataclass(frozen=True)
class FusedAttention:
    """``softmax(query · key + mask) · value`` among the steps of a block.

    :param key: tensor of the keys, turned as the product takes them: ``[…, channels, seq]``.
    :param mask: what is added to the scores, None without one.
    :param skipped: numbers of the steps that it takes the place of, but the last.
    :param last: number of the last one.
    """

    query: str
    key: str
    value: str
    mask: str | None
    output: str
    skipped: frozenset[int]
    last: int

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """The output ``[…, seq, channels]``."""
        query = values[self.query]
        mask = None if self.mask is None else values[self.mask].to(query.dtype)
        keys = values[self.key].transpose(-1, -2)
        return functional.scaled_dot_product_attention(
            query, keys, values[self.value], attn_mask=mask, scale=1.0
        )

    @property
    def inputs(self) -> list[str]:
        """Names of the tensors that it reads."""
        return [name for name in (self.query, self.key, self.value, self.mask) if name is not None]


def find_attention(steps: Sequence[Step], outputs: Sequence[str]) -> FusedAttention | None:
    """The one attention of a block that is spelt out in products, None if there is none.

    :param outputs: tensors that are asked for, which must stay.
    """
    softmax = [n for n, step in enumerate(steps) if step.node.op_type == "Softmax"]
    if len(softmax) != 1:
        return None
    step = steps[softmax[0]]
    if step.attributes.get("axis", -1) not in (-1, 3):
        return None
    made = {name: n for n, other in enumerate(steps) for name in other.outputs}
    readers: dict[str, list[int]] = {}
    for number, other in enumerate(steps):
        for name in other.read():
            readers.setdefault(name, []).append(number)

    def product(name: str) -> int | None:
        number = made.get(name)
        plain = number is not None and steps[number].node.op_type == "MatMul"
        return number if plain and steps[made[name]].linear is None else None

    scores, mask, skipped = step.inputs[0], None, [softmax[0]]
    added = made.get(scores)
    if added is not None and steps[added].node.op_type == "Add":
        sides = [name for name in steps[added].inputs if product(name) is not None]
        if len(sides) != 1:
            return None
        mask = next(name for name in steps[added].inputs if name != sides[0])
        scores = sides[0]
        skipped.append(added)
    first, last = product(scores), readers.get(step.outputs[0], [])
    if first is None or len(last) != 1 or steps[last[0]].node.op_type != "MatMul":
        return None
    skipped.append(first)
    probabilities, value = steps[last[0]].inputs[:2]
    inner = [name for number in skipped for name in steps[number].outputs]
    if probabilities != step.outputs[0] or set(inner) & set(outputs):
        return None
    if any(len(readers.get(name, ())) != 1 for name in inner):
        return None
    query, key = steps[first].inputs[:2]
    output = steps[last[0]].outputs[0]
    return FusedAttention(query, key, value, mask, output, frozenset(skipped), last[0])
