"""Calibration batches for an ONNX model, in all forms in which they are handed around."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import ValueInfoProto
from torch import Tensor

from aimet_ext.onnx.ops.common import DTYPES

__all__ = ["check_inputs", "filled_values", "named_values", "onnx_batches"]

# Inputs of language models that can be made where a batch does not give them.
_MASK, _POSITIONS = "attention_mask", "position_ids"

_FORMS = (
    "a mapping from the model's inputs to arrays, arrays in the order of the inputs, or a pair of "
    "either and a label"
)


def onnx_batches(
    dataloader: Any, graph_inputs: Mapping[str, ValueInfoProto]
) -> list[dict[str, Tensor]]:
    """The batches of a dataloader as inputs by name, each one checked; arrays are not copied.

    :param dataloader: list, tuple, torch DataLoader or any other iterable, which is walked through
        once; a function without arguments that returns one; or an object that makes one: Olive's
        data containers (``create_dataloader``) and onnxruntime's ``CalibrationDataReader``
        (``get_next``). A batch is a mapping from inputs to ``np.ndarray`` or ``torch.Tensor``
        (other keys are dropped), a single array for a model with one input, a tuple or list of
        arrays in the order of the inputs, or a pair of any of these and a label.
    :param graph_inputs: inputs of the graph, those that are no initializers.
    :raises TypeError: ``dataloader`` is a single batch or none of these, or a batch is.
    :raises ValueError: there is no batch at all; or one lacks an input, or has another type or
        shape than the graph says, or holds NaN.
    """
    batches = []
    for number, item in enumerate(_iterate(dataloader)):
        named = named_values(item, list(graph_inputs), number)
        batch = {name: _tensor(value, name, number) for name, value in named.items()}
        check_inputs(batch, graph_inputs, number)
        _check_values(batch, number)
        batches.append(batch)
    if not batches:
        raise ValueError(
            "dataloader must yield at least one batch, it yielded none; a generator can be walked "
            "through only once, so pass a list, or a function that returns a generator"
        )
    return batches


def check_inputs(
    batch: Mapping[str, Tensor], graph_inputs: Mapping[str, ValueInfoProto], number: int
) -> None:
    """Refuse a batch that the graph cannot take.

    :param number: of the batch, for the error.
    :raises ValueError: an input is missing, or of another type or shape.
    """
    missing = [name for name in graph_inputs if name not in batch]
    if missing:
        raise ValueError(
            f"batch {number} must hold the model's inputs {', '.join(graph_inputs)}; "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, it holds "
            f"{', '.join(map(str, batch)) or 'nothing'}"
        )
    for name, info in graph_inputs.items():
        value, kind = batch[name], info.type.tensor_type
        required = DTYPES.get(kind.elem_type)
        if required is not None and value.dtype != required:
            raise ValueError(
                f"batch {number}: input {name!r} must be {_name(required)}, got "
                f"{_name(value.dtype)}; convert it"
            )
        if kind.HasField("shape") and not _fits(value, kind.shape):
            dims = [_dim(dim) for dim in kind.shape.dim]
            raise ValueError(
                f"batch {number}: input {name!r} must be of shape [{', '.join(dims)}], got "
                f"{list(value.shape)}"
            )


def _fits(value: Tensor, shape: Any) -> bool:
    """Whether a tensor has as many dimensions, and the sizes of those that are fixed."""
    if value.dim() != len(shape.dim):
        return False
    fixed = (dim.dim_value for dim in shape.dim)  # 0 or below: any size
    return all(f <= 0 or f == size for f, size in zip(fixed, value.shape, strict=True))


def _dim(dim: Any) -> str:
    return str(dim.dim_value) if dim.dim_value > 0 else dim.dim_param or "any"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _iterate(dataloader: Any) -> Iterable[Any]:
    """What yields the batches."""
    if isinstance(dataloader, Tensor | np.ndarray | Mapping | str | bytes):
        raise TypeError(
            f"dataloader must yield batches, got a single {type(dataloader).__name__}; "
            "put it into a list"
        )
    if hasattr(dataloader, "create_dataloader"):
        return _iterate(dataloader.create_dataloader())
    if hasattr(dataloader, "get_next"):
        return _read(dataloader)
    if hasattr(dataloader, "__iter__") or hasattr(dataloader, "__getitem__"):
        return _sequence(dataloader)
    if callable(dataloader):
        made = dataloader()
        if made is None or callable(made):
            raise TypeError(
                "a dataloader that is a function must return an iterable of batches, got "
                f"{type(made).__name__}"
            )
        return _iterate(made)
    raise TypeError(
        "dataloader must be an iterable of batches or a function that returns one, got "
        f"{type(dataloader).__name__}"
    )


def _sequence(dataloader: Any) -> Iterator[Any]:
    """Iterates by ``__getitem__`` too; a data set that knows its length is not asked beyond it."""
    if hasattr(dataloader, "__iter__") or not hasattr(dataloader, "__len__"):
        yield from dataloader
        return
    for index in range(len(dataloader)):
        yield dataloader[index]


def _read(reader: Any) -> Iterator[Any]:
    """All that a reader has, from the beginning if it can be rewound."""
    if callable(getattr(reader, "rewind", None)):
        reader.rewind()
    while (item := reader.get_next()) is not None:
        yield item


def named_values(item: Any, names: Sequence[str], number: int) -> dict[str, Any]:
    """A batch's values by the names of inputs; of a mapping without all of them, what it has.

    :param item: one array, arrays in the order of ``names``, a mapping, or a pair of these and a
        label.
    :param number: of the batch, for errors.
    :raises TypeError: it is none of these.
    :raises ValueError: there are more values than inputs and a label.
    """
    pair = isinstance(item, tuple | list) and len(item) == 2
    if pair and isinstance(item[0], Mapping | tuple | list):
        item = item[0]  # the other one is the label
    if isinstance(item, Mapping):
        if all(name in item for name in names):
            return {name: item[name] for name in names}
        # What is there instead of the inputs helps to see the mistake.
        return {str(key): value for key, value in item.items() if _is_array(value)}
    if _is_array(item):
        item = (item,)
    if not isinstance(item, tuple | list):
        raise TypeError(f"batch {number} must be {_FORMS}; got {type(item).__name__}")
    if len(item) > len(names) + 1:
        raise ValueError(
            f"batch {number} must hold one array for each of the model's inputs "
            f"({', '.join(names)}) and a label at most, got {len(item)} values"
        )
    return dict(zip(names, item, strict=False))


def filled_values(item: Any, names: Sequence[str], number: int) -> dict[str, Tensor]:
    """A batch's inputs as tensors by name, with a mask of ones and positions where it has none.

    Both are of the shape of the first input that is a matrix, and made only if they are inputs.
    Positions count the tokens that a mask in the batch shows, also one that is no input.

    :param item: see :func:`named_values`, as ``number`` and what is raised.
    """
    given = named_values(item, names, number)
    kept = [name for name in given if name in names or name == _MASK]
    tensors = {name: torch.as_tensor(given[name]).detach().cpu() for name in kept}
    ids = next((tensor for tensor in tensors.values() if tensor.dim() == 2), None)
    if ids is not None:
        mask = tensors.setdefault(_MASK, torch.ones_like(ids))
        tensors.setdefault(_POSITIONS, (mask.cumsum(-1) - 1).clamp(min=0))  # [batch, seq]
    return {name: tensors[name] for name in names if name in tensors}


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _tensor(value: Any, name: str, number: int) -> Tensor:
    """The same memory as a tensor on the CPU; arrays that torch cannot take are copied."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(
            f"batch {number}: input {name!r} must be an np.ndarray or torch.Tensor of numbers, "
            f"got {kind}"
        )
    plain = np.ascontiguousarray(value).reshape(value.shape)
    plain = plain.astype(plain.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(plain if plain.flags.writeable else plain.copy())


def _check_values(batch: Mapping[str, Tensor], number: int) -> None:
    if not any(value.numel() for value in batch.values()):
        raise ValueError(f"batch {number} must hold at least one element, all inputs are empty")
    for name, value in batch.items():
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ValueError(
                f"batch {number}: input {name!r} holds NaN; remove it from the calibration data"
            )
