"""Which tensors of two ONNX graphs of one model are the same.

The exporter numbers the operators of each kind within a module, and operators that only compute a
shape count too. So a name alone says nothing: in a graph for one token ``Mul_4`` may be what is
``Mul_6`` in a graph for many. What stays is the order in which a module computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

__all__ = ["MOVES", "constant_tensors", "moved_from", "same_tensors"]

#: Operators that move values about and compute none.
MOVES = frozenset(
    (
        "Cast",
        "Expand",
        "Flatten",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)

Place = tuple[str, str, int]


def same_tensors(reference: Any, model: Any, own: frozenset[str] = frozenset()) -> dict[str, str]:
    """Name in ``reference`` of each tensor that an operator of ``model`` computes.

    Compared are the operators of each kind within each module, in order. Left out are those that
    only move values (see :func:`moved_from`), constants, and what hangs on constants alone.

    :param reference: ModelProto.
    :param model: ModelProto whose modules have the same names.
    :param own: tensors of ``model`` that the reference does not have.
    :raises ValueError: an operator of ``model`` has no counterpart; all such modules are named.
    """
    here = dict(_places(model, own))
    there = dict(_places(reference, frozenset()))
    missing = sorted({f"{scope or 'the model'} ({kind})" for scope, kind, _ in here.keys() - there})
    if missing:
        raise ValueError(
            "graphs of one model are required, but operators of these modules have no counterpart: "
            f"{', '.join(missing[:5])}; export both from the same simulation"
        )
    return {name: there[place] for place, name in here.items()}


def moved_from(model: Any) -> dict[str, str]:
    """Tensor whose values each output of an operator that only moves values holds."""
    moved: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in MOVES:
            for output in node.output:
                moved[output] = moved.get(node.input[0], node.input[0])
    return moved


def constant_tensors(model: Any) -> set[str]:
    """Initializers, and all that operators make of constants alone."""
    found = {proto.name for proto in model.graph.initializer}
    for node in model.graph.node:
        if all(name in found for name in node.input if name):
            found.update(node.output)
    return found


def _places(model: Any, own: frozenset[str]) -> Iterator[tuple[Place, str]]:
    constants = constant_tensors(model)
    count: defaultdict[tuple[str, str], int] = defaultdict(int)
    for node in model.graph.node:
        if node.op_type in MOVES or node.output[0] in constants or node.output[0] in own:
            continue
        scope = node.name.rpartition("/")[0]
        yield (scope, node.op_type, count[scope, node.op_type]), node.output[0]
        count[scope, node.op_type] += 1
