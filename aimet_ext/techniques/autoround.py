"""AutoRound: learning the rounding of all weights of a decoder block together.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
arXiv 2309.05516.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from aimet_ext.config import AutoRoundParams, GPTQParams
from aimet_ext.core.affine import settled
from aimet_ext.core.autoround import LearnableRounding
from aimet_ext.core.objective import trimmed
from aimet_ext.core.precision import training_precision
from aimet_ext.models.description import TopologyDescription
from aimet_ext.techniques.blockwise.block import Block, BlockState, Choice, Params
from aimet_ext.techniques.blockwise.loop import BlockSolver, run_blockwise
from aimet_ext.techniques.blockwise.minibatches import minibatches
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.gptq import GPTQ
from aimet_ext.techniques.layerwise.deploy import Problem
from aimet_ext.techniques.report import BlockwiseReport

# Power of the share of steps left, with which rates fall: noise of a high rate costs more than it
# gains, so that most is gained at low ones.
_FALL = 3
_LARGEST_RATE = 0.02  # of offsets, if none is given: more turn at once than is good
# Of Adam. Losses are small numbers, and so are their gradients.
_BETAS, _EPSILON = (0.9, 0.99), 1e-20


class AutoRound(BlockSolver[AutoRoundParams]):
    """GPTQ layer by layer, then all roundings of the block by gradient."""

    @property
    def steps(self) -> int:
        """Optimizer steps for each block."""
        return self.params.num_iterations

    @property
    def leans(self) -> bool:
        """True: GPTQ decides experts without tokens by those of all."""
        return True

    @property
    def trim(self) -> float:
        """Share of a block's outputs that count in no score."""
        return self.params.trim

    def decide(self, block: Block, bar: Any) -> Choice:
        """Learn from GPTQ's rounding, and keep the better one of the two."""
        bar.set_postfix_str("GPTQ")
        start = round_layers(block, self.params.asym_strength)
        before = block.score(block.state_params(start))

        def on_step(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
            bar.update()

        seed = self.params.seed * block.count + block.number
        best, score = train_block(block, start, before, self.params, seed=seed, on_step=on_step)
        return Choice(best, "training" if score < before else "gptq", before)


@torch.no_grad()
def round_layers(block: Block, asym_strength: float) -> BlockState:
    """Round a block's layers by GPTQ, those that share an input after those before them.

    :param asym_strength: Share of the errors before a layer that it compensates.
    """
    solver = GPTQ(GPTQParams(), "gptq", True)
    grids: dict[str, tuple[Tensor, Tensor]] = {}
    codes: dict[str, Tensor] = {}
    block.data.restart()
    for stage in block.stages:
        like = block.weight(stage[0])
        # As in a layer-wise run: a rounding is a chain of choices.
        dtype = torch.float64 if like.device.type == "cpu" else like.dtype
        moment = block.moment(stage, ("quantized", "float"), dtype=dtype, lean_below=math.inf)
        moment = moment.shrunk(asym_strength)
        for layer in stage:
            quantizer, layout = block.quantizers[layer], block.layout(layer)
            problem = Problem.of(
                layer, quantizer, block.params.get(f"{layer}.bias"), moment, samples=None
            )
            decision = solver.decide(problem)
            scale, offset = decision.scale, decision.offset
            if scale is None or offset is None:
                scale, offset = layout.raw(*layout.bounds(problem.stored.float()))
            raw = block.deployable(layer, scale), offset.float()
            grid = block.grid(layer, raw, problem.stored)
            assert decision.codes is not None
            grids[layer] = grid.scale, grid.offset
            codes[layer] = decision.codes(grid)
            values = settled(codes[layer], grid, problem.stored.dtype)
            block.data.decide(layer, quantizer.stored(values.view(quantizer.weight.shape)))
    block.data.restart()
    return BlockState({}, grids, codes)


def train_block(
    block: Block,
    start: BlockState,
    start_score: float,
    params: AutoRoundParams,
    *,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[BlockState, float]:
    """Train all roundings from a start; return the best state on all batches, and its score.

    :param start_score: Score of the start, see :meth:`Block.score`.
    :param seed: Seed of the order of batches.
    :param on_step: Function called with the loss of every step.
    """
    learners = _learners(block, start, params)
    optimizer = _optimizer(learners, params)
    pieces = _steps(block, params.batch_size, seed)
    interval = max(1, params.num_iterations // params.evaluations)
    best, best_score = start, start_score
    for step in range(params.num_iterations):
        for group in optimizer.param_groups:
            group["lr"] = group["start"] * (1 - step / params.num_iterations) ** _FALL
        optimizer.zero_grad(set_to_none=True)
        loss = _gradients(block, learners, next(pieces), params.autocast)
        on_step(loss)
        if not math.isfinite(loss):
            break
        optimizer.step()
        if (step + 1) % interval == 0 or step + 1 == params.num_iterations:
            state = _state(block, learners)
            score = block.score(block.state_params(state))
            if score < best_score:
                best, best_score = state, score
    return best, best_score


def _learners(
    block: Block, start: BlockState, params: AutoRoundParams
) -> dict[str, LearnableRounding]:
    """Return what is learnt of each layer, at a start."""
    found = {}
    for layer in block.layers:
        weight = block.weight(layer)
        grid = block.grid(layer, start.grids[layer], weight)
        scales = params.learn_scales and not block.quantizers[layer].frozen
        found[layer] = LearnableRounding(
            weight, block.layout(layer), grid, start.codes[layer], scales=scales
        )
    return found


def _optimizer(
    learners: Mapping[str, LearnableRounding], params: AutoRoundParams
) -> torch.optim.Optimizer:
    groups = []
    for learner in learners.values():
        own = min(_LARGEST_RATE, 2 / params.num_iterations)
        groups.append({"params": [learner.offsets], "start": params.learning_rate or own})
        groups.append({"params": [learner.stretch], "start": params.scale_lr})
    return torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON)


@torch.no_grad()
def _state(block: Block, learners: dict[str, LearnableRounding]) -> BlockState:
    """Return the state that would be deployed now."""
    grids = {
        layer: (block.deployable(layer, learner.scale()), learner.grid.offset)
        for layer, learner in learners.items()
    }
    return BlockState({}, grids, {layer: learner.codes() for layer, learner in learners.items()})


def _gradients(
    block: Block,
    learners: dict[str, LearnableRounding],
    pieces: list[tuple[int, list[int] | None]],
    autocast: bool | None,
) -> float:
    """Add the gradients of a step, and return its loss.

    Computed in the type of the float parameters, float32 at least, whatever weights are stored in,
    except for the products that ``autocast`` puts into bfloat16.
    """
    stream, total = block.quantized_stream, 0.0
    for index, rows in pieces:
        call = stream.select(index, rows)
        target = block.targets.read(index, stream.device)
        target = (target if rows is None else target[rows])[call.mask]
        params: Params = dict(block.params)
        dtype = next(iter(params.values())).dtype
        with torch.enable_grad(), block.float_weights(), block.activations():
            for layer, learner in learners.items():
                name = f"{layer}.weight"
                params[name] = learner().view_as(params[name])
            with training_precision(stream.device, autocast):
                output = block.run(call.to(dtype), params)[call.mask]
            squares = (output - target.to(dtype)).square()
            loss = trimmed(squares, block.trim).mean() / len(pieces)
            loss.backward()
        total += loss.item()
    return total


def _steps(
    block: Block, batch_size: int, seed: int
) -> Iterator[list[tuple[int, list[int] | None]]]:
    """Yield the pieces of each step, with so many sequences together, at least."""
    stream, pieces, count = block.quantized_stream, [], 0
    for index, rows in minibatches(block, batch_size, seed):
        pieces.append((index, rows))
        count += stream.shape(index)[0] if rows is None else len(rows)
        if count >= batch_size:
            yield pieces
            pieces, count = [], 0


@technique("autoround")
def apply_autoround(
    call: Call[AutoRoundParams], *, topology: TopologyDescription | None = None
) -> BlockwiseReport:
    r"""Learn the rounding of all weights of a decoder block together, on the block's output.

    Source: AutoRound, Cheng et al. 2023, arXiv 2309.05516.

    For every decoder block ``F`` with weights ``W``, in order,

    .. math::
        \min_{v, s} \; \lVert F(W; X) - F(\hat W; \hat X) \rVert^2, \quad
        \hat W = s \, \mathrm{clamp} \lfloor W / s + v \rceil

    where ``X`` are the block's inputs in the float model and ``X̂`` in the model quantized so far,
    ``v`` is an offset for each weight, and ``s`` the scale of each cell (of each channel with
    LPBQ). Training starts at the integers and scales of GPTQ on
    the same inputs, and the best state on all batches is kept: a block is never worse than GPTQ's.
    One for which plain rounding is no worse keeps plain rounding. Ranges that an earlier technique
    froze stay as they are.

    Weights are on their grids afterwards.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx of a language model with
        decoder blocks. Mutated. Run this last of all techniques: it needs float weights and leaves
        rounded ones.
    :param dataloader: Batches: a tensor of ids ``[batch, seq]``, a tuple of positional arguments,
        or a mapping of keyword arguments as Hugging Face's collators give (``labels`` ignored).
        Tokens with attention mask 0 count nowhere.
    :param checkpoint_dir: Folder for a checkpoint of each finished block. The same call goes on
        from there after a crash and ends bit-identical on the same machine and versions.
    :param modules_to_exclude: Layers to leave alone, by name or pattern; of an ONNX model, names of
        nodes too.
    :param topology: Names of the modules in a block, in place of what is found in a run of it.
    :returns: Losses of plain rounding, of GPTQ's rounding and as deployed, SQNR, seconds and memory
        of each block.
    :raises ValueError: Unusable data, a model without decoder blocks, layers without weight
        quantizers, weights that hold NaN or are rounded already, the same technique twice.
    :raises TransformRefused: A block of an ONNX model has operators that PyTorch cannot compute;
        all are named.

    >>> report = apply_autoround(sim, batches, num_iterations=200)
    >>> sim.compute_encodings(run_calibration)
    """
    return run_blockwise(call, AutoRound, topology=topology)
