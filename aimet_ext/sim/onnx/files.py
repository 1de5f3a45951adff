"""An ONNX simulation written as files that others read.

A width that ONNX has no type for travels in the next wider one: the weights lie on their own grid
already, and the wider grid has the same points and more. 3 bits are integers -4 … 3 of an int4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from aimet_onnx import ir_utils, quantsim
from aimet_onnx._encoding import AffineEncoding, EncodingBase, LPBQEncoding
from aimet_onnx.common.onnx._utils import to_array
from aimet_onnx.graph_passes.fusions import inline_all_supergroups
from aimet_onnx.quantsim import encodings_to_onnx_qdq

from aimet_ext.onnx.index import stored_values
from aimet_ext.onnx.reading import read_external, read_model
from aimet_ext.onnx.values import put_bytes
from aimet_ext.onnx.writing import EXTERNAL_LIMIT
from aimet_ext.sim.onnx.quantizers import rounds_to_integers
from aimet_ext.sim.onnx.state import enabled_quantizers, layer_biases, outside, quantize_constant

_WIDTHS = (4, 8, 16, 32)


def containers(sim: Any) -> dict[str, int]:
    """Return the next wider ONNX type of each quantized constant whose width ONNX lacks."""
    found = stored_values(sim.model.model.graph)
    return {
        name: next(width for width in _WIDTHS if width >= quantizer.bitwidth)
        for name, quantizer in enabled_quantizers(sim).items()
        if name in found and rounds_to_integers(quantizer) and quantizer.bitwidth not in _WIDTHS
    }


def quantized_constants(sim: Any, names: Collection[str] | None = None) -> Iterator[Any]:
    """Yield ``(name, quantized values)`` of constants, one at a time.

    :param names: Names of constants; None: all with a quantizer in use, int32 biases left out.
    """
    found = stored_values(sim.model.model.graph)
    for name, quantizer in enabled_quantizers(sim).items():
        if name in found and quantizer.bitwidth < 32 and (names is None or name in names):
            yield name, quantize_constant(quantizer, found[name])


def overwrite(model: Any, values: Iterable[tuple[str, Any]]) -> None:
    """Replace the values of a ModelProto's constants of these names."""
    found = stored_values(model.graph)
    for name, value in values:
        put_bytes(found[name], np.ascontiguousarray(value).tobytes())


def load_with(path: Path, values: Iterable[tuple[str, Any]]) -> Any:
    """Load a ModelProto from a file, with values in the place of its constants of these names.

    Of external data only the rest is read: protobuf keeps the room of a value that is replaced.
    """
    model = read_model(path, external=False)
    overwrite(model, values)
    read_external(model, path)
    return model


def copy_constants(model: Any, target: Any) -> None:
    """Copy a ModelProto's constants into another one.

    :raises ValueError: a name, a shape or a type differs; all such are named and nothing changes.
    """
    source, found = stored_values(model.graph), stored_values(target.graph)
    faults = [f"{name} is missing" for name in found if name not in source]
    for name, proto in source.items():
        kind, shape = proto.data_type, tuple(proto.dims)
        if name in found and (found[name].data_type, tuple(found[name].dims)) != (kind, shape):
            faults.append(f"{name} has shape {tuple(found[name].dims)} instead of {shape}")
    if faults:
        raise ValueError(
            f"a simulation of the model that was exported is required, but {'; '.join(faults[:5])}"
        )
    overwrite(target, ((name, to_array(source[name])) for name in found))


def same_value(proto: Any, expected: Any) -> bool:
    """Return True if a constant holds the bytes of an array or of another constant."""
    values = expected if isinstance(expected, np.ndarray) else to_array(expected)
    read = to_array(proto)
    return bool(read.shape == values.shape and read.tobytes() == values.tobytes())


def save_float_model(
    sim: Any, path: Path, rounded: Mapping[str, Any], *, external: bool | None
) -> None:
    """Write the model without its quantizers, as ``sim.export`` does.

    :param rounded: Values by constant that stand in the place of the float ones.
    :param external: True to write weights to ``{name}.data``; None: if they are too large.
    """
    model = onnx_ir.from_proto(sim.model.model)
    ir_utils.remove_aimet_quantizers(model)
    inline_all_supergroups(model)
    outputs = [node.outputs[0] for node in model.graph if node.op_type == "Constant"]
    for value in [*model.graph.initializers.values(), *outputs]:
        if value.name in rounded:
            ir_utils.set_static_tensor(value, rounded[value.name])
    if external or (external is None and _is_large(sim.model.model)):
        onnx_ir.save(model, path, external_data=f"{path.name}.data")
    else:
        onnx_ir.save(model, path)


