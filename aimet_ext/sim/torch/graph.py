"""The ONNX file of a PyTorch simulation, and operators that torch's exporter has not, or wrong."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import aimet_torch.onnx
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aimet_ext.walk.hooks import evaluating

_SETTINGS = {"encoding_version": "2.0.0", "export_int32_bias": False, "dynamo": False}


class Apart(Protocol):
    """Receiver of the weights of a graph, see :class:`aimet_ext.onnx.apart.WeightsApart`."""

    def serialize(
        self, export: Callable[..., Any], graph: Any, params: Mapping[str, Any], *options: Any
    ) -> tuple[bytes, Any, Any, Any]:
        """Do the work of ``torch._C.Graph._export_onnx``."""

    def fold_transposes(self, model: Any, folder: Any = None) -> dict[str, str]:
        """Do the work of ``aimet_torch.onnx._fold_linear_weight_transpose``."""


def write_graph(
    sim: Any, path: Path, args: tuple[Any, ...], apart: Apart, options: Mapping[str, Any]
) -> None:
    """See :meth:`aimet_ext.sim.torch.adaptor.TorchSim.write_graph`."""
    sim._apply_qdq_to_model_parameters = lambda model: nullcontext()
    try:
        with warnings.catch_warnings(), SpeltOut(), _handed_to(apart):
            warnings.simplefilter("ignore")  # torch.onnx and tracing, about past and future
            sim.onnx.export(args, str(path), **_SETTINGS, **options)
    finally:
        del sim._apply_qdq_to_model_parameters


def try_graph(model: nn.Module, args: tuple[Any, ...], apart: Apart, opset_version: int) -> None:
    """Let torch's exporter make the graph of a float model, as :func:`write_graph` does it.

    :param args: Positional arguments to trace with.
    """
    with warnings.catch_warnings(), SpeltOut(), _handed_to(apart), evaluating(model):
        warnings.simplefilter("ignore")
        file: Any = io.BytesIO()
        torch.onnx.export(model, args, file, opset_version=opset_version, dynamo=False)


@contextmanager
def _handed_to(apart: Apart) -> Iterator[None]:
    """Let the exporters hand over the weights; neither has a way to ask for that."""
    graph: Any = torch._C.Graph
    export = graph._export_onnx
    fold = aimet_torch.onnx._fold_linear_weight_transpose
    graph._export_onnx = lambda *given: apart.serialize(export, *given)
    aimet_torch.onnx._fold_linear_weight_transpose = apart.fold_transposes
    try:
        yield
    finally:
        graph._export_onnx = export
        aimet_torch.onnx._fold_linear_weight_transpose = fold


class SpeltOut(TorchFunctionMode):
    """Computes a few operators by others that the exporter can write."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the replacement of ``func``, if it has one for these arguments."""
        kwargs = kwargs or {}
        replacement = _REPLACED.get(func)
        found = NotImplemented if replacement is None else replacement(*args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


def _repeat_interleave(x: Tensor, repeats: Any, dim: int | None = None, **others: Any) -> Any:
    """Repeat by a constant; the exporter's own way counts a dimension too many."""
    if not isinstance(repeats, int):
        return NotImplemented
    x, dim = (x.flatten(), 0) if dim is None else (x, dim % x.dim())
    shape = [-1] * x.dim()
    shape.insert(dim + 1, repeats)
    return x.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)


def _diff(
    x: Tensor,
    n: int = 1,
    dim: int = -1,
    prepend: Tensor | None = None,
    append: Tensor | None = None,
) -> Tensor:
    parts = [part for part in (prepend, x, append) if part is not None]
    x = torch.cat(parts, dim) if len(parts) > 1 else x
    for _ in range(n):
        upper, lower = x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, 0, x.shape[dim] - 1)
        x = upper ^ lower if x.dtype is torch.bool else upper - lower
    return x


def _cumsum(x: Tensor, dim: int, **others: Any) -> Any:
    """Count truth values as integers, which ONNX cannot add up as they are."""
    return x.long().cumsum(dim, **others) if x.dtype is torch.bool else NotImplemented


def _rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    last = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    normal = (wide * torch.rsqrt(wide.square().mean(last, keepdim=True) + eps)).to(x.dtype)
    return normal if weight is None else normal * weight


def _expm1(x: Tensor) -> Tensor:
    return x.exp() - 1


def _permute(x: Tensor, *dims: Any) -> Tensor:
    """Count axes from the start; the exporter writes negative ones as they are."""
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return x.permute([axis % x.dim() for axis in order])


def _solve_triangular(
    a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """Multiply with the inverse of ``I - N``, N strictly triangular: the finite sum of its powers.

    Linear attention with a delta rule solves one such system in each chunk.
    """
    if not (left and unitriangular):
        return NotImplemented
    size = a.shape[-1]
    power = -(a.triu(1) if upper else a.tril(-1))
    identity = torch.eye(size, dtype=a.dtype, device=a.device)
    total, terms = identity + power, 2
    while terms < size:  # (I + N)(I + N²)(I + N⁴)…
        power = power @ power
        total, terms = total @ (identity + power), 2 * terms
    return total @ b


_REPLACED: Mapping[Any, Callable[..., Any]] = {
    torch.repeat_interleave: _repeat_interleave,
    torch.Tensor.repeat_interleave: _repeat_interleave,
    torch.diff: _diff,
    torch.Tensor.diff: _diff,
    torch.cumsum: _cumsum,
    torch.Tensor.cumsum: _cumsum,
    torch.permute: _permute,
    torch.Tensor.permute: _permute,
    torch.linalg.solve_triangular: _solve_triangular,
    torch.expm1: _expm1,
    torch.Tensor.expm1: _expm1,
    torch.rms_norm: _rms_norm,
    torch.nn.functional.rms_norm: _rms_norm,
}
