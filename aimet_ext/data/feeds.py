"""Batches as the inputs of a graph by name: read, checked, filled, and cut to a static shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from aimet_ext.data.batches import as_tensors, call_model, check_values, numbered_batches

Feed: TypeAlias = dict[str, np.ndarray[Any, Any]]
Numbered: TypeAlias = Iterator[tuple[int, dict[str, Tensor]]]

# Inputs of language models; the last two can be made where a batch does not give them.
_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"

_FORMS = (
    "a mapping from the model's inputs to arrays, arrays in the order of the inputs, or a pair of "
    "either and a label"
)


@dataclass(frozen=True)
class InputSpec:
    """Shape and type that a graph requires of an input.

    :param shape: sizes; a name or None where the size is free. None: any shape.
    :param dtype: None for any.
    """

    shape: tuple[int | str | None, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Fixed sizes of the dimensions, None for free ones."""
        return tuple(size if isinstance(size, int) else None for size in self.shape or ())

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor has as many dimensions, and the sizes that are fixed."""
        if self.shape is None:
            return True
        pairs = zip(self.sizes, tensor.shape, strict=False)
        return tensor.dim() == len(self.shape) and all(a in (None, b) for a, b in pairs)


def named_batches(dataloader: Any, inputs: Mapping[str, InputSpec]) -> list[dict[str, Tensor]]:
    """Return the batches of a dataloader as a graph's inputs by name, each one checked.

    A batch is a mapping from inputs to arrays or tensors (other keys are dropped), a single array
    for a graph with one input, a tuple or list of arrays in the order of the inputs, or a pair of
    any of these and a label. Arrays are not copied.

    :param dataloader: see :func:`~aimet_ext.data.batches.iterate_batches`.
    :param inputs: inputs of the graph, in order.
    :raises TypeError: ``dataloader`` is a single batch or no iterable, or a batch is of no form.
    :raises ValueError: there is no batch at all; or one lacks an input, or has another type or
        shape than the graph says, or holds NaN.
    """
    batches = []
    for number, item in numbered_batches(dataloader):
        named = _named(item, inputs, number)
        complete = all(name in named for name in inputs)
        batches.append({name: named[name] for name in inputs} if complete else named)
        check_inputs(batches[-1], inputs, number)
    return batches


def filled_batches(dataloader: Any, inputs: Mapping[str, InputSpec]) -> Numbered:
    """Yield the number of each batch, and its inputs by name with a mask and positions.

    Where a batch has a matrix but no mask, a mask of ones is made; positions count the tokens that
    the mask shows. What the batch gives as ``input_ids`` is the first input of a graph that has
    none of that name. Nothing is checked yet: see :func:`check_inputs`.

    :param dataloader: see :func:`named_batches`.
    """
    kept = {*inputs, _MASK}
    for number, item in numbered_batches(dataloader):
        given = _named(item, inputs, number)
        if inputs and _IDS in given and _IDS not in inputs:
            given = {next(iter(inputs)): given[_IDS], **given}
        batch = {name: tensor for name, tensor in given.items() if name in kept}
        matrix = next((tensor for tensor in batch.values() if tensor.dim() == 2), None)
        if matrix is not None:
            mask = batch.setdefault(_MASK, torch.ones_like(matrix))
            batch.setdefault(_POSITIONS, (mask.cumsum(-1) - 1).clamp(min=0))  # [batch, seq]
        yield number, batch


def graph_feeds(dataloader: Any, inputs: Mapping[str, InputSpec]) -> list[Feed]:
    """Return the batches of a dataloader as arrays by input, cut to the shape of an exported graph.

    Masks and positions are made as in :func:`filled_batches`. Ids, and what comes with them in the
    same shape ``[batch, seq]``, are cut into windows of the graph's length that do not overlap, in
    the order in which they come, and gathered to its batch size; a rest is left out. Other batches
    are cut into ones of the graph's batch size where that divides theirs. Where the batch size is
    free, it becomes 1.

    :param dataloader: see :func:`named_batches`.
    :raises TypeError: a batch is of no known form.
    :raises ValueError: there is no batch, one does not fit, or no window is complete.
    """
    taken = (
        (number, {name: batch[name] for name in inputs if name in batch})
        for number, batch in filled_batches(dataloader, inputs)
    )
    feeds = []
    for number, batch in _cut(taken, inputs):
        check_inputs(batch, inputs, number)
        feeds.append({name: batch[name].contiguous().numpy() for name in inputs})
    if not feeds:
        rows, length = next(spec.sizes for spec in inputs.values() if len(spec.sizes) == 2)
        raise ValueError(
            f"dataloader must give at least {rows or 1} x {length} tokens, the shape that the "
            "model was exported with; give more text"
        )
    return feeds


def random_feeds(inputs: Mapping[str, InputSpec], count: int, vocabulary: int) -> list[Feed]:
    """Return made-up inputs: ids of a fixed seed, masks of ones, positions in order, else noise.

    :raises ValueError: a dimension of an input is not fixed.
    """
    generator = np.random.default_rng(0)
    return [
        {name: _made_up(name, spec, vocabulary, generator) for name, spec in inputs.items()}
        for _ in range(count)
    ]


@torch.no_grad()
def run_feeds(runner: Any, feeds: Iterable[Feed]) -> list[np.ndarray[Any, Any]]:
    """Return the first output for each feed.

    :param runner: torch module, or session of onnxruntime.
    """
    if not isinstance(runner, nn.Module):
        return [runner.run(None, dict(feed))[0] for feed in feeds]
    found = []
    for feed in feeds:
        output = call_model(runner, feed)
        logits = getattr(output, "logits", output)
        logits = logits if isinstance(logits, Tensor) else logits[0]
        found.append(logits.as_subclass(Tensor).float().cpu().numpy())
    return found


def check_inputs(batch: Mapping[str, Tensor], inputs: Mapping[str, InputSpec], number: int) -> None:
    """Refuse a batch that a graph cannot take.

    :param number: place of the batch in the dataloader, for the error.
    :raises ValueError: an input is missing, of another type or shape, or holds NaN; or all are
        empty.
    """
    missing = [name for name in inputs if name not in batch]
    if missing:
        raise ValueError(
            f"batch {number} must hold the model's inputs {', '.join(inputs)}; "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, it holds "
            f"{', '.join(map(str, batch)) or 'nothing'}"
        )
    for name, spec in inputs.items():
        value = batch[name]
        if spec.dtype is not None and value.dtype != spec.dtype:
            required, got = (str(d).removeprefix("torch.") for d in (spec.dtype, value.dtype))
            raise ValueError(
                f"batch {number}: input {name!r} must be {required}, got {got}; convert it"
            )
        if not spec.fits(value):
            sizes = ", ".join(str(size or "any") for size in spec.shape or ())
            raise ValueError(
                f"batch {number}: input {name!r} must be of shape [{sizes}], got "
                f"{list(value.shape)}"
            )
    if not any(batch[name].numel() for name in inputs):
        raise ValueError(f"batch {number} must hold at least one element, all inputs are empty")
    check_values({name: batch[name] for name in inputs}, number)


def _named(item: Any, inputs: Mapping[str, InputSpec], number: int) -> dict[str, Tensor]:
    """Return the inputs that a batch holds by name, and arrays beside them.

    :raises TypeError: it is of no form that gives them.
    :raises ValueError: there are more values than inputs and a label.
    """
    pair = isinstance(item, tuple | list) and len(item) == 2
    if pair and isinstance(item[0], Mapping | tuple | list):
        item = item[0]  # the other one is the label
    item = as_tensors(item)
    if isinstance(item, Mapping):
        kept = {str(key): v for key, v in item.items() if key in inputs or isinstance(v, Tensor)}
        return {name: _on_cpu(value, name, number) for name, value in kept.items()}
    if isinstance(item, Tensor | np.ndarray):
        item = (item,)
    if not isinstance(item, tuple | list):
        raise TypeError(f"batch {number} must be {_FORMS}; got {type(item).__name__}")
    if len(item) > len(inputs) + 1:
        raise ValueError(
            f"batch {number} must hold one array for each of the model's inputs "
            f"({', '.join(inputs)}) and a label at most, got {len(item)} values"
        )
    pairs = zip(inputs, item, strict=False)
    return {name: _on_cpu(value, name, number) for name, value in pairs}


def _cut(batches: Numbered, inputs: Mapping[str, InputSpec]) -> Numbered:
    """Yield batches of the graph's size and length; those that cannot be cut as they are."""
    shapes = [spec.sizes for spec in inputs.values()]
    sizes = {shape[0] if shape else None for shape in shapes}
    lengths = {shape[1] for shape in shapes if len(shape) == 2 and shape[1]}
    length = lengths.pop() if len(lengths) == 1 else 0
    size = next(iter(sizes), None) or 1
    held: list[dict[str, Tensor]] = []
    for number, batch in batches:
        counts = {tensor.shape[0] if tensor.dim() else 0 for tensor in batch.values()}
        flat = all(tensor.dim() == 2 for tensor in batch.values())
        width = min((tensor.shape[1] for tensor in batch.values()), default=0) if flat else 0
        count = counts.pop() if len(counts) == 1 and len(sizes) == 1 else 0
        if count and length and width >= length:
            held += [
                {n: t[row : row + 1, start : start + length] for n, t in batch.items()}
                for row in range(count)
                for start in range(0, width - length + 1, length)
            ]
            while len(held) >= size:
                group, held = held[:size], held[size:]
                yield number, {name: torch.cat([part[name] for part in group]) for name in batch}
        elif count > size and count % size == 0:
            for start in range(0, count, size):
                yield number, {n: t[start : start + size] for n, t in batch.items()}
        else:
            yield number, batch


def _on_cpu(value: Any, name: str, number: int) -> Tensor:
    if not isinstance(value, Tensor):
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(
            f"batch {number}: input {name!r} must be an np.ndarray or torch.Tensor of numbers, "
            f"got {kind}"
        )
    return value.detach().cpu()


def _made_up(
    name: str, spec: InputSpec, vocabulary: int, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    shape = [size or 0 for size in spec.sizes]
    if not all(shape):
        raise ValueError(
            f"input {name!r} must have a fixed shape to make up data for it, got {spec.sizes}; "
            "pass a dataloader"
        )
    dtype = torch.empty(0, dtype=spec.dtype).numpy().dtype
    if name == _MASK or dtype.kind == "b":
        return np.ones(shape, dtype)
    if name == _POSITIONS:
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if dtype.kind in "iu":
        return generator.integers(0, vocabulary, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)
