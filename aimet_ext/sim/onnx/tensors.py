"""Values of tensors inside an ONNX simulation, as its quantizers leave them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["quantized_names", "tensor_values"]


def quantized_names(sim: Any, names: Iterable[str]) -> dict[str, str]:
    """What the readers of a tensor read: the output of its quantizer, or itself without one.

    :param names: outputs of operators; those that the simulation does not have are left out.
    """
    nodes = sim.model.model.graph.node
    quantized = {node.input[0]: node.output[0] for node in nodes if node.op_type == "QcQuantizeOp"}
    known = {name for node in nodes for name in node.output}
    return {name: quantized.get(name, name) for name in names if name in known}


def tensor_values(sim: Any, feed: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Values of tensors as arrays, after their quantizers, for one batch of inputs.

    :param names: outputs of operators; those that the simulation does not have are left out.
    """
    found = quantized_names(sim, names)
    with _session(sim, dict.fromkeys(found.values())) as session:
        values = session.run([*found.values()], dict(feed)) if found else []
    return dict(zip(found, values, strict=True))


@contextmanager
def _session(sim: Any, names: Iterable[str]) -> Iterator[Any]:
    """A session of the simulation that has these tensors as outputs too."""
    import onnx

    outputs = sim.model.model.graph.output
    count = len(outputs)
    there = {value.name for value in outputs}
    try:
        for name in names:
            if name not in there:
                outputs.append(
                    onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
                )
        yield type(sim.session)(
            sim.model.model,
            sim.providers,
            session_options=sim._ort_session_options,
            path=sim._path,
            save_as_external_data=sim._use_external_data,
        )
    finally:
        del outputs[count:]
