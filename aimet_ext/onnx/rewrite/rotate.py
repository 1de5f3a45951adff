"""R3 in ONNX graphs: queries and keys turned by one matrix behind the rotary embedding.

``(q H) (k H)ᵀ = q kᵀ`` for an orthogonal ``H [head, head]``, so scores stay as they are, and what
is kept of a token is ``k H``. A Hadamard matrix spreads the few large channels of keys over all of
them, so that they fit on a grid of 8 bits (QuaRot, arXiv 2404.00456; R3 in SpinQuant, arXiv
2405.16406). Unlike other rotations it cannot be folded into weights: the rotary embedding lies
between, and does not commute with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
from onnx import NodeProto, helper, numpy_helper

from aimet_ext.core.hadamard import hadamard
from aimet_ext.onnx.index import MOVES, GraphIndex, rename_reads, replace_nodes
from aimet_ext.onnx.values import infer_shapes

ENDING = "_r3"
_BEHIND_SCORES = (*MOVES, "Add", "Div", "Mul", "Tanh", "Where")
_PRODUCTS = ("Mul", "Div")


def rotate_queries_and_keys(model: onnx.ModelProto) -> list[str]:
    """Multiply queries and keys of each attention by a Hadamard matrix, in place.

    Turned are the tensors right behind the rotary embedding, keys before they are put beside those
    of a cache. A tensor that is an output of the graph keeps its name, which is that of the turned
    values from then on.

    :param model: float model, whose weights need not be there.
    :returns: names of the turned tensors.
    :raises ValueError: there is no attention with queries and keys behind a rotary embedding, or
        one has another form, or heads of a width that no Hadamard matrix is known for.
    """
    index = GraphIndex(model.graph)
    sources = queries_and_keys(index)
    kinds = _widths_and_types(model, sources)
    matrices = {kind: f"hadamard_{kind[0]}{ENDING}" for kind in sorted(set(kinds.values()))}
    for (width, dtype), name in matrices.items():
        matrix = hadamard(width)
        if matrix is None:
            raise ValueError(
                f"r3: heads of a width with a known Hadamard matrix are required, got {width} "
                f"({sources[0]}); leave r3 out"
            )
        values = matrix.numpy().astype(helper.tensor_dtype_to_np_dtype(dtype))
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    outputs = set(index.outputs)
    turned = {name: name if name in outputs else f"{name}{ENDING}" for name in sources}

    def with_rotation(node: NodeProto) -> list[NodeProto]:
        rename_reads(node, turned)
        scope, after = node.name.rpartition("/")[0], []
        for place, name in enumerate(node.output):
            if name not in turned:
                continue
            plain = f"{name}_before{ENDING}" if name in outputs else name
            node.output[place] = plain
            label = f"{scope}/{name.strip('/').replace('/', '.')}{ENDING}"
            given = [plain, matrices[kinds[name]]]
            after.append(helper.make_node("MatMul", given, [turned[name]], label))
        return [node, *after]

    replace_nodes(model.graph, with_rotation)
    return list(turned.values())


def is_rotated(model: onnx.ModelProto) -> bool:
    """Return True after :func:`rotate_queries_and_keys`."""
    return any(tensor.name.endswith(ENDING) for tensor in model.graph.initializer)


def turned_tensors(model: onnx.ModelProto) -> set[str]:
    """Return the tensors of turned queries and keys, moved and scaled ones among them.

    Ranges that were found before they were turned do not hold for these.
    """
    index = GraphIndex(model.graph)
    first = [
        node.output[0]
        for node in index.nodes
        if node.op_type == "MatMul" and node.input[1].endswith(ENDING)
    ]
    return index.beyond(first, lambda node: node.op_type in (*MOVES, *_PRODUCTS, "Concat"))


def queries_and_keys(index: GraphIndex) -> list[str]:
    """Return the tensors behind rotary embeddings that scores are products of.

    :raises ValueError: there are none, or scores of something else.
    """
    varying = _varying(index)
    found: dict[str, None] = {}
    faults = []
    for node in _scores(index, varying):
        for name in node.input:
            source = _source(index, name, varying)
            if not _is_rotary(index, source, varying):
                faults.append(source)
            found[source] = None
    if faults or not found:
        seen = f"{', '.join(faults[:3])} are none" if faults else "no scores were found"
        raise ValueError(
            "r3: an attention whose scores are products of queries and keys behind a rotary "
            f"embedding, as operators of the graph, is required, but {seen}; leave r3 out"
        )
    return list(found)


def _scores(index: GraphIndex, varying: Collection[str]) -> Iterator[NodeProto]:
    """Yield products of two activations that go to a softmax."""
    for node in index.nodes:
        if node.op_type == "MatMul" and all(name in varying for name in node.input):
            behind = index.beyond(node.output, lambda each: each.op_type in _BEHIND_SCORES)
            if any(r.op_type == "Softmax" for name in behind for r in index.readers(name)):
                yield node


def _varying(index: GraphIndex) -> set[str]:
    """Return the tensors that depend on values of inputs, and not on their shapes alone."""
    return index.beyond(index.inputs, lambda node: node.op_type not in ("Shape", "Size"))


def _source(index: GraphIndex, name: str, varying: Collection[str]) -> str:
    """Return the tensor whose values another one holds: moved, scaled, or put beside a cache."""
    while (node := index.node(name)) is not None:
        own = [each for each in node.input if each in varying]
        if node.op_type == "Concat":
            own = [each for each in own if each not in index.inputs]
            if len(own) == len(node.input):
                break
        elif node.op_type not in (*MOVES, *_PRODUCTS):
            break
        if len(own) != 1:
            break
        name = own[0]
    return name


def _is_rotary(index: GraphIndex, name: str, varying: Collection[str]) -> bool:
    """Return True for a sum of two products, or for that beside channels that were not turned."""
    node = index.node(name)
    if node is None:
        return False
    if node.op_type == "Concat":
        return any(_is_rotary(index, _moved(index, each), varying) for each in node.input)
    parts = [index.node(_moved(index, each)) for each in node.input]
    return node.op_type == "Add" and all(p is not None and p.op_type == "Mul" for p in parts)


def _moved(index: GraphIndex, name: str) -> str:
    return index.source(name, MOVES)


def _widths_and_types(model: onnx.ModelProto, names: list[str]) -> dict[str, tuple[int, int]]:
    """Return the last dimension and ONNX's type of tensors.

    :raises ValueError: it is not known.
    """
    graph = infer_shapes(model, data_prop=True).graph
    found = {}
    for value in (*graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = kind.shape.dim
        if value.name in names and len(dims) and dims[-1].dim_value > 0:
            found[value.name] = (dims[-1].dim_value, kind.elem_type)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(
            f"r3: queries and keys of a known width are required, but the shape of {unknown[0]} "
            "cannot be inferred; export the model with static shapes"
        )
    return found
