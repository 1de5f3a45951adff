"""Rotations learnt on the outputs of the quantized model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from aimet_ext.config import SpinQuantParams
from aimet_ext.core.affine import fake_quantize
from aimet_ext.core.cayley import CayleySGD
from aimet_ext.core.clipping import GridLayout
from aimet_ext.core.hadamard import Rotation, mean_basis
from aimet_ext.data.batches import held_out
from aimet_ext.data.cache import TensorCache
from aimet_ext.files.tensors import Checkpoints
from aimet_ext.models.topology import BlockTopology
from aimet_ext.progress import bar as progress_bar
from aimet_ext.techniques.call import Call
from aimet_ext.techniques.rotating.fold import Rotations, fold_block
from aimet_ext.techniques.rotating.run import Chosen, Plan
from aimet_ext.techniques.session import RunOptions, open_checkpoints
from aimet_ext.walk.hooks import on_device
from aimet_ext.walk.stream import BlockStream


class Learner:
    """Rotations of a model as matrices that are learnt.

    :param start: Rotations to start from.
    """

    def __init__(self, plan: Plan, start: Rotations, params: SpinQuantParams) -> None:
        self.plan, self.params = plan, params
        matrices: list[Tensor] = []
        self.around: Tensor | None = None
        hidden = start.hidden
        if isinstance(hidden, Rotation):
            if plan.keeps_mean:  # learnt among all that do
                self.around = mean_basis(hidden.size)
                matrices.append((self.around.T @ hidden.matrix @ self.around)[1:, 1:])
            else:
                matrices.append(hidden.matrix)
        self.has_hidden = bool(matrices)
        self.names = tuple(start.heads)
        matrices += [head.matrix for head in start.heads.values() if isinstance(head, Rotation)]
        rate, momentum = params.learning_rate, params.momentum
        self.descent = CayleySGD(matrices, learning_rate=rate, momentum=momentum)

    def rotations(self, matrices: Sequence[Tensor]) -> Rotations:
        """Return matrices in their places, differentiable in them."""
        hidden, heads = None, list(matrices)
        if self.has_hidden:
            hidden, *heads = matrices
            if self.around is not None:
                one = torch.ones(1, 1, dtype=hidden.dtype)
                around = self.around.to(hidden)
                hidden = around @ torch.block_diag(one, hidden) @ around.T
        return Rotations(hidden, dict(zip(self.names, heads, strict=True)))

    def fixed(self, matrices: Sequence[Tensor]) -> Rotations:
        """Return orthogonal matrices in their places as rotations to fold."""
        found = self.rotations(matrices)
        how = "learnt" + (", mean kept" if self.around is not None else "")

        def made(matrix: Any) -> Rotation:
            return Rotation(len(matrix), ((matrix,),), how)

        hidden = None if found.hidden is None else made(found.hidden)
        return Rotations(hidden, {name: made(matrix) for name, matrix in found.heads.items()})


@dataclass
class _Progress:
    """The state between two steps; with the matrices, it decides all that follows.

    :param losses: Mean loss on the batches that judge: without rotations, with those that learning
        started from, and with the best ones.
    :param step: Steps that were taken.
    :param best: The best matrices, orthogonal; None for those that learning started from.
    """

    losses: dict[str, float]
    step: int = 0
    best: list[Tensor] | None = None

    def save(self, learner: Learner, checkpoints: Checkpoints) -> None:
        """Put a checkpoint in the place of the one before."""
        descent = learner.descent
        lists = {"now": descent.matrices, "moment": descent.moments, "best": self.best or ()}
        tensors = {f"{k}/{n}": each for k, every in lists.items() for n, each in enumerate(every)}
        checkpoints.save(0, tensors, {"step": self.step, "losses": self.losses})

    @classmethod
    def resumed(cls, learner: Learner, checkpoints: Checkpoints) -> _Progress:
        """Go back to a checkpoint."""
        descent = learner.descent
        with checkpoints.resuming(0) as (tensors, meta):
            numbers = range(len(descent.matrices))
            lists = {k: [tensors[f"{k}/{n}"] for n in numbers] for k in ("now", "moment")}
            best = [tensors[f"best/{n}"] for n in numbers] if "best/0" in tensors else None
            for every in (*lists.values(), best or descent.matrices):
                for each, like in zip(every, descent.matrices, strict=True):
                    if each.shape != like.shape or each.dtype != like.dtype:
                        raise ValueError(
                            f"matrices of {like.dtype} {list(like.shape)} are required"
                        )
            losses = {name: float(meta["losses"][name]) for name in ("none", "start", "learnt")}
            found = cls(losses, int(meta["step"]), best)
        descent.matrices, descent.moments = lists["now"], lists["moment"]
        return found


def learn(plan: Plan, start: Rotations, call: Call[SpinQuantParams]) -> Chosen:
    """Return the best rotations that are found from a start, which may be the start.

    :raises ValueError: nothing in the blocks is quantized.
    """
    params, options = call.params, call.options
    learner = Learner(plan, start, params)
    with ExitStack() as stack:
        model = _QuantizedModel(plan, params, options, stack)
        count = len(model.inputs)
        train, held = held_out(count)
        checkpoints = stack.enter_context(
            open_checkpoints(
                plan.adaptor,
                options,
                technique=call.row.name,
                settings=params.to_dict(),
                quantizers=plan.quantizers,
                data=model.inputs.named_tensors(),
                device=model.inputs.device,
                activations=params.quantize_activations,
            )
        )
        if checkpoints is not None and 0 in checkpoints:
            run = _Progress.resumed(learner, checkpoints)
        else:
            begun = model.mean(start, held)
            losses = {"none": model.mean(Rotations(), held), "start": begun, "learnt": begun}
            run = _Progress(losses)
        resumed, last = run.step, params.num_iterations
        order = _forever(train, torch.Generator().manual_seed(params.seed))
        numbers = itertools.islice(order, resumed, last)
        every = max(1, last // params.evaluations)
        bar = stack.enter_context(
            progress_bar(
                desc="SpinQuant",
                total=last,
                initial=resumed,
                unit="step",
                shown=options.progress,
            )
        )
        for number in numbers:
            loss, gradients = model.gradients(learner, number)
            learner.descent.step(gradients, 1 - run.step / last)
            run.step += 1
            bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
            bar.update()
            if run.step % every == 0 or run.step == last:
                now = learner.descent.restored()
                score = model.mean(learner.fixed(now), held)
                if score < run.losses["learnt"]:
                    run.best, run.losses["learnt"] = now, score
                if checkpoints is not None:
                    run.save(learner, checkpoints)
    best = start if run.best is None else learner.fixed(run.best)
    return Chosen(best, run.losses, resumed)


def _forever(numbers: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for place in torch.randperm(len(numbers), generator=generator).tolist():
            yield numbers[place]


@dataclass(frozen=True, eq=False)
class _Block:
    """A block as it is called.

    :param kind: Kind of the arguments that it is called with.
    :param layouts: Grids of the weights that are quantized, by layer.
    """

    topology: BlockTopology
    kind: str
    layouts: Mapping[str, GridLayout] = field(default_factory=dict)


class _QuantizedModel:
    """The model with rotated and rounded weights, compared with the float model at its logits.

    A block's activations are computed again on the way back, so that those of one block are held.
    """

    def __init__(
        self, plan: Plan, params: SpinQuantParams, options: RunOptions, stack: ExitStack
    ) -> None:
        self.plan, self.params, self.options = plan, params, options
        self.inputs, self.targets, self.blocks = self._capture(stack)
        self.logits: Callable[[Any, Tensor], Tensor] = plan.adaptor.logits_behind(
            plan.blocks, options.forward_fn
        )

    def _capture(self, stack: ExitStack) -> tuple[BlockStream, TensorCache, list[_Block]]:
        """Return the first block's inputs, the last one's float outputs, and the blocks."""
        adaptor, options = self.plan.adaptor, self.options
        named = {f"{b.name}.{layer}": b for b in self.plan.blocks for layer in b.linears}
        quantizers = {name: adaptor.weight_quantizer(name) for name in named}
        layouts = {name: q.layout for name, q in quantizers.items() if q is not None}
        quantized = (adaptor.activation_quantizers(block.name) for block in self.plan.blocks)
        if not layouts and not any(quantized):
            raise ValueError(
                "a simulation that quantizes weights or activations of its blocks is required to "
                "learn rotations, this one quantizes neither; use apply_rotation"
            )
        with adaptor.disabled_quantizers():
            streams = adaptor.block_pass(
                [block.name for block in self.plan.blocks],
                self.plan.batches,
                effective={},
                forward_fn=options.forward_fn,
                cache_dir=options.cache_dir,
                device=options.device,
            )
            stack.callback(streams.close)
            flow, blocks = streams.flows["float"], []
            inputs = flow.fork()
            stack.callback(inputs.close)
            with closing(streams.blocks()) as passing:
                for block, data in zip(self.plan.blocks, passing, strict=True):
                    names = {layer: f"{block.name}.{layer}" for layer in block.linears}
                    own = {layer: layouts[n] for layer, n in names.items() if n in layouts}
                    blocks.append(_Block(block, flow.kind, own))
                    data.advance("float")
        return inputs, flow.hidden, blocks

    def mean(self, rotations: Rotations, numbers: Sequence[int]) -> float:
        """Return the mean loss on some batches."""
        with torch.no_grad():
            return sum(float(self._loss(rotations, number)) for number in numbers) / len(numbers)

    def gradients(self, learner: Learner, number: int) -> tuple[float, list[Tensor | None]]:
        """Return the loss on a batch and its gradients."""
        leaves = [matrix.float().requires_grad_() for matrix in learner.descent.matrices]
        with torch.enable_grad():
            loss = self._loss(learner.rotations(leaves), number)
            loss.backward()
        return float(loss.detach()), [leaf.grad for leaf in leaves]

    def _loss(self, rotations: Rotations, number: int) -> Tensor:
        """Return the mean KL divergence of the next token from the float model's."""
        self.inputs.kind = self.blocks[0].kind
        call = self.inputs.select(number)
        hidden, batch = rotations.hidden, self.plan.batches[number]
        x = call.hidden if hidden is None else _turned(call.hidden, hidden)
        for block in self.blocks:
            if torch.is_grad_enabled():
                x = checkpoint(self._block, block, rotations, number, x, use_reentrant=False)
            else:
                x = self._block(block, rotations, number, x)
        x = x if hidden is None else _turned(x, hidden, inverse=True)
        with torch.no_grad():
            target = self.targets.read(number, self.inputs.device).to(call.hidden.dtype)
            wanted = log_softmax(self.logits(batch, target).float(), -1)
        found = log_softmax(self.logits(batch, x.to(call.hidden.dtype)).float(), -1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1)  # [batch, seq]
        if divergence.shape == call.mask.shape:
            return divergence[call.mask].mean()
        return divergence.mean()

    def _block(self, block: _Block, rotations: Rotations, number: int, x: Tensor) -> Tensor:
        """Return the output of a block with rotated and rounded weights."""
        adaptor, name = self.plan.adaptor, block.topology.name
        module = adaptor.model.get_submodule(name)
        with ExitStack() as stack:
            stack.enter_context(on_device(module, self.options.device))
            stack.enter_context(adaptor.disabled_quantizers(name, activations=False))
            if self.params.quantize_activations:
                stack.enter_context(adaptor.live_activations(name))
            else:
                stack.enter_context(adaptor.disabled_quantizers(name, weights=False))
            self.inputs.kind = block.kind
            call = self.inputs.select(number)
            stored = adaptor.float_parameters(name)
            params = {key: value.detach().float() for key, value in stored.items()}
            folded = fold_block(params, block.topology, _to(rotations, x.device)).params
            for layer, layout in block.layouts.items():
                weight = folded[f"{layer}.weight"].float()
                folded[f"{layer}.weight"] = _rounded(weight.flatten(1), layout).view_as(weight)
            values = {key: value.to(stored[key].dtype) for key, value in folded.items()}
            moved = call.with_hidden(x.to(call.hidden.dtype))
            return moved(lambda *a, **k: functional_call(module, values, a, k)).float()


def _rounded(weight: Tensor, layout: GridLayout) -> Tensor:
    """Return a weight on its grid with its full range; gradients pass straight through."""
    with torch.no_grad():
        low, high = layout.bounds(weight)
        scale, offset = layout.raw(low, high)
        on_grid = fake_quantize(weight, layout.with_scale(scale, offset))
    return weight + (on_grid - weight).detach()


def _turned(x: Tensor, hidden: Rotation | Tensor, *, inverse: bool = False) -> Tensor:
    if isinstance(hidden, Rotation):
        return hidden.apply(x, inverse=inverse).float()
    matrix = hidden.to(x.device, torch.float32)
    return x.float() @ (matrix.T if inverse else matrix)


def _to(rotations: Rotations, device: torch.device) -> Rotations:
    """Return rotations whose matrices are on a device."""
    hidden = rotations.hidden
    moved = hidden.to(device) if isinstance(hidden, Tensor) else hidden
    heads = rotations.heads.items()
    return Rotations(moved, {n: h.to(device) if isinstance(h, Tensor) else h for n, h in heads})
