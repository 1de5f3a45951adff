"""OmniQuant: learnable weight clipping and learnable equivalent transformation.

Shao et al., "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
arXiv 2308.13137.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.config import STARTS, OmniQuantParams
from aimet_ext.core.clipping import LearnableClipping
from aimet_ext.core.equivalence import PairKind
from aimet_ext.core.precision import training_precision
from aimet_ext.data.cache import TensorCache
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.starts import Starts, load_starts
from aimet_ext.models.description import TopologyDescription
from aimet_ext.techniques.blockwise.block import Block, BlockState, Choice
from aimet_ext.techniques.blockwise.loop import BlockSolver, run_blockwise
from aimet_ext.techniques.blockwise.minibatches import minibatches
from aimet_ext.techniques.blockwise.pairs import read_pairs
from aimet_ext.techniques.blockwise.search import BlockSearch
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.report import BlockwiseReport

_LARGEST_LOG_SCALE = math.log(1e3)
AWQ_GRID = 20
_DIVERGED = 10.0  # times the loss at the start


class _Learner(nn.Module):
    """Learnable logarithms of scales, and learnable clipping of every layer (eq. 1 to 5).

    :param fixed: Layers that keep the ranges of the start, and the scales between them.
    """

    def __init__(
        self, block: Block, start: BlockState, params: OmniQuantParams, fixed: Collection[str]
    ) -> None:
        super().__init__()
        self.block = block
        self.pair_names = tuple(start.smooth)
        inside = {p.name for p in block.pairs if all(side.module in fixed for side in p.sides)}
        self.log_scales = nn.ParameterList(
            nn.Parameter(scale.detach().log(), requires_grad=params.let and name not in inside)
            for name, scale in start.smooth.items()
        )
        weights = block.quantized(start.smooth, lambda layer, weight: weight)
        self.clippings = nn.ModuleList()
        self.by_layer: dict[str, LearnableClipping] = {}
        for layer in block.layers:
            weight = weights[f"{layer}.weight"].flatten(1).float()
            clipping = LearnableClipping.from_scale(
                block.layout(layer), weight, *start.grids[layer]
            )
            if not params.lwc:  # a share of exactly 1, which no finite logit has
                for logit in clipping.parameters():
                    logit.data.fill_(math.inf)
            self.clippings.append(clipping.requires_grad_(params.lwc and layer not in fixed))
            self.by_layer[layer] = clipping

    def smooth(self) -> dict[str, Tensor]:
        """Return the current scale of each pair."""
        logs = (log.clamp(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE) for log in self.log_scales)
        return {name: log.exp() for name, log in zip(self.pair_names, logs, strict=True)}

    def parameters_now(self) -> dict[str, Tensor]:
        """Return the block's parameters with quantized weights, differentiable."""
        return self.block.quantized(
            self.smooth(), lambda layer, weight: self.by_layer[layer](weight)
        )

    @torch.no_grad()
    def state(self) -> BlockState:
        """Return the state that would be deployed now."""
        grids: dict[str, tuple[Tensor, Tensor]] = {}

        def quantize(layer: str, weight: Tensor) -> Tensor:
            clipping = self.by_layer[layer]
            raw = clipping.layout.raw(*clipping.ranges(weight.float()))
            grids[layer] = (raw[0].detach(), raw[1].detach())
            return weight

        smooth = {name: scale.detach() for name, scale in self.smooth().items()}
        self.block.quantized(smooth, quantize)
        return BlockState(smooth, grids)


