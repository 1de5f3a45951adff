"""Keys and values of attention, which a runtime keeps between calls, as tensors of their own."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from aimet_ext.onnx.same_tensors import MOVES

__all__ = ["keep_keys_and_values"]


def keep_keys_and_values(model: onnx.ModelProto) -> list[str]:
    """Put an Identity behind the keys and values of each attention, in place.

    So what is kept can have another width than what is computed. Keys are those that scores are
    computed of, after rotary embeddings and before they are scaled.

    :param model: float model.
    :returns: names of the Identities' outputs.
    """
    graph = model.graph
    stored = {proto.name for proto in graph.initializer}
    stored.update(node.output[0] for node in graph.node if node.op_type == "Constant")
    producer = {name: node for node in graph.node for name in node.output}
    sources = dict.fromkeys(
        _source(node.input[1], producer, stored)
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] not in stored
    )
    names = {source: f"{source}_kept" for source in sources if source in producer}
    nodes = []
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for place, name in enumerate(copy.input):
            copy.input[place] = names.get(name, name)
        nodes.append(copy)
        for name in node.output:
            if name in names:
                label = f"{node.name}/kept"
                nodes.append(onnx.helper.make_node("Identity", [name], [names[name]], name=label))
    del graph.node[:]
    graph.node.extend(nodes)
    return list(names.values())


def _source(name: str, producer: dict[str, onnx.NodeProto], stored: Collection[str]) -> str:
    """The tensor whose values another one holds, moved or times a constant."""
    while (node := producer.get(name)) is not None:
        if node.op_type in MOVES:
            name = node.input[0]
        elif node.op_type == "Mul" and any(each in stored for each in node.input):
            name = next(each for each in node.input if each not in stored)
        else:
            break
    return name
