"""R3 in ONNX graphs: queries and keys turned by matrices behind the rotary embedding.

``(q H) (k H)ᵀ = q kᵀ`` for an orthogonal ``H [head, head]``, so scores stay as they are, and what
is kept of a token is ``k H``. A Hadamard matrix spreads the few large channels of keys over all of
them, so that they fit on a grid of 8 bits (QuaRot, arXiv 2404.00456; R3 in SpinQuant, arXiv
2405.16406). Unlike other rotations it cannot be folded into weights: the rotary embedding lies
between, and does not commute with it. For the same price each head can have a matrix of its own,
invertible alone, and its keys a shift, see :mod:`aimet_ext.core.key_maps`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from aimet_ext.core.hadamard import hadamard
from aimet_ext.core.key_maps import KeyMap
from aimet_ext.onnx.index import MOVES, GraphIndex, rename_reads, replace_nodes
from aimet_ext.onnx.values import infer_shapes

HADAMARD, ENDING = "hadamard_", "_r3"
_BEHIND_SCORES = (*MOVES, "Add", "Div", "Mul", "Where")
_BOUNDED = "Tanh"  # scores that are bounded may be turned, and not shifted
_PRODUCTS = ("Mul", "Div")


def rotate_queries_and_keys(model: onnx.ModelProto, maps: Sequence[KeyMap] = ()) -> list[str]:
    """Multiply queries and keys of each attention by a Hadamard matrix, in place.

    Turned are the tensors right behind the rotary embedding, keys before they are put beside those
    of a cache. A tensor that is an output of the graph keeps its name, which is that of the turned
    values from then on.

    :param model: float model, whose weights need not be there.
    :param maps: Maps of the keys of each attention, in order, in place of the Hadamard matrix.
    :returns: names of the turned tensors.
    :raises ValueError: there is no attention with queries and keys behind a rotary embedding, or
        one has another form, or heads of a width that no Hadamard matrix is known for; maps of
        another number, or of other heads.
    """
    index = GraphIndex(model.graph)
    pairs = queries_and_keys(index)
    sources = list(dict.fromkeys(name for pair in pairs for name in pair))
    tensors = _Tensors(model, sources)
    if maps:
        check_shifts(index)
        factors = _mapped(tensors, pairs, maps)
    else:
        factors = {name: (tensors.hadamard(name), None) for name in sources}
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
            matrix, shift = factors[name]
            product = turned[name] if shift is None else f"{name}_unshifted{ENDING}"
            after.append(helper.make_node("MatMul", [plain, matrix], [product], label))
            if shift is not None:
                given = [product, shift]
                after.append(helper.make_node("Add", given, [turned[name]], f"{label}_shift"))
        return [node, *after]

    replace_nodes(model.graph, with_rotation)
    return list(turned.values())


class _Tensors:
    """Queries and keys of a model by name, and the constants that they are turned by.

    :raises ValueError: The width of one is not known.
    """

    def __init__(self, model: onnx.ModelProto, names: list[str]) -> None:
        self._graph = model.graph
        self.shapes, self._types = _shapes_and_types(model, names)
        self._made: set[str] = set()

    def store(self, name: str, values: np.ndarray, like: str) -> str:
        """Add a constant of a tensor's type to the model, once; return its name."""
        if name not in self._made:
            values = values.astype(helper.tensor_dtype_to_np_dtype(self._types[like]))
            self._graph.initializer.append(numpy_helper.from_array(values, name))
            self._made.add(name)
        return name

    def hadamard(self, like: str) -> str:
        """Add the Hadamard matrix of a tensor's width.

        :raises ValueError: None is known.
        """
        width, dtype = self.shapes[like][-1], self._types[like]
        matrix = hadamard(width)
        if matrix is None:
            raise ValueError(
                f"r3: heads of a width with a known Hadamard matrix are required, got {width} "
                f"({like}); leave r3 out"
            )
        other = "" if dtype == next(iter(self._types.values())) else f"_{dtype}"
        return self.store(f"{HADAMARD}{width}{other}{ENDING}", matrix.numpy(), like)