def write_encodings(
    sim: Any, path: Path, version: str, wider: Mapping[str, int], *, int32_biases: bool
) -> None:
    """Write encodings, those of ``wider`` in their containers, by AIMET's own exporter."""

    def get_encodings(names: Collection[str], version: str) -> list[dict[str, Any]]:
        found = []
        for name in names:
            encoding = EncodingBase.from_quantizer(sim.qc_quantize_op_dict[name])
            if encoding is not None:
                encoding = _portable(encoding, wider.get(name), version)
                found.append((name, encoding.to_qnn_encoding_dict(version)))
        return [{**entry, "name": name} for name, entry in found if entry]

    sim._get_encodings = get_encodings
    try:
        sim.export(
            str(path.parent),
            path.name.removesuffix(".encodings"),
            export_model=False,
            encoding_version=version,
            export_int32_bias=int32_biases,
        )
    finally:
        del sim._get_encodings


def lpbq_as_blocks(sim: Any, wider: Mapping[str, int]) -> list[str]:
    """Return the LPBQ weights that encodings 2.0.0 and QDQ hold as blocks with float scales.

    Both have integer scales only of as many bits as the weight. The scales' values are the same.
    """
    return [
        name
        for name, quantizer in enabled_quantizers(sim).items()
        if quantizer._scale_quantizer is not None
        and quantizer._scale_quantizer.scale_bits != wider.get(name, quantizer.bitwidth)
    ]


def integer_scales(sim: Any, wider: Mapping[str, int]) -> list[str]:
    """Return the LPBQ weights that have integer scales in a QDQ model too.

    There a block's scale is the product of float32 numbers, where AIMET has the channel's scale in
    float64: quantized weights are the same integers, and may differ in the last bit as floats.
    """
    blocks = lpbq_as_blocks(sim, wider)
    found = enabled_quantizers(sim)
    return [n for n, q in found.items() if q._scale_quantizer is not None and n not in blocks]


def unfit_for_encodings(sim: Any) -> list[str]:
    """Return the tensors of whose quantizers AIMET has no encoding."""
    found = enabled_quantizers(sim).items()
    return [name for name, q in found if not rounds_to_integers(q) and q.bitwidth > 16]


def unfit_for_qdq(sim: Any, wider: Mapping[str, int]) -> list[str]:
    """Return the tensors that a QDQ model cannot hold, each with the reason."""
    found, faults = stored_values(sim.model.model.graph), []
    for name, quantizer in enabled_quantizers(sim).items():
        if not rounds_to_integers(quantizer):
            continue
        if quantizer.bitwidth not in _WIDTHS and name not in wider:
            faults.append(f"{name} ({quantizer.bitwidth} bits, and it is no constant)")
        elif quantizer.quant_info.blockSize and any(d > 1 for d in found[name].dims[2:]):
            faults.append(f"{name} (blocks of a {len(found[name].dims)}-D weight)")
    half = {10: "float16", 16: "bfloat16"}  # TensorProto.FLOAT16, TensorProto.BFLOAT16
    faults += [f"{n} ({half[p.data_type]})" for n, p in found.items() if p.data_type in half]
    return faults


def missing_int32_biases(sim: Any, encoded: Collection[str]) -> list[str]:
    """Return the biases of layers with a quantized weight that have no encoding."""
    return [n for n, q in layer_biases(sim) if n not in encoded and rounds_to_integers(q)]


def qdq_model(sim: Any, **options: Any) -> Any:
    """Return AIMET's QDQ model of a simulation, constants as integers.

    AIMET makes an input of every size that is a number, also of -1, as some files write a size
    that is free: meanwhile those have a name.

    :param options: Further ones of AIMET.
    """
    inputs = [value.type.tensor_type.shape.dim for value in sim.model.model.graph.input]
    free = [(dim, dim.dim_value) for dims in inputs for dim in dims if dim.dim_value < 0]
    for dim, _ in free:
        dim.dim_param = "free"
    try:
        return sim.to_onnx_qdq(prequantize_constants=True, **options)
    finally:
        for dim, size in free:
            dim.dim_value = size


