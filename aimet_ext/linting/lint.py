"""The rules that a chip sets for a simulation, and their findings before anything is exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from aimet_ext.errors import Finding
from aimet_ext.integrations.qnn_targets import (
    ANGLE_STEP,
    LIMITS,
    MASK_LIMIT,
    NORM_REMEDY,
    SCORE_STEP,
    HtpLimits,
    HtpTarget,
    find_target,
    refuses_norm,
)
from aimet_ext.sim.facts import FIXED_RANGES, Activation, LintLayer, SimFacts
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import PerTensor

_Rule: TypeAlias = Callable[[SimFacts, HtpLimits], Iterator[Finding]]

# Lookup tables are no factors: their values are activations.
_TABLE_WIDTHS: dict[str, set[int]] = {"embedding": {8, 16}, "linear": set(), "conv": set()}


def lint(sim: Any, target: str | HtpTarget = "htp_v79") -> list[Finding]:
    """Find what a chip's HTP does not compute as the simulation does.

    Nothing is run, compiled or changed: looked at are widths of weights and activations, grids,
    block sizes, biases beside LPBQ, lookup tables, gains of norms, ranges that are fixed, absent or
    ruined by a mask, angles of rotary embeddings, layers left float, and caches whose input and
    output differ. A simulation without findings can still fail; ``aimet_ext.verify`` compiles and
    runs it.

    :param sim: ``aimet_torch.QuantizationSimModel`` or ``aimet_onnx.QuantizationSimModel``, best
        after ``sim.compute_encodings``.
    :param target: Architecture (``"htp_v75"``) or chip (``"sm8650"``).
    :returns: the findings, each with what to do about it; none if there is nothing.
    :raises ValueError: the target is not known.
    :raises TypeError: ``sim`` is no simulation.

    >>> for finding in lint(sim, target="htp_v75"):
    ...     print(finding)
    """
    limits = LIMITS[find_target(target).arch]
    facts = adapt(sim).lint_facts()
    return [finding for rule in _RULES for finding in rule(facts, limits)]


@dataclass(frozen=True)
class _LayerRule:
    """A rule of single layers.

    :param check: Name of the rule.
    :param on: One of the kinds of layers that it is for, see :func:`_kinds`.
    :param fault: Function that returns the fault of a layer with that weight, None if it has none.
    :param remedy: Remedy, or function that returns the one for the same layer.
    """

    check: str
    on: str
    fault: Callable[[LintLayer, Any, HtpLimits], str | None]
    remedy: str | Callable[[LintLayer, HtpLimits], str]


def _kinds(layer: LintLayer) -> set[str]:
    """Return the kinds of a layer by its weight: the name of the granularity is one of them."""
    if layer.weight is None:
        return {"float"}
    use = "table" if layer.kind == "embedding" else "factor"
    return {"quantized", use, type(layer.weight.granularity).__name__}


def _weight_width(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    taken = sorted({bits for bits, _ in limits.widths} | _TABLE_WIDTHS[layer.kind])
    if weight.bitwidth in taken:
        return None
    return f"weights of {_or(taken)} bits are required, got {weight.bitwidth}"


def _widths(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    if _weight_width(layer, weight, limits):
        return None
    for activation in (layer.reads, layer.makes):
        if activation is None:
            continue
        taken = sorted(bits for own, bits in limits.widths if own == weight.bitwidth)
        if activation.bitwidth not in taken:
            return (
                f"activations of {_or(taken)} bits are required beside weights of "
                f"{weight.bitwidth}, got {activation.bitwidth} of {activation.name}"
            )
    return None


def _change(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    reads, makes = layer.reads, layer.makes
    if reads is None or makes is None or reads.bitwidth == makes.bitwidth:
        return None
    return (
        f"input and output of one width are required, got {reads.bitwidth} bits of {reads.name} "
        f"and {makes.bitwidth} of {makes.name}"
    )


def _symmetry(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    if weight.layout.symmetric:
        return None
    return "a symmetric weight is required, got one with an offset"


def _blockwise(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    return (
        "LPBQ or a scale for each channel is required, got a float scale for every block: such "
        "weights are computed in float if at all, and beside a bias wrongly"
    )


def _lpbq_bits(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    bits = (weight.bitwidth, weight.granularity.scale_bits)
    if bits in limits.lpbq or _weight_width(layer, weight, limits):
        return None
    taken = " or ".join(f"{w} bits with scales of {s}" for w, s in sorted(limits.lpbq))
    return f"LPBQ weights of {taken} are required, got {bits[0]} with {bits[1]}"


def _lpbq_block(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    block, conv = weight.granularity.block_size, layer.kind == "conv"
    if limits.takes_block(block, layer.width, conv=conv):
        return None
    multiple = 8 if conv else limits.block_multiple
    small = (
        f" (or of {limits.small_block} where {multiple} divides the input width)"
        if limits.small_block and not conv
        else ""
    )
    return (
        f"LPBQ blocks of a multiple of {multiple}{small} are required, got {block} at an input "
        f"width of {layer.width}: such weights are refused, or accepted and computed wrongly"
    )


def _block_remedy(layer: LintLayer, limits: HtpLimits) -> str:
    sizes = limits.blocks(layer.width, conv=layer.kind == "conv")
    if sizes:
        return f"call set_lpbq with a block size of {_or(sizes)} for it"
    return (
        'give it a scale for each channel (set_lpbq with on_indivisible="per_channel"), or widen '
        'an MLP with create_sim and on_indivisible="pad"'
    )


def _lpbq_conv(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    if layer.kind != "conv":
        return None
    if not limits.lpbq_conv:
        return f"v{limits.arch} takes no convolution with LPBQ"
    if any(size != 1 for size in layer.kernel):
        kernel = " x ".join(map(str, layer.kernel))
        return f"LPBQ is for convolutions with a kernel of 1, got {kernel}"
    if layer.reads is not None and layer.reads.bitwidth != 16:
        return f"LPBQ of a convolution is for inputs of 16 bits, got {layer.reads.bitwidth}"
    return None


def _lpbq_bias(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    if layer.fused is None:
        return None
    if layer.fused == "Conv":
        return "an int32 bias is required beside an LPBQ weight, got a float one: it is dropped"
    return (
        "a MatMul, and an Add for its bias, are required where the weight is LPBQ, got "
        f"{layer.fused}: its bias is dropped without an error, or it is refused"
    )


def _bias(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    if layer.bias is None or layer.reads is None or not layer.reads.step or not weight.initialized:
        return None
    scale = weight.grid().scale.flatten()
    if len(scale) not in (1, len(layer.bias)):
        return None  # beside blocks a bias is float
    numbers = layer.bias.detach().abs() / (layer.reads.step * scale).to(layer.bias)
    beyond = int((numbers > 2**31).sum())
    if not beyond:
        return None
    return (
        f"biases within 2^31 of the input's times the weight's scale are required, got "
        f"{float(numbers.max()):.3g} in {beyond} of {len(numbers)} output channels: an int32 "
        "overflows"
    )


def _bias_remedy(layer: LintLayer, limits: HtpLimits) -> str:
    if layer.fused == "Conv":
        return "write the model with sim.to_onnx_qdq(export_int32_bias=True)"
    if layer.fused == "Gemm":
        return "export the model with 3-dimensional inputs to its linear layers, or use 8 bits"
    return 'build the simulation with a config_file that has no "MatmulAdd" in supergroup_pass_list'


def _table(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    if layer.tied or isinstance(weight.granularity, PerTensor):
        return None
    return "a lookup table with one scale is required, got a scale for each row"


def _float_weight(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    where = "in float16" if limits.float16 else "not at all"
    return f"a quantized weight is required, got a float one: the layer is computed {where}"


def _float_side(layer: LintLayer, weight: Any, limits: HtpLimits) -> str | None:
    if not layer.floats:
        return None
    sides = _joined([*layer.floats], "and")
    return f"quantizers around a quantized weight are required, got none of its {sides}"


_LAYER_RULES = (
    _LayerRule("weight width", "quantized", _weight_width, "use 4 or 8 bits"),
    _LayerRule("widths", "factor", _widths, "use 16 bits for activations, 4 or 8 for weights"),
    _LayerRule("width change", "factor", _change, "give both quantizers the same bitwidth"),
    _LayerRule("symmetry", "factor", _symmetry, "set symmetric=True, and calibrate its weight"),
    _LayerRule("blockwise", "Blockwise", _blockwise, "call set_lpbq with the same block size"),
    _LayerRule("LPBQ bits", "LPBQ", _lpbq_bits, "use LPBQ of 4 bits with scale_bits=4"),
    _LayerRule("LPBQ block", "LPBQ", _lpbq_block, _block_remedy),
    _LayerRule("LPBQ convolution", "LPBQ", _lpbq_conv, "give it a scale for each channel"),
    _LayerRule(
        "bias",
        "factor",
        _bias,
        "raise the weight's scale there, or calibrate its input on more data",
    ),
    _LayerRule("LPBQ bias", "LPBQ", _lpbq_bias, _bias_remedy),
    _LayerRule(
        "lookup table", "table", _table, "use QSpec(granularity=PerTensor()) for the embedding"
    ),
    _LayerRule("float layer", "float", _float_weight, "quantize it, to 8 bits for example"),
    _LayerRule("float activation", "factor", _float_side, "enable the quantizer there"),
)


def _layers(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    """Check single layers; where all activations are float that is one finding."""
    for layer in facts.layers:
        kinds = _kinds(layer)
        for rule in _LAYER_RULES:
            if rule.check == "float activation" and not facts.activations:
                continue
            message = rule.fault(layer, layer.weight, limits) if rule.on in kinds else None
            if message is not None:
                given = rule.remedy
                remedy = given if isinstance(given, str) else given(layer, limits)
                yield Finding(rule.check, layer.name, message, remedy)


def _activations(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    """Check the widths of activations, and that there are integer ones."""
    if not facts.activations:
        yield Finding(
            "float activation",
            "the simulation",
            "integer activations are required, got none: layers with quantized weights and float "
            "activations are refused",
            "build the simulation with activations of 16 bits, and calibrate them",
        )
        return
    taken = sorted({bits for _, bits in limits.widths})
    for activation in facts.activations:
        if activation.bitwidth not in taken:
            yield Finding(
                "activation width",
                activation.name,
                f"{_or(taken)} bits are required, got {activation.bitwidth}",
                "set its bitwidth to 8 or 16",
            )


def _ranges(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    # Fixed ranges are there before calibration.
    fixed = {activation.name for _, activation in facts.fixed}
    unset = [activation.name for activation in facts.activations if activation.low is None]
    remedy = "run sim.compute_encodings on calibration data that reaches it"
    if unset and all(a.low is None or a.name in fixed for a in facts.activations):
        message = f"calibrated activations are required, all {len(unset)} quantizers have no range"
        yield Finding("range", "the simulation", message, "run sim.compute_encodings")
        unset = []
    for name in (*facts.unset, *unset):
        yield Finding("range", name, "a range is required, the quantizer has none", remedy)


def _fixed(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    for operator, activation in facts.fixed:
        low, high = FIXED_RANGES[operator]
        if activation.low is None or activation.high is None:
            continue
        slack = (high - low) / (2**activation.bitwidth - 1)
        if activation.low > low + slack or activation.high < high - slack:
            yield Finding(
                "fixed range",
                activation.name,
                f"the output of a {operator} needs the range {low:g} to {high:g}, got "
                f"{activation.low:.4g} to {activation.high:.4g}: values beyond it are not clipped",
                f"write the range {low:g} to {high:g} into its quantizer and freeze it",
            )


def _masks(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    remedy = "build the simulation of prepare_model(model, mask_value=-100.0), or of its export"
    if facts.mask is not None and facts.mask < MASK_LIMIT and facts.activations:
        yield Finding(
            "mask",
            "the attention mask",
            f"a mask of {MASK_LIMIT:g} or nearer to 0 is required where scores are integers, got "
            f"{facts.mask:.3g}, beside which a grid holds no score",
            remedy,
        )
    for activation in facts.masked:
        if activation.low is not None and activation.low < MASK_LIMIT:
            yield Finding(
                "mask",
                activation.name,
                f"a range from {MASK_LIMIT:g} or nearer to 0 is required of masked scores, got "
                f"{activation.low:.3g}: their step is {activation.step:.3g}",
                remedy,
            )


def _scores(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    """Check the steps of masked scores, known ones or those that the mask makes at least."""
    steps = [(a.name, a.step) for a in facts.masked if a.low is None or a.low >= MASK_LIMIT]
    widths = [activation.bitwidth for activation in facts.activations]
    if facts.mask is not None and facts.mask >= MASK_LIMIT and widths:
        bits = max(set(widths), key=widths.count)  # what an NPU's other quantizers get
        steps.append(("the attention mask", -facts.mask / ((1 << bits) - 1)))
    for name, step in steps:
        if step > SCORE_STEP:
            yield Finding(
                "scores",
                name,
                f"scores of steps of {SCORE_STEP:g} or less are required before a Softmax, got "
                f"{step:.3g}: a rounding changes an attention weight by up to "
                f"{math.expm1(step / 2):.0%}",
                "quantize activations to 16 bits",
            )


def _angles(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    for activation in facts.angles:
        if activation.step > ANGLE_STEP:
            yield Finding(
                "angles",
                activation.name,
                f"angles of steps of {ANGLE_STEP:g} radians or less are required before Cos and "
                f"Sin, got {activation.step:.3g}: rotary embeddings of most positions are lost",
                "export prepare_model(model, mask_value=-100.0), which looks cosine and sine up "
                "in tables, or remove the quantizer",
            )


def _operands(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    for activation in () if limits.wide_operands else facts.operands:
        if activation.bitwidth > 8:
            yield Finding(
                "operand width",
                activation.name,
                "8 bits are required of the second operand of a product of two activations, got "
                f"{activation.bitwidth}: v{limits.arch} rounds it to 8",
                "take a target from v73 on, or set its bitwidth to 8 (kv_bitwidth=8 for what is "
                "kept between calls), so that the simulation shows what that costs",
            )


def _norms(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    for norm in facts.norms:
        types = norm.types()
        if refuses_norm(*types):
            yield Finding(
                "norm",
                norm.name,
                f"a gain that v{limits.arch} takes in an RMS norm from {types[0]} to {types[2]} is "
                f"required, got {types[1]}",
                NORM_REMEDY,
            )


def _tied(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    for given, made, name, source in facts.tied:
        if given is not None and made is not None and given.grid() == made.grid():
            continue
        if given is None and made is None:
            continue
        yield Finding(
            "tied encodings",
            name,
            f"the encoding of {source} is required, which becomes it at the next call: "
            f"{_shown(made)}, got {_shown(given)}",
            f"let both have one quantizer (sim.set_quantizers), or freeze the range of {source} "
            "in both",
        )


def _conversions(facts: SimFacts, limits: HtpLimits) -> Iterator[Finding]:
    for one, other in facts.conversions:
        yield Finding(
            "width change",
            other.name,
            f"one width for a tensor is required, got {other.bitwidth} bits where {one.name} has "
            f"quantized it to {one.bitwidth}: an export keeps one of them",
            "give both quantizers the same bitwidth, or remove one",
        )


def _shown(activation: Activation | None) -> str:
    if activation is None:
        return "float"
    if activation.low is None:
        return f"{activation.bitwidth} bits without a range"
    return f"{activation.bitwidth} bits from {activation.low:.4g} to {activation.high:.4g}"


def _or(values: list[int]) -> str:
    return _joined([str(value) for value in values], "or")


def _joined(values: list[str], word: str) -> str:
    if len(values) < 2:
        return "".join(values)
    return f"{', '.join(values[:-1])} {word} {values[-1]}"


_RULES: tuple[_Rule, ...] = (
    _layers,
    _activations,
    _ranges,
    _fixed,
    _masks,
    _scores,
    _angles,
    _operands,
    _norms,
    _tied,
    _conversions,
)