def _mapped(
    tensors: _Tensors, pairs: Sequence[tuple[str, str]], maps: Sequence[KeyMap]
) -> dict[str, tuple[str, str | None]]:
    """Add the constants of maps; return matrix and shift by the tensor that they are for.

    :raises ValueError: Maps of another number, or of other heads.
    """
    if len(pairs) != len(maps) or len({key for _, key in pairs}) != len(maps):
        raise ValueError(
            f"r3: {len(maps)} attentions with keys of their own are required, for which maps were "
            f"fitted, got {len(pairs)}; fit them to this model"
        )
    factors: dict[str, tuple[str, str | None]] = {}
    for number, ((query, key), own) in enumerate(zip(pairs, maps, strict=True)):
        heads, width = own.shift.shape
        found = [tensors.shapes[name][-3:][::2] for name in (query, key)]  # heads and width
        if found[1] != (heads, width) or found[0][1:] != (width,) or found[0][0] % heads:
            raise ValueError(
                f"r3: keys [batch, {heads}, tokens, {width}] and queries of a multiple of these "
                f"heads are required, as the maps were fitted to, got {tensors.shapes[key]} "
                f"({key}) and {tensors.shapes[query]} ({query})"
            )
        of_queries = own.of_queries.repeat_interleave(found[0][0] // heads, 0)
        given = {
            "query": of_queries.numpy()[None],
            "key": own.matrix.numpy()[None],
            "shift": own.shift.numpy()[None, :, None],
        }
        for part, values in given.items():
            tensors.store(f"{part}_map_{number}{ENDING}", values, key)
        factors[query] = (f"query_map_{number}{ENDING}", None)
        factors[key] = (f"key_map_{number}{ENDING}", f"shift_map_{number}{ENDING}")
    return factors


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
        if node.op_type in ("MatMul", "Add") and node.input[1].endswith(ENDING)
    ]
    return index.beyond(first, lambda node: node.op_type in (*MOVES, *_PRODUCTS, "Concat"))


def queries_and_keys(index: GraphIndex) -> list[tuple[str, str]]:
    """Return the tensors behind rotary embeddings that scores are products of, in order.

    :raises ValueError: there are none, or scores of something else.
    """
    varying = _varying(index)
    found: dict[tuple[str, str], None] = {}
    faults = []
    for node in _scores(index, varying):
        query, key = (_source(index, name, varying) for name in node.input)
        faults += [name for name in (query, key) if not _is_rotary(index, name, varying)]
        found[query, key] = None
    if faults or not found:
        seen = f"{', '.join(faults[:3])} are none" if faults else "no scores were found"
        raise ValueError(
            "r3: an attention whose scores are products of queries and keys behind a rotary "
            f"embedding, as operators of the graph, is required, but {seen}; leave r3 out"
        )
    return list(found)


def check_shifts(index: GraphIndex) -> None:
    """Refuse scores that are bounded before their softmax, which would see a shift of keys.

    :raises ValueError: They are.
    """
    for node in _scores(index, _varying(index)):
        behind = index.beyond(node.output, lambda each: each.op_type in _BEHIND_SCORES)
        bounding = [r for name in behind for r in index.readers(name) if r.op_type == _BOUNDED]
        if bounding:
            raise ValueError(
                'r3="fitted": scores that go to their softmax as they are, scaled and masked, are '
                f"required, but {bounding[0].name} bounds them; pass r3=True"
            )


def _scores(index: GraphIndex, varying: Collection[str]) -> Iterator[NodeProto]:
    """Yield products of two activations that go to a softmax."""
    through = (*_BEHIND_SCORES, _BOUNDED)
    for node in index.nodes:
        if node.op_type == "MatMul" and all(name in varying for name in node.input):
            behind = index.beyond(node.output, lambda each: each.op_type in through)
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


def _shapes_and_types(
    model: onnx.ModelProto, names: list[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Return the shapes of tensors, 0 for what is not known, and ONNX's types.

    :raises ValueError: The last dimension of one is not known.
    """
    graph = infer_shapes(model, data_prop=True).graph
    shapes, types = {}, {}
    for value in (*graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = tuple(dim.dim_value for dim in kind.shape.dim)
        if value.name in names and dims and dims[-1] > 0:
            shapes[value.name], types[value.name] = dims, kind.elem_type
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise ValueError(
            f"r3: queries and keys of a known width are required, but the shape of {unknown[0]} "
            "cannot be inferred; export the model with static shapes"
        )
    return shapes, types