def save_qdq_model(model: Any, encodings: Mapping[str, Any], path: Path, *, external: bool) -> None:
    """Write the QDQ model of a float model and its encodings, constants as integers.

    :param model: Float model whose quantized constants are on their grids.
    :param encodings: Encodings of version 2.0.0.
    :raises OutsideError: AIMET cannot convert it.
    """
    stored = set(stored_values(model.graph))
    with outside("AIMET's exporter"), _types_looked_up():
        converted = encodings_to_onnx_qdq(model, dict(encodings), prequantize_constants=True)
    # Files of IR 3 list their weights among the inputs, of which integers take the place.
    inputs = [value for value in converted.graph.input if value.name not in stored]
    del converted.graph.input[:]
    converted.graph.input.extend(inputs)
    converted.ir_version = max(4, converted.ir_version)
    name_nodes(converted)
    save_model(converted, path, external=external)


@contextmanager
def _types_looked_up() -> Iterator[None]:
    """Open a context in which AIMET looks types up; it searches the whole model for each tensor."""
    searching, known = quantsim._tensor_float_type, dict[str, int]()

    def look_up(model: onnx.ModelProto, name: str) -> Any:
        if not known:
            graph = model.graph
            for value in (*graph.input, *graph.value_info, *graph.output):
                if kind := value.type.tensor_type.elem_type:
                    known.setdefault(value.name, kind)
            known.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
        return onnx.helper.tensor_dtype_to_np_dtype(known.get(name, onnx.TensorProto.FLOAT))

    quantsim._tensor_float_type = look_up
    try:
        yield
    finally:
        quantsim._tensor_float_type = searching


def name_nodes(model: Any) -> None:
    """Give every node a name: AIMET's reader of QDQ models keeps one node of each name only.

    The conversion to a newer opset, which QDQ models often need, makes nodes without one.
    """
    names = {node.name for node in model.graph.node}
    for node in model.graph.node:
        if not node.name and node.output:
            stem = name = f"{node.op_type}_{node.output[0]}"
            number = 0
            while name in names:
                number += 1
                name = f"{stem}_{number}"
            node.name = name
            names.add(name)


def save_model(model: Any, path: Path, *, external: bool) -> None:
    """Write a ModelProto, with the weights beside it if asked for or if they are too large."""
    if external or _is_large(model):
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save_model(model, str(path))


def _portable(encoding: Any, width: int | None, version: str) -> Any:
    """Return an encoding in the form that other readers take; the points of its grid stay."""
    if not isinstance(encoding, AffineEncoding):
        return encoding
    dtype, kind = encoding.dtype, encoding.dtype.rstrip("0123456789")
    if isinstance(encoding, LPBQEncoding):
        scale_bits = encoding.decompressed_bitwidth() - encoding.bitwidth
        bits = width or encoding.bitwidth
        dtype = f"{kind}{bits}"
        if version == "1.0.0" or scale_bits == bits:
            return LPBQEncoding(
                encoding.per_channel_float_scale,
                encoding.per_block_int_scale,
                dtype,
                encoding.channel_axis,
                encoding.block_axis,
                encoding.block_size,
                f"{kind}{bits + scale_bits}",
            )
        scale, offset = encoding.scale, encoding.offset
    elif width is None:
        return encoding
    else:
        scale, offset, dtype = encoding.scale, encoding.offset, f"{kind}{width}"
        if np.any(offset % 1):  # (q + 1/2) s = (2 q + 1) s / 2: odd integers of half the step
            scale, offset = scale / 2, np.zeros_like(offset)
    return AffineEncoding(
        scale, offset, dtype, encoding.channel_axis, encoding.block_axis, encoding.block_size
    )


def _is_large(model: onnx.ModelProto) -> bool:
    """Return True for a model whose constants do not fit into its file."""
    return sum(_bytes(proto) for proto in stored_values(model.graph).values()) > EXTERNAL_LIMIT


def _bytes(proto: Any) -> int:
    count = int(np.prod(proto.dims, dtype=np.int64))
    if proto.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return count // 2
    return count * onnx.helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize
