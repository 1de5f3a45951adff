"""Settings of the techniques.

All that users pass is frozen, keyword-only where it has more than one field, and checked when it is
built, so that a mistake is an error before any work is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from aimet_ext.patterns import near
from aimet_ext.specs import STRICT

PairKindName = Literal["norm_qkv", "v_o", "norm_mlp", "up_down", "q_k"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


PRESETS = ("fast", "balanced", "best")
"""Names of presets, which trade time for accuracy."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TechniqueParams:
    """Base of the settings of a technique."""

    former: ClassVar[Mapping[str, str]] = {}
    """Names of settings by the names that they had before, which are understood too."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings by the name of a preset, where they are not the defaults."""

    @model_validator(mode="before")
    @classmethod
    def _by_former_names(cls, given: Any) -> Any:
        arguments = getattr(given, "kwargs", None)
        if not arguments:
            return given
        settings, known = cls.renamed(arguments), [each.name for each in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(
                f"{', '.join(unknown)} is no setting; these are {', '.join(known)}"
                f"{near(unknown, known)}"
            )
        return type(given)(given.args, settings)

    @classmethod
    def renamed(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings under the names that they have now, those of a ``preset`` included.

        :raises ValueError: One is given under both of its names, or there is no such preset.
        """
        found: dict[str, Any] = {}
        rest = dict(settings)
        preset = rest.pop("preset", "balanced")
        known = {**{key: {} for key in PRESETS}, **cls.presets}
        if preset not in known:
            names = ", ".join(f'"{name}"' for name in PRESETS)
            raise ValueError(
                f"preset: {names} is required, got {preset!r}{near(str(preset), known)}"
            )
        for name, value in rest.items():
            now = cls.former.get(name, name)
            if now in found:
                names = " and ".join(each for each in settings if cls.former.get(each, each) == now)
                raise ValueError(f"{names} are one setting, given twice; give {now} alone")
            found[now] = value
        return {**known[preset], **found}

    def to_dict(self) -> dict:
        """Return the settings as plain JSON values."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")


def _is_alpha(value: float | str) -> float | str:
    if value != "search" and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise ValueError('a number from 0 to 1 is required, or "search"')
    return value if isinstance(value, str) else float(value)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SmoothQuantParams(TechniqueParams):
    """Settings of :func:`aimet_ext.apply_smoothquant`.

    :param alpha: Share of the difficulty that moves from activations to weights, from 0 to 1;
        ``"search"`` for the one of 0.25, 0.4, 0.5, 0.6, 0.75 and 0.9 that gives the lowest error
        of the block's output with everything quantized, for each pair.
    :param pairs: Kinds of scale pairs to use.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "best": {"alpha": "search"},
    }

    alpha: Annotated[float | str, AfterValidator(_is_alpha)] = 0.5
    pairs: tuple[PairKindName, ...] = ("norm_qkv", "v_o", "norm_mlp", "up_down")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AWQParams(TechniqueParams):
    """Settings of :func:`aimet_ext.apply_awq`.

    :param num_grid: Exponents that are tried for each pair, evenly spaced from 0; for clipping,
        steps from the full range down to 0, of which the first half is tried.
    :param duo_scaling: Try scales that weigh the weights as well,
        ``mean(|x|)^a / mean(|w|)^(1 - a)``, with ``|w|`` as a share of its cell's largest. Twice
        as many candidates.
    :param clip: Clip ranges and freeze them; if false ranges are left open, for a later technique.
    :param pairs: Kinds of scale pairs to use.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"num_grid": 10, "duo_scaling": False},
        "best": {"num_grid": 40},
    }

    num_grid: Annotated[int, Field(ge=1)] = 20
    duo_scaling: bool = True
    clip: bool = True
    pairs: tuple[PairKindName, ...] = ("norm_qkv", "v_o", "norm_mlp", "up_down")


STARTS = ("smoothquant", "awq", "search", "ones")
"""Starts of OmniQuant that are no files."""


def _is_start(value: str | Path) -> str:
    if str(value) not in STARTS and not Path(value).exists():
        words = ", ".join(f'"{word}"' for word in STARTS)
        raise ValueError(f"{words} or the path of a folder or file that exists is required")
    return str(value)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OmniQuantParams(TechniqueParams):
    """Settings of :func:`aimet_ext.apply_omniquant`. The defaults are the ones that were measured.

    :param num_iterations: Optimizer steps for each block.
    :param lwc: Learn the clipping of weight ranges.
    :param let: Learn the scales of equivalent transforms.
    :param pairs: Kinds of scale pairs to use. ``"q_k"`` (tied across rotary pairs) rescales output
        rows only, which no per-channel or blockwise grid can see: it serves activations.
    :param init: State at which training starts: ``"smoothquant"`` for the scales of its formula,
        ``"awq"`` for scales and clipping of AWQ's search, ``"search"`` for the result of the search
        on second moments, ``"ones"`` for scales of 1; or a folder or file with the scales and
        clips that :func:`aimet_ext.apply_awq` or LLMC wrote. Scales of AWQ or of files are
        kept as they are where ``let`` is false. Ranges that the start does not have are searched.
    :param smooth_alpha: Exponent of SmoothQuant's formula.
    :param search_sweeps: Sweeps of the search on second moments, before training and after it; 0
        searches ranges alone and leaves the scales to the gradient.
    :param float_target: Search against the output of the float stream, so that a layer compensates
        the errors before it; if false, against its own float output on the quantized stream.
    :param lwc_lr: Learning rate of the clipping logits.
    :param let_lr: Learning rate of the scales' logarithms.
    :param lr_schedule: Decay of both rates.
    :param batch_size: Sequences of a step; None for a whole batch of the dataloader.
    :param aug_loss: Weight of a second loss term, whose target is the float block on the quantized
        stream's inputs; 0 for none.
    :param quantize_activations: Train with the activation quantizers on. Their ranges are static:
        calibrated at the start, at each evaluation and at the end of a block, frozen then, and used
        for the blocks that follow. Ranges that were frozen before stay.
    :param autocast: Compute products in bfloat16 while training, not where a state is judged; None
        for that where the device does it faster and activations are float.
    :param evaluations: Number of times that a block is scored on all batches while it trains, at
        most once an epoch and at the end in any case.
    :param patience: Number of times that training may diverge; each time it goes on from the best
        state with half the rates.
    :param seed: Seed of the order of batches.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"num_iterations": 200, "search_sweeps": 1, "evaluations": 4},
        "best": {"num_iterations": 1600, "evaluations": 16},
    }

    former: ClassVar[Mapping[str, str]] = {"let_start": "init"}

    num_iterations: Annotated[int, Field(ge=1)] = 800
    lwc: bool = True
    let: bool = True
    pairs: tuple[PairKindName, ...] = ("norm_qkv", "v_o", "norm_mlp", "up_down")
    init: Annotated[str | Path, AfterValidator(_is_start)] = "smoothquant"
    smooth_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    search_sweeps: Annotated[int, Field(ge=0)] = 3
    float_target: bool = True
    lwc_lr: Positive = 1e-2
    let_lr: Positive = 5e-3
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    batch_size: Annotated[int, Field(ge=1)] | None = None
    aug_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    quantize_activations: bool = False
    autocast: bool | None = None
    evaluations: Annotated[int, Field(ge=1)] = 8
    patience: Annotated[int, Field(ge=0)] = 4
    seed: int = 0

    @model_validator(mode="after")
    def _learns_something(self) -> OmniQuantParams:
        if not (self.lwc or self.let):
            raise ValueError("lwc or let must be true, both are false: nothing would be learnt")
        return self


InputSymmetry = Literal["symqt", "symfp", "asym"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WeightParams(TechniqueParams):
    """Settings that all techniques share which decide the weights of one layer at a time.

    :param max_bitwidth: Bits above which a layer is left to plain rounding.
    """

    max_bitwidth: Annotated[int, Field(ge=2, le=8)] = 8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RTNParams(WeightParams):
    """Settings of :func:`aimet_ext.apply_rtn`.

    :param max_bitwidth: Bits above which a layer is left alone.
    """


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HQQParams(WeightParams):
    """Settings of :func:`aimet_ext.apply_hqq`.

    :param num_iterations: Iterations for each layer, at most.
    :param lp_norm: Exponent ``p`` of the errors' norm; smaller ones care less for outliers.
    :param beta: First weight of the quadratic term, for errors in steps of the grid.
    :param kappa: Growth of ``beta`` in an iteration.
    :param max_bitwidth: Bits above which a layer is left alone.
    """

    num_iterations: Annotated[int, Field(ge=1)] = 20
    lp_norm: Annotated[float, Field(gt=0, lt=1)] = 0.7
    beta: Positive = 2.0
    kappa: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LayerwiseParams(WeightParams):
    """Settings that all techniques share which work layer by layer on second moments.

    :param inp_symmetry: Inputs on which a layer's output error is taken, in AIMET's words.
        ``"symqt"``: those of the quantized model so far, for the float weight and the quantized
        one; ``"symfp"``: those of the float model for both; ``"asym"``: the quantized weight on
        the quantized model's, against the float weight on the float model's, so that a layer
        compensates the errors before it.
    :param asym_strength: Share of those errors that a layer compensates with ``"asym"``. 1 is the
        target of AIMET and always of SeqMSE's mode ``"compatible"``; less is more robust, since
        those errors are in part noise.
    :param token_weights: Weights of the tokens: ``"none"`` for all alike, ``"loss"`` for as
        much as an error of the layer's output there moves the model's outputs, by the gradient of
        their likelihood (GuidedQuant); for a model that returns logits. The float model runs
        forward and back once for each batch.
    :param tokens_per_input: Tokens that are used for each input of the widest layer: of more, only
        batches from all over are. None for all, which batches of a ``forward_fn`` or without token
        ids always are.
    :param max_bitwidth: Bits above which a layer is left to plain rounding.
    """

    inp_symmetry: InputSymmetry = "symqt"
    asym_strength: Annotated[float, Field(gt=0, le=1)] = 0.5
    token_weights: Literal["none", "loss"] = "none"
    tokens_per_input: Positive | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SeqMSEParams(LayerwiseParams):
    """Settings of :func:`aimet_ext.apply_seq_mse`.

    :param num_candidates: Shares of the full range that are tried, evenly spaced down from it.
    :param mode: ``"best"`` judges every cell on the full second moment and tries finer and
        one-sided ranges too; ``"compatible"`` takes what AIMET's search takes.
    :param sweeps: Sweeps over the cells of a layer, at most, in mode ``"best"``.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"num_candidates": 10, "sweeps": 2},
        "best": {"num_candidates": 40, "sweeps": 6, "inp_symmetry": "asym"},
    }

    num_candidates: Annotated[int, Field(ge=1)] = 20
    mode: Literal["best", "compatible"] = "best"
    sweeps: Annotated[int, Field(ge=2)] = 3

    @model_validator(mode="after")
    def _compatible_counts_all_alike(self) -> SeqMSEParams:
        if self.mode == "compatible" and self.token_weights != "none":
            raise ValueError(
                'mode "compatible" takes what AIMET takes, for which all tokens count alike: '
                f'token_weights="none" is required, got "{self.token_weights}"; pass mode="best"'
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GPTQParams(LayerwiseParams):
    """Settings of :func:`aimet_ext.apply_gptq`.

    :param damping: Share of its mean that is added to the diagonal of the second moment.
    :param act_order: Round the columns with the largest inputs first.
    :param beams: Partial roundings of each row that are kept on the way; 1 is GPTQ itself, more
        find lower errors, in proportionally more time.
    :param scale_candidates: Multiples of each row's range to choose from, each with its own
        rounding, where no earlier technique froze the range: every other one is tried, then the two
        beside the best. 0 keeps the ranges of plain rounding.
    :param refine_sweeps: Sweeps of coordinate descent on the full objective afterwards, at most;
        0 for GPTQ alone.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"tokens_per_input": 8.0},
        "best": {"refine_sweeps": 8},
    }

    inp_symmetry: InputSymmetry = "asym"
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    act_order: bool = False
    beams: Annotated[int, Field(ge=1)] = 1
    scale_candidates: Annotated[int, Field(ge=0)] = 12
    refine_sweeps: Annotated[int, Field(ge=0)] = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaRoundParams(LayerwiseParams):
    """Settings of :func:`aimet_ext.apply_adaround`.

    :param num_iterations: Sweeps over the codes of each layer, at most; behind a ReLU, eight steps
        of gradient descent count as one. AIMET's, 10,000 or more, are steps: leave them out.
    :param start: Start of the relaxed codes: GPTQ's rounding, which they improve, or the weight
        itself.
    :param momentum: Share of a step that goes on in the next; None for the best value
        measured, with and without samples.
    :param learning_rate: Length of a step, 1 for the best one measured.
    :param batch_size: Samples of a step, for layers that a ReLU follows; all others are judged on
        all tokens at once.
    :param samples: Inputs that are kept for a layer that a ReLU follows.
    :param activation_aware: Judge a layer that a ReLU follows behind the ReLU.
    :param search_ranges: Choose ranges first, where no earlier technique froze them: for every row
        those on which GPTQ's rounding has the lowest error; if false those of plain rounding.
    :param refine_sweeps: Sweeps of coordinate descent on the full objective afterwards, at most.
    :param seed: Seed of the samples and their order.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"num_iterations": 12, "refine_sweeps": 2},
        "best": {"num_iterations": 128},
    }

    inp_symmetry: InputSymmetry = "asym"
    num_iterations: Annotated[int, Field(ge=1)] = 40
    start: Literal["gptq", "weight"] = "gptq"
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    learning_rate: Positive = 1.0
    batch_size: Annotated[int, Field(ge=1)] = 2048
    samples: Annotated[int, Field(ge=1)] = 16384
    activation_aware: bool = True
    search_ranges: bool = True
    refine_sweeps: Annotated[int, Field(ge=0)] = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AutoRoundParams(TechniqueParams):
    """Settings of :func:`aimet_ext.apply_autoround`. The defaults are the ones that were measured.

    :param num_iterations: Optimizer steps for each block.
    :param batch_size: Sequences of a step, at least.
    :param learning_rate: Learning rate of the offsets, in steps of the grid; None for
        ``2 / num_iterations``, 0.02 at most. All rates fall to 0, with the cube of the share of
        steps left.
    :param scale_lr: Learning rate of the scales' logarithms.
    :param learn_scales: Learn scales too, where no earlier technique froze them.
    :param trim: Share of a block's outputs to leave out of the loss, those that are furthest off.
    :param asym_strength: Share of the errors before a layer that the GPTQ at the start compensates.
    :param autocast: Compute products in bfloat16 while training, not where a state is judged; None
        for that where the device does it faster.
    :param evaluations: Number of times that a block is scored on all batches while it trains.
    :param seed: Seed of the order of batches.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"num_iterations": 50},
        "best": {"num_iterations": 400, "batch_size": 8},
    }

    num_iterations: Annotated[int, Field(ge=1)] = 200
    batch_size: Annotated[int, Field(ge=1)] = 4
    learning_rate: Positive | None = None
    scale_lr: Positive = 1e-3
    learn_scales: bool = True
    trim: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    asym_strength: Annotated[float, Field(gt=0, le=1)] = 0.5
    autocast: bool | None = None
    evaluations: Annotated[int, Field(ge=1)] = 2
    seed: int = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RotationParams(TechniqueParams):
    """Settings of :func:`aimet_ext.apply_rotation`.

    :param mode: ``"hadamard"`` for Hadamard matrices with random signs, and random orthogonal
        matrices for widths that have no construction of one; ``"random"`` for the latter always.
    :param r1: Rotate the hidden states, across all blocks.
    :param r2: Rotate the channels of each head between its values and the output projection.
    :param r3: Rotate queries and keys behind the rotary embedding, when the model runs, by a
        Hadamard matrix: for keys of 8 bits. ``"fitted"`` for matrices and shifts of each head that
        are fitted to the data, by which 8 bits cost least; not for v68 and v69, as these
        matrices need 16 bits.
    :param r3_steps: Steps of the descent that fits the matrices of an attention.
    :param seed: Seed of signs, of random matrices and of draws.
    """

    mode: Literal["hadamard", "random"] = "hadamard"
    r1: bool = True
    r2: bool = True
    r3: bool | Literal["fitted"] = False
    r3_steps: Annotated[int, Field(ge=0)] = 200
    seed: int = 0

    @model_validator(mode="after")
    def _rotates_something(self) -> RotationParams:
        if not (self.r1 or self.r2):
            raise ValueError("r1 or r2 must be true, both are false: nothing would be rotated")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpinQuantParams(TechniqueParams):
    """Settings of :func:`aimet_ext.apply_spinquant`.

    :param num_iterations: Steps of gradient descent over orthogonal matrices.
    :param mode: Matrices to start from, see :class:`RotationParams`.
    :param r1: Learn a rotation of the hidden states, across all blocks.
    :param r2: Learn a rotation of the channels of a head for each block, between its values and the
        output projection.
    :param learning_rate: Mean angle in radians by which the first step turns; it falls to 0.
    :param momentum: Share of the momentum that a step keeps.
    :param quantize_activations: Learn with the activation quantizers on, where there are any, their
        ranges taken from each batch.
    :param evaluations: Number of times that the rotations are judged on the batches held out.
    :param seed: Seed of the start and of the order of batches.
    """

    num_iterations: Annotated[int, Field(ge=1)] = 100
    mode: Literal["hadamard", "random"] = "hadamard"
    r1: bool = True
    r2: bool = True
    learning_rate: Positive = 0.005
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    quantize_activations: bool = True
    evaluations: Annotated[int, Field(ge=1)] = 5
    seed: int = 0

    @model_validator(mode="after")
    def _rotates_something(self) -> SpinQuantParams:
        if not (self.r1 or self.r2):
            raise ValueError("r1 or r2 must be true, both are false: nothing would be rotated")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ActivationRangesParams(TechniqueParams):
    """Settings of :func:`aimet_ext.apply_activation_ranges`.

    :param least_share: Share of the loss below which a tensor keeps its calibrated range
        unsearched; 0 searches all.
    :param objective: Loss by which ranges are chosen: ``"block"`` for the error of the output of a
        decoder block, ``"output"`` for the divergence of the model's outputs. The latter is for
        what is in no block either way, and for models without decoder blocks.
    """

    least_share: Annotated[float, Field(ge=0, le=1)] = 1e-3
    objective: Literal["block", "output"] = "block"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DWQParams(WeightParams):
    """Settings of :func:`aimet_ext.apply_dwq`.

    :param num_iterations: Steps of gradient descent, each on one batch.
    :param norm_gains: Learn the gains of norms as well, with their biases.
    :param learning_rate: Highest rate, relative to a scale; it falls to 0. A third of it each time
        that an evaluation finds a divergence so high that steps are taken back, unless integers are
        learnt.
    :param learn_integers: Learn the integers of the weights as well, all together. Of use from
        about 100 steps on; takes five times the memory of the weights in float32.
    :param integer_rate: Rate at which integers are learnt, in steps of their grid, of which one
        turns by each half; it falls to 0. None for ``0.2 / sqrt(num_iterations)``.
    :param top_k: Classes of the float model's outputs that are kept for each token, the likeliest
        ones; all others count as one class. None keeps all.
    :param autocast: Compute products in bfloat16 while training, not where a state is judged; None
        for that where the device does it faster.
    :param evaluations: Number of times that the state is judged on the batches held out, and that
        a checkpoint is written.
    :param patience: Times one after the other that steps are taken back, after which learning ends;
        without effect if integers are learnt.
    :param seed: Seed of the order of batches.
    :param max_bitwidth: Bits above which a layer is left alone.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"num_iterations": 32, "evaluations": 4},
    }

    num_iterations: Annotated[int, Field(ge=1)] = 100
    norm_gains: bool = True
    learning_rate: Positive = 1e-3
    learn_integers: bool = False
    integer_rate: Positive | None = None
    top_k: Annotated[int, Field(ge=1)] | None = 256
    autocast: bool | None = None
    evaluations: Annotated[int, Field(ge=1)] = 8
    patience: Annotated[int, Field(ge=1)] = 3
    seed: int = 0
