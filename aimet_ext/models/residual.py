"""The residual stream of a language model: what writes to it and reads it, in and beside blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from aimet_ext.core.equivalence import ScalePair
from aimet_ext.data.batches import tensors_in
from aimet_ext.errors import TransformRefused
from aimet_ext.models.topology import BlockTopology

#: Outputs of a model without its blocks, for some parameters in place of its own, in their dtype.
EndsFn: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class ReadNorm:
    """A norm of the hidden states and all layers that read it.

    :param module: Name of the norm.
    :param readers: Names of the layers.
    :param gain_offset: 1.0 for a norm that multiplies by ``1 + weight``, else 0.
    """

    module: str
    readers: tuple[str, ...]
    gain_offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Survey:
    """Outputs of a float model on a few batches, and ranges in it.

    :param outputs: Logits of each batch.
    :param ranges: ``(min, max)`` of what each quantizer of the simulation quantizes, by its name.
    """

    outputs: tuple[Tensor, ...]
    ranges: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class ResidualEnds:
    """Embeddings before the blocks, and the norm and output layers behind them, by full names.

    :param embeddings: Tables ``[…, hidden]`` whose rows are added to the first hidden states.
    :param norm: The norm behind the last block with the output layers that read it.
    :param outputs: Function that computes the model's outputs without the blocks.
    """

    embeddings: tuple[str, ...]
    norm: ReadNorm
    outputs: EndsFn

    @property
    def modules(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.embeddings, self.norm.module, *self.norm.readers)


def read_norms(block: BlockTopology) -> tuple[ReadNorm, ...]:
    """Return the norms of a block that its layers read, named within it.

    :raises TransformRefused: a norm is shared with other blocks, or one stands between a layer and
        the hidden states that it is added to.
    """
    if block.between:
        raise TransformRefused(
            f"{block.name}: layers must be added to the hidden states as they are for r1, but "
            f"{', '.join(block.between)} normalises them before, with gains that do not commute "
            "with a rotation; pass r1=False, which leaves the values to be rotated (r2)"
        )
    found = []
    for kind in ("norm_qkv", "norm_mlp"):
        pair = _pair(block, kind)
        if pair is None:
            raise TransformRefused(
                f"{block.name}: a norm whose gains only its readers take is required for r1: "
                f"{block.unavailable.get(kind, 'there is none')}; pass r1=False"
            )
        norm, *readers = pair.sides
        names = tuple(side.module for side in readers)
        found.append(ReadNorm(norm.module, names, norm.gain_offset))
    return tuple(found)


def writers(block: BlockTopology) -> tuple[str, ...]:
    """Return the layers of a block whose outputs are added to the hidden states."""
    return block.writers or (*block.stages[1], *block.stages[-1])


def value_pair(block: BlockTopology) -> ScalePair:
    """Return the pair of values and output projection, between which heads may be rotated.

    :raises TransformRefused: there is none, or its heads are not whole.
    """
    pair, width = _pair(block, "v_o"), block.head_dim
    if pair is None or not width:
        reason = block.unavailable.get("v_o", "the width of a head is unknown")
        raise TransformRefused(f"{block.name}: values cannot be rotated (r2): {reason}")
    start, _ = pair.sides[0].rows or (0, 0)
    if pair.size % width or start % width:
        raise TransformRefused(
            f"{block.name}: values must be whole heads for r2, got {pair.size} rows from {start} "
            f"and heads of {width}"
        )
    return pair


def _pair(block: BlockTopology, kind: str) -> ScalePair | None:
    return next((pair for pair in block.pairs if pair.kind == kind), None)


# ---- beside the blocks of a torch model ---------------------------------------------------------


def classify_ends(
    modules: Mapping[str, Mapping[str, tuple[int, ...]]],
    tables: Iterable[str],
    width: int,
    gain_offset: float,
) -> tuple[tuple[str, ...], ReadNorm]:
    """Return embeddings and the last norm with its readers, told by the shapes of their weights.

    :param modules: Shapes of all parameters outside of the blocks, by module and name.
    :param tables: Modules that are lookup tables.
    :param width: Channels of the hidden states.
    :raises TransformRefused: something is left that has parameters, or not what a model needs.
    """
    lookups = set(tables)
    embeddings: list[str] = []
    norms: list[str] = []
    readers: list[str] = []
    odd: list[str] = []
    for name, shapes in modules.items():
        weight, others = shapes.get("weight", ()), shapes.keys() - {"weight", "bias"}
        if not weight or weight[-1] != width or others or len(weight) > 2:
            odd.append(f"{name} ({', '.join(f'{key} {list(x)}' for key, x in shapes.items())})")
        elif name in lookups:
            embeddings.append(name)
        else:
            (norms if len(weight) == 1 else readers).append(name)
    problems = [
        f"{name} is neither an embedding, the last norm nor an output layer" for name in odd
    ]
    if len(norms) != 1:
        problems.append(f"one norm outside of the blocks, found {norms or 'none'}")
    if not embeddings or not readers:
        problems.append(f"embeddings and output layers, found {embeddings} and {readers}")
    if problems:
        raise TransformRefused(
            "what writes to the hidden states and reads them must be known for r1. Required is "
            f"that all with {width} channels have a role: {'; '.join(problems)}; pass r1=False"
        )
    return tuple(embeddings), ReadNorm(norms[0], tuple(readers), gain_offset)


@contextmanager
def without_blocks(
    blocks: Sequence[nn.Module], returns_tuple: bool, last: Tensor | None = None
) -> Iterator[None]:
    """Return a context in which blocks hand their hidden states on as they are.

    :param returns_tuple: True if their output is a tuple that starts with the hidden states.
    :param last: Hidden states that all of them return instead.
    """

    def same(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden if last is None else last
        return (hidden,) if returns_tuple else hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_forward(block, same))
        yield


@contextmanager
def _forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def logits_of(output: Any) -> Tensor:
    """Return the first floating-point tensor in a model's output.

    :raises ValueError: there is none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else None
    for tensor in [found] if found is not None else tensors_in(output):
        if tensor.is_floating_point():
            return tensor
    raise ValueError(f"a model must return logits, got {type(output).__name__}")
