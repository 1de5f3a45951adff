r"""Weights of tokens for a layer, by the model's loss (GuidedQuant, arXiv 2505.07004).

To second order an error :math:`\delta_t` of a layer's output at token ``t`` costs a divergence of
:math:`\frac12 \sum_t \sum_c E[g_{tc}^2] \, \delta_{tc}^2` of the model's outputs, where :math:`g`
is the gradient of a likelihood whose outcomes are the float model's own (Fisher information), and
errors of several outputs and tokens are taken as independent. With the mean over outputs in place
of each one's own, :math:`s_t = \operatorname{mean}_c E[g_{tc}^2]`, all output rows share the second
moment :math:`\sum_t s_t x_t x_t^T`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aimet_ext.analysis.divergence import counted_rows, row_mask
from aimet_ext.core.divergence import outcome_likelihood
from aimet_ext.data.batches import ForwardFn
from aimet_ext.data.geometry import Geometry
from aimet_ext.errors import TransformRefused
from aimet_ext.progress import bar as progress_bar
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.walk.hooks import counted_calls
from aimet_ext.walk.routing import is_routed
from aimet_ext.walk.sides import Sides, find_sides
from aimet_ext.walk.streamed import fit_mask

_SEED = 0  # of the outcomes


class TokenWeights:
    """Weights of all tokens for each of some layers, 1 on average.

    The float model runs forward and back once for each batch. Tokens of experts' layers count
    alike, since in the quantized model other ones are sent there, and so do those of layers that a
    torch model calls several times, as calls on the way back are not told apart.

    :param layers: Names of linear layers and convolutions.
    :param batches: Batches, each one checked.
    :raises ValueError: The outputs are no logits, or do not depend on the layers.
    :raises TransformRefused: An ONNX graph has operators that have no gradient here.
    """

    def __init__(
        self,
        adaptor: SimAdaptor,
        layers: Sequence[str],
        batches: Sequence[Any],
        forward_fn: ForwardFn | None = None,
        *,
        progress: bool = False,
    ) -> None:
        model, is_torch = adaptor.model, adaptor.framework == "torch"
        self._geometry = {
            name: Geometry.of(model.get_submodule(name))
            for name in layers
            if not (is_torch and is_routed(model, name))
        }
        self._model_of_masks = model if is_torch and not forward_fn else None
        sides = find_sides(model, layers, batches, forward_fn) if is_torch else Sides()
        # By layer, for each batch and operation that applies it: [groups, *places].
        self._found: dict[str, list[Tensor]] = {name: [] for name in self._geometry}
        self._batch: dict[tuple[str, int], Tensor] = {}
        self._root = torch.zeros((), requires_grad=True)
        generator = torch.Generator().manual_seed(_SEED)
        mass: dict[str, list[Tensor]] = {name: [] for name in self._geometry}
        again: set[str] = set()
        try:
            with (
                adaptor.seeing_outputs([*self._geometry], self._see, forward_fn) as run,
                torch.enable_grad(),
            ):
                for batch in progress_bar(batches, desc="token weights", shown=progress):
                    self._batch.clear()
                    with counted_calls(model, self._geometry if is_torch else ()) as calls:
                        logits = run(batch)
                    self._add(batch, logits, generator)
                    again |= {name for name, number in calls.items() if number > 1}
                    for (name, _), own in sorted(self._batch.items(), key=lambda item: item[0]):
                        self._found[name].append(own)
                        mass[name].append(self._counted(name, own, sides.mask(batch, model, name)))
        except TransformRefused as error:
            raise TransformRefused(
                'token_weights="loss": gradients of the whole graph are required; pass '
                f'token_weights="none". {error}'
            ) from error
        for name in again:
            del self._found[name], mass[name]
        for name, parts in mass.items():
            if parts:
                self._scale(name, torch.cat([part.flatten(1) for part in parts], 1))

    def of(self, layers: Sequence[str]) -> Iterator[Tensor] | None:
        """Yield the weights of rows for layers that read one input, the mean over these.

        :returns: ``[groups, *places]`` for each of their inputs, as
            :func:`~aimet_ext.data.moments.sum_moments` takes them; None if all count alike.
        """
        if not self._found.keys() >= set(layers):
            return None
        every = zip(*(self._found[name] for name in layers), strict=True)
        return (torch.stack(each).mean(0) for each in every)

    def _see(self, name: str, use: int, output: Tensor) -> Tensor:
        moved = output.as_subclass(Tensor) + self._root.to(output)
        if not moved.requires_grad:  # what becomes of the outputs says so
            return moved
        # A block may be computed again on the way back.
        self._batch.setdefault((name, use), torch.zeros_like(self._power(name, moved.detach())))
        moved.register_hook(partial(self._meet, name, use))
        return moved

    def _meet(self, name: str, use: int, gradient: Tensor) -> None:
        self._batch[name, use] += self._power(name, gradient)

    def _power(self, name: str, gradient: Tensor) -> Tensor:
        """Return the mean square over the outputs of a group, ``[groups, *places]``, in float32."""
        squares = gradient.as_subclass(Tensor).detach().float().square()
        geometry = self._geometry[name]
        if not geometry.kernel_size:
            return squares.mean(-1)[None]
        if squares.dim() < len(geometry.kernel_size) + 2:
            squares = squares[None]  # a single image
        return squares.unflatten(1, (geometry.groups, -1)).mean(2).transpose(0, 1)

    def _counted(self, name: str, own: Tensor, mask: Tensor | None) -> Tensor:
        """Return the numbers of a batch that count, ``[groups, *places]``."""
        fitting = fit_mask(mask, own[0, ..., None], self._geometry[name])
        return own if fitting is None else own[:, fitting]

    def _scale(self, name: str, counted: Tensor) -> None:
        """Divide a layer's numbers by their mean; all count alike where that is 0.

        :raises ValueError: It is not finite.
        """
        mean = counted.mean(1, dtype=torch.float64)  # [groups]
        if not bool(mean.isfinite().all()):
            raise ValueError(
                f'{name}: token_weights="loss" requires finite gradients at its output, got NaN or '
                'infinity; compute in float32 or bfloat16, or pass token_weights="none"'
            )
        for own in self._found[name]:
            scale = mean.to(own.device).view(-1, *[1] * (own.dim() - 1))
            own.copy_(torch.where(scale > 0, own / scale, 1.0))

    def _add(self, batch: Any, logits: Tensor, generator: torch.Generator) -> None:
        try:
            mask = row_mask(batch, logits, self._model_of_masks)
        except ValueError as error:
            raise ValueError(f'token_weights="loss": {error}; pass token_weights="none"') from error
        rows = counted_rows(logits, mask)
        if not rows.requires_grad:
            raise ValueError(
                'token_weights="loss": logits that depend on the layers are required, with '
                "gradients, but these have none (is there a torch.no_grad in forward_fn?); "
                'pass token_weights="none"'
            )
        torch.autograd.grad(outcome_likelihood(rows, generator), self._root)
