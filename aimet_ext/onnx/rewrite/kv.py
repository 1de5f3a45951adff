"""Keys and values of attention as tensors of their own, and graphs with and without a cache.

The exporter numbers the operators of each kind within a module, and operators that only compute a
shape count too. So a name alone says nothing: in a graph for one token ``Mul_4`` may be what is
``Mul_6`` in a graph for many. What stays is the order in which a module computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

import onnx
from onnx import NodeProto
from onnx.helper import make_node

from aimet_ext.onnx.index import MOVES, GraphIndex, rename_reads, replace_nodes

Place = tuple[str, str, int]


def keep_keys_and_values(model: onnx.ModelProto) -> list[str]:
    """Put an Identity behind the keys and values of each attention, in place.

    So what is kept can have another width than what is computed. Keys are those that scores are
    computed of, after rotary embeddings and before they are scaled.

    :param model: float model.
    :returns: names of the Identities' outputs.
    """
    index = GraphIndex(model.graph)
    sources = dict.fromkeys(
        _source(index, node.input[1])
        for node in index.nodes
        if node.op_type == "MatMul" and not index.is_stored(node.input[1])
    )
    names = {source: f"{source}_kept" for source in sources if source in index.producer}

    def with_identities(node: NodeProto) -> list[NodeProto]:
        rename_reads(node, names)
        made = [name for name in node.output if name in names]
        label = f"{node.name}/kept"
        return [node, *(make_node("Identity", [n], [names[n]], name=label) for n in made)]

    replace_nodes(model.graph, with_identities)
    return list(names.values())


def _source(index: GraphIndex, name: str) -> str:
    """Return the tensor whose values another one holds, moved or times a constant."""
    while (node := index.node(name)) is not None:
        if node.op_type in MOVES:
            name = node.input[0]
        elif node.op_type == "Mul" and any(map(index.is_stored, node.input)):
            name = next(each for each in node.input if not index.is_stored(each))
        else:
            break
    return name


def separate_outputs(model: onnx.ModelProto, outputs: Collection[str]) -> None:
    """Have outputs of a graph be tensors of their own, which may have a width of their own."""

    def with_identities(node: NodeProto) -> list[NodeProto]:
        made = [name for name in node.output if name in outputs]
        node.output[:] = [f"{name}_wide" if name in made else name for name in node.output]
        label = f"{node.name}/narrow"
        return [node, *(make_node("Identity", [f"{n}_wide"], [n], name=label) for n in made)]

    replace_nodes(model.graph, with_identities)


def same_tensors(
    reference: onnx.ModelProto, model: onnx.ModelProto, own: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Name in ``reference`` of each tensor that an operator of ``model`` computes.

    Compared are the operators of each kind within each module, in order. Left out are those that
    only move values (see :func:`moved_from`), constants, and what hangs on constants alone.

    :param reference: Model whose names are returned.
    :param model: Model whose modules have the same names.
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


def moved_from(model: onnx.ModelProto) -> dict[str, str]:
    """Map each output of an operator that only moves values to the tensor whose values it holds."""
    moved: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in MOVES:
            for output in node.output:
                moved[output] = moved.get(node.input[0], node.input[0])
    return moved


def _constant_tensors(model: onnx.ModelProto) -> set[str]:
    """Return the names of initializers, and of all that operators make of constants alone."""
    found = {proto.name for proto in model.graph.initializer}
    for node in model.graph.node:
        if all(name in found for name in node.input if name):
            found.update(node.output)
    return found


def _places(model: onnx.ModelProto, own: frozenset[str]) -> Iterator[tuple[Place, str]]:
    constants = _constant_tensors(model)
    count: defaultdict[tuple[str, str], int] = defaultdict(int)
    for node in model.graph.node:
        if node.op_type in MOVES or node.output[0] in constants or node.output[0] in own:
            continue
        scope = node.name.rpartition("/")[0]
        yield (scope, node.op_type, count[scope, node.op_type]), node.output[0]
        count[scope, node.op_type] += 1