def train_block(
    block: Block,
    start: BlockState,
    start_score: float,
    params: OmniQuantParams,
    *,
    seed: int,
    fixed: Collection[str] = (),
    float_outputs: TensorCache | None = None,
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[BlockState, float]:
    """Train from a start; the best state on all batches is returned, which may be the start.

    :param start_score: Score of the start, see :meth:`Block.score`.
    :param seed: Seed of the order of batches.
    :param fixed: Layers that keep the ranges of the start, and the scales between them.
    :param float_outputs: Outputs of the float block on the quantized stream, for
        ``params.aug_loss``.
    :param on_step: Function called with the loss of every step.
    :returns: the best state and its score; the start, where all of the block is excluded.
    """
    learner = _Learner(block, start, params, fixed)
    if not any(parameter.requires_grad for parameter in learner.parameters()):
        return start, start_score
    best, best_score = start, start_score
    best_weights = _copy(learner.state_dict())
    rate, failures = 1.0, 0
    optimizer = _optimizer(learner, params)
    order = minibatches(block, params.batch_size, seed)
    # No more often than once an epoch: a score costs a forward pass over all batches.
    interval = max(len(block.quantized_stream), params.num_iterations // params.evaluations)
    for step in range(params.num_iterations):
        for group in optimizer.param_groups:
            group["lr"] = group["start"] * (rate * _schedule(params, step))
        loss = _step(block, learner, optimizer, next(order), params, float_outputs)
        on_step(loss)
        last = step + 1 == params.num_iterations
        score = math.nan
        if math.isfinite(loss) and ((step + 1) % interval == 0 or last):
            state = learner.state()
            score = block.score(block.state_params(state))
            if score < best_score:
                best, best_score = state, score
                best_weights = _copy(learner.state_dict())
        diverged = not math.isfinite(loss) or score > _DIVERGED * start_score
        if diverged:
            failures += 1
            if failures > params.patience:
                break
            learner.load_state_dict(best_weights)
            rate, optimizer = rate / 2, _optimizer(learner, params)
    return best, best_score


def _step(
    block: Block,
    learner: _Learner,
    optimizer: torch.optim.Optimizer,
    where: tuple[int, list[int] | None],
    params: OmniQuantParams,
    float_outputs: TensorCache | None,
) -> float:
    """Take a step on one minibatch and return the loss before it, NaN if that is not finite."""
    index, rows = where
    call = block.quantized_stream.select(index, rows)
    device = block.quantized_stream.device

    def cut(cache: TensorCache) -> Tensor:
        full = cache.read(index, device)
        return (full if rows is None else full[rows])[call.mask].float()

    # A grid of 16 bits is finer than bfloat16.
    autocast = False if params.autocast is None and block.quantize_activations else params.autocast
    with torch.enable_grad(), block.float_weights(), block.activations():
        with training_precision(device, autocast):
            output = block.run(call, learner.parameters_now())[call.mask].float()
        loss = (output - cut(block.targets)).square().mean()
        if float_outputs is not None:
            loss = loss + params.aug_loss * (output - cut(float_outputs)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        if not bool(torch.isfinite(loss)):
            return math.nan
        loss.backward()
    gradients = [p.grad for p in learner.parameters() if p.grad is not None]
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        return math.nan
    optimizer.step()
    return loss.item()


def _optimizer(learner: _Learner, params: OmniQuantParams) -> torch.optim.Optimizer:
    scales = [p for p in learner.log_scales if p.requires_grad]
    shares = [p for p in learner.clippings.parameters() if p.requires_grad]
    groups = [
        {"params": found, "lr": rate, "start": rate}
        for found, rate in ((scales, params.let_lr), (shares, params.lwc_lr))
        if found
    ]
    return torch.optim.Adam(groups)


def _schedule(params: OmniQuantParams, step: int) -> float:
    """Share of the learning rate at a step."""
    done = step / params.num_iterations
    if params.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if params.lr_schedule == "linear" else 1.0


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in state.items()}


OmniQuantReport = BlockwiseReport


class OmniQuant(BlockSolver[OmniQuantParams]):
    """Search on second moments, training by gradient, and the search again."""

    @property
    def pairs(self) -> Collection[PairKind]:
        """Kinds of scale pairs to learn, or to take over as they are."""
        return self.params.pairs if self.params.let or self._takes_scales else ()

    @property
    def _takes_scales(self) -> bool:
        """True if scales that were found before are kept even if none are learnt."""
        return self.params.init == "awq" or bool(self.saved.columns)

    @cached_property
    def saved(self) -> Starts:
        """Scales and shares of the files to start from, empty without any."""
        init = self.params.init
        return Starts() if init in STARTS else load_starts(init)

    @property
    def contents(self) -> dict[str, str]:
        """Hash of the scales and shares of the files to start from."""
        return {} if self.params.init in STARTS else {"init": self.saved.digest()}

    def check(self, ledger: Ledger) -> None:
        """Refuse to start from the files of another model, or of this one after a transform."""
        if self.saved.columns and ledger.entries:
            raise ValueError(
                f"init: the scales in {self.params.init} are for the original weights, but "
                f"{ledger.entries[-1].technique} rescaled these already; start from a new sim, or "
                'give init="search"'
            )
        if self.saved.origin and ledger.origin not in (None, self.saved.origin):
            raise ValueError(
                f"init: the files in {self.params.init} were made for a model of other weights; "
                "give those of this model"
            )

    @property
    def quantize_activations(self) -> bool:
        """True to train with the activation quantizers on."""
        return self.params.quantize_activations

    @property
    def steps(self) -> int:
        """Optimizer steps for each block."""
        return self.params.num_iterations

    @property
    def leans(self) -> bool:
        """True: the search decides experts without tokens by those of all."""
        return True

    def decide(self, block: Block, bar: Any) -> Choice:
        """Choose the best of the states found by search, training and a second search."""
        params = self.params
        bar.set_postfix_str("search")
        search = BlockSearch(block, clip=params.lwc, float_target=params.float_target)
        sweeps = params.search_sweeps if params.let else 0
        saved = self._saved_scales(block)
        found = search.run(saved, sweeps=sweeps)
        states: dict[str, tuple[float, BlockState]] = {}
        states["search"] = (block.score(block.state_params(found)), found)
        start, before = self._start(block, search, saved), states["search"][0]
        if start is None:
            start = found
        else:
            before = block.score(block.state_params(start))
            given = before, start
            better = min(states["search"], given, key=lambda state: state[0])
            # Scales that are not to be learnt stay those of the start.
            states["search"] = better if params.let or saved or not start.smooth else given
        trained, score = self._train(block, start, before, search.scarce, bar)
        states["training"] = (score, trained)
        if block.pairs and sweeps:
            bar.set_postfix_str("search again")
            polished = search.run(trained.smooth, sweeps=params.search_sweeps)
            states["polish"] = (block.score(block.state_params(polished)), polished)
        kept = min(states, key=lambda name: states[name][0])
        return Choice(states[kept][1], kept, before)

    def _start(
        self, block: Block, search: BlockSearch, saved: Mapping[str, Tensor]
    ) -> BlockState | None:
        """Return the state at which training starts, None for the one that was searched."""
        init = self.params.init
        if init not in STARTS:
            return self._saved_start(block, search.ranges(saved))
        if init == "awq":
            return search.clipped(search.awq(AWQ_GRID, duo_scaling=True), AWQ_GRID)
        if not block.pairs or init == "search":
            return None
        alpha = self.params.smooth_alpha
        return search.ranges(search.smoothquant(alpha) if init == "smoothquant" else {})

    def _saved_scales(self, block: Block) -> dict[str, Tensor]:
        """Return the scales of pairs that files have."""
        smooth: dict[str, Tensor] = {}
        for stage in block.stages:
            for read in read_pairs(block, stage):
                columns = _of_layer(self.saved.columns, block, read.readers[0])
                if columns is not None:
                    smooth[read.pair.name] = read.entries(columns)
        return smooth

    def _saved_start(self, block: Block, state: BlockState) -> BlockState:
        """Return a state with the ranges that files have in place of its own."""
        grids = dict(state.grids)

        def clip(layer: str, weight: Tensor) -> Tensor:
            shares = _of_layer(self.saved.shares, block, layer)
            if shares is not None and self.params.lwc:
                layout = block.layout(layer)
                ends = zip(shares, layout.bounds(weight.float()), strict=True)
                grids[layer] = layout.raw(*(_fitting(layer, s, end) * end for s, end in ends))
            return weight

        with torch.no_grad():
            block.quantized(state.smooth, clip)
        return BlockState(state.smooth, grids)

    def _train(
        self,
        block: Block,
        start: BlockState,
        start_score: float,
        fixed: Collection[str],
        bar: Any,
    ) -> tuple[BlockState, float]:
        def on_step(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
            bar.update()

        with ExitStack() as stack:
            outputs = None
            if self.params.aug_loss:
                with block.adaptor.disabled_quantizers(block.name):
                    outputs = stack.enter_context(block.data.outputs("quantized"))
            return train_block(
                block,
                start,
                start_score,
                self.params,
                seed=self.params.seed * block.count + block.number,
                fixed=fixed,
                float_outputs=outputs,
                on_step=on_step,
            )


def _of_layer(values: Mapping[str, Any], block: Block, layer: str) -> Any:
    """Return what a file has for a layer, by its original name or as LLMC numbers blocks."""
    name = block.adaptor.original_names()(f"{block.name}.{layer}")
    return values.get(name, values.get(f"{block.number}.{layer}"))


def _fitting(layer: str, share: Tensor, like: Tensor) -> Tensor:
    """Return shares in the shape of a layer's cells.

    :raises ValueError: There are not as many.
    """
    if share.numel() != like.numel():
        raise ValueError(
            f"init: {layer} has {like.numel()} cells, a share for each is required, got "
            f"{share.numel()}; take the clips of a simulation with this grid"
        )
    return share.to(like).reshape(like.shape)


@technique("omniquant")
def apply_omniquant(
    call: Call[OmniQuantParams],
    *,
    topology: TopologyDescription | None = None,
    aimet_keys: bool = False,
) -> BlockwiseReport:
    r"""Learn clipping ranges and equivalent scales that minimise each block's output error.

    Source: OmniQuant, Shao et al. 2023, arXiv 2308.13137.

    For every decoder block ``F`` with weights ``W``, in order,

    .. math::
        \min_{s, \gamma} \; \lVert F(W; X) - F(Q_\gamma(W_s); \hat X) \rVert^2

    where ``X`` are the block's inputs in the float model and ``X̂`` in the model quantized so far,
    ``W_s`` are the weights after a function-preserving rescaling by ``s`` (LET), and ``Q_γ``
    rounds to the nearest value of a grid whose range is a learnt share of each cell's (LWC).
    Scales and ranges come from SmoothQuant's formula and a search on second moments, are trained
    by gradient, searched again, and the best state on all batches is kept. A block for which plain
    rounding is no worse keeps plain rounding. A layer of an expert with fewer than a token for four
    inputs keeps what the search finds on the tokens of all experts.

    Afterwards scales are folded into weights and norm gains, and the float function is what it was.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, made by :func:`create_sim`
        or by hand. The blocks of an ONNX model are found by its structure and computed in PyTorch,
        after a check against onnxruntime; scales go into its initializers. Mutated. Its
        activations may be calibrated already; encodings that a transform made stale are calibrated
        anew and named in the report.
    :param dataloader: Batches: a tensor of ids ``[batch, seq]``, a tuple of positional arguments,
        or a mapping of keyword arguments as Hugging Face's collators give (``labels`` ignored).
        Tokens with attention mask 0 count nowhere.
    :param output_path: Folder for the learnt scales (``scales.safetensors``, see
        :func:`load_scales`) and the report. A folder that this package wrote is replaced, another
        one refused.
    :param checkpoint_dir: Folder for a checkpoint of each finished block. The same call goes on
        from there after a crash and ends bit-identical on the same machine and versions.
    :param modules_to_exclude: Layers to leave alone, by name or pattern; of an ONNX model, names of
        nodes too.
    :param topology: Names of the modules in a block, in place of what is found in a run of it.
    :param aimet_keys: Write AIMET's own ``{module}.prev`` and ``{module}.foll`` as well.
    :returns: Losses before and after, of plain rounding, SQNR, seconds and memory of each block.
    :raises ValueError: Unusable data, a model without decoder blocks, layers without or with frozen
        weight quantizers, weights that hold NaN or are rounded already, the same technique twice.
    :raises TransformRefused: Folded scales change the float function of a block, or one of an ONNX
        model has operators that PyTorch cannot compute; all are named.

    >>> report = apply_omniquant(sim, batches, num_iterations=800, output_path="scales")
    >>> sim.compute_encodings(run_calibration)
    """
    return run_blockwise(call, OmniQuant, topology=topology, aimet_keys=aimet_keys)
