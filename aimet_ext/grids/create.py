"""A simulation of a language model in one call, and the grid of each of its weights."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from aimet_ext.data.batches import (
    TARGET_IDS,
    as_tensors,
    call_arguments,
    map_tensors,
    module_device,
)
from aimet_ext.data.geometry import TRANSPOSED
from aimet_ext.errors import require, some
from aimet_ext.files.reading import read_json
from aimet_ext.grids.patterns import LAYERS
from aimet_ext.models.encoder_decoder import PreparedEncoderDecoder
from aimet_ext.models.hidden import expose_weights
from aimet_ext.models.huggingface import (
    PreparedCausalLM,
    language_model,
    original_name,
    prepare_model,
)
from aimet_ext.patterns import fits as fits_pattern
from aimet_ext.patterns import near
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import PerTensor, QSpec, WeightPlan, check_widths, fit_blocks

if TYPE_CHECKING:
    from aimet_torch import QuantizationSimModel

_logger = logging.getLogger(__name__)
_CONFIG = "htp_v79"
# What masks hold where activations are integers: e^-100 is nothing, and 16 bits reach that far.
_MASK = -100.0
_W4, _W8 = QSpec(bitwidth=4), QSpec(bitwidth=8)


def create_sim(
    model: nn.Module,
    sample_input_ids: Any,
    *,
    weights: QSpec | None = _W4,
    lm_head: QSpec | None = _W8,
    embedding: QSpec | Literal["auto"] | None = "auto",
    activations: int | QSpec | None = 16,
    overrides: Mapping[str, QSpec | None] | None = None,
    config_file: str | Path | Mapping[str, Any] | None = None,
    allow_float: float = 0.05,
    in_place: bool = False,
) -> QuantizationSimModel:
    """Build a ``QuantizationSimModel`` of a language model, with the settings of an edge LLM.

    The model is copied, in its own dtype, and the original is not touched, unless ``in_place``.
    Weights have ranges at the end (those of plain rounding), activations have none: run
    ``sim.compute_encodings`` for them, after the techniques of this package.

    Any architecture is taken. In the copy, modules that compute ``x @ weight + bias``, such as
    GPT-2's ``Conv1D``, are ``nn.Linear``. Modules of classes that AIMET does not know get
    quantizers where they make one tensor of one tensor (norms, activations) or are embeddings, and
    are float otherwise (rotary embeddings); a class that you registered with
    ``QuantizationMixin.implements`` or ``ignore_unknown_modules`` stays as you want it.
    In the copy, weights that AIMET does not see are layers: experts packed in one parameter are
    linear layers ``experts.gate_up_proj.0``, ``experts.down_proj.0`` and so on, of which those of
    a block share the quantizers of their outputs, and ``nn.MultiheadAttention`` has ``q_proj``,
    ``k_proj`` and ``v_proj``. Matrices stacked in a parameter, as RecurrentGemma's gates, are a
    linear layer each, in its place. A module with parameters that one call of the module around it
    calls twice stays float. Exports hold the weights under the names of the checkpoint.

    :param model: Causal LM or encoder-decoder (T5, BART, Whisper) of transformers, what
        :func:`prepare_model` made of one, or a module of your own that returns logits and can be
        traced. A model of transformers is prepared here; where
        activations are quantized, with a ``mask_value`` of -100, which their grids can hold.
    :param sample_input_ids: Ids ``[batch, seq]`` to trace with; also a mapping with ``input_ids``,
        or a tuple of the arguments that a module of your own takes. Of an encoder-decoder, a
        mapping or tuple of what the prepared model takes; what it leaves out, such as masks, gets
        no quantizers.
    :param weights: Spec of linear layers and convolutions inside the blocks; None leaves them
        float. Transposed convolutions have one range a channel in place of blocks, and each matrix
        of a recurrent layer has one range.
    :param lm_head: Spec of the output layer.
    :param embedding: Spec of the token embedding, a row is a channel. Where it shares its weight
        with the output layer both need the same spec, and they share the quantizer too. ``"auto"``
        is the spec of the output layer there, and else one scale for the tensor in as many bits:
        what lookups of NPUs take, and ``aimet_onnx`` too, which loads no encoding by rows for one.
    :param activations: Bits (asymmetric) or spec of all inputs and outputs. None leaves them and
        the gains of norms float; otherwise gains have 16 bits, or 8 beside activations of 8.
    :param overrides: Specs for the layers whose name, in the checkpoint or in the model, fits a
        pattern like ``"model.layers.0.*"``; of several that fit, the first one counts. The name of
        a recurrent layer stands for all of its matrices, ``"rnn.weight_ih_l0"`` for one.
    :param config_file: Alias, path or content of AIMET's configuration, which says what tensors
        are quantized at all. None is ``"htp_v79"``: what the NPU of a phone computes.
    :param allow_float: Largest share of the numbers in the model's matrices, from 0 to 1, that may
        stay float because their modules cannot be quantized. A smaller share is logged. Parameters
        that are used element by element, such as ``A_log`` of Mamba, are no matrices.
    :param in_place: Make the simulation of the model itself, so that the weights are in memory
        once. The model is the simulation's from then on, also after an error, and computes with
        quantizers: what compares with the float model, such as ``reference`` of
        :func:`aimet_ext.apply_dwq`, needs it loaded again, or its outputs from before
        (:func:`aimet_ext.float_logits`). A model with hidden weights (see above) is copied all the
        same; drop your own.
    :returns: the simulation. ``sim.aimet_ext_settings`` holds these settings as JSON values.
    :raises TypeError: no language model, a spec that is none, or a sample that holds no ids.
    :raises ValueError: a width that no weight can have, ids longer than the context, a pattern that
        fits no layer, a block size that does not divide or for recurrent layers alone, two specs
        for one shared weight, or a larger share of matrices than ``allow_float`` that cannot be
        quantized.
    :raises MissingExtraError: aimet-torch is not installed.

    >>> sim = create_sim(model, ids, weights=QSpec(bitwidth=4, granularity=LPBQ(64)))
    """
    require("aimet_torch", "torch")
    from aimet_ext.sim.torch.setup import build_sim
    from aimet_ext.sim.torch.unknown import is_registered

    overrides = dict(overrides or {})
    stored = {"weights": weights, "lm_head": lm_head}
    stored |= {f"overrides[{pattern!r}]": spec for pattern, spec in overrides.items()}
    if embedding != "auto":
        stored["embedding"] = embedding
    _check_specs(**stored, activations=activations)
    if isinstance(activations, int):
        activations = QSpec(bitwidth=activations, symmetric=False)
    check_widths("weights", stored)
    check_widths("activations", {"activations": activations})
    module = model
    if hasattr(model, "get_output_embeddings"):
        module = prepare_model(model, mask_value=None if activations is None else _MASK)
    dummy_input = _dummy_input(sample_input_ids, module)
    given, module = module, expose_weights(module, is_registered, dummy_input)
    if embedding == "auto":
        embedding = _embedding(module, lm_head)
    specs = {"weights": weights, "lm_head": lm_head, "embedding": embedding}
    plan = plan_weights(module, **specs, overrides=overrides)
    layers: dict[str, Any] = {n: module.get_submodule(n) for n, spec in plan.specs.items() if spec}
    if bad := [name for name, layer in layers.items() if not bool(layer.weight.isfinite().all())]:
        raise ValueError(
            f"finite weights are required, but {some([original_name(n, module) for n in bad])} "
            "holds NaN or infinity; repair the checkpoint"
        )
    padded: dict[str, int] = {}
    if plan.pad:
        from aimet_ext.grids.widening import pad_mlps

        module = copy.deepcopy(module) if module is given and not in_place else module
        padded = pad_mlps(module, plan)
    config = _config(config_file)
    in_place |= module is not given  # a copy already
    sim = build_sim(
        module,
        dummy_input,
        plan.specs,
        activations,
        config,
        recurrent=plan.recurrent,
        in_place=in_place,
    )
    allowed = 1.0 if weights is None else allow_float
    left = _left_float(sim, dummy_input, plan, allowed)
    adapt(sim).settings = {
        **{name: _plain(spec) for name, spec in specs.items()},
        "activations": _plain(activations),
        "overrides": {pattern: _plain(spec) for pattern, spec in overrides.items()},
        "config_file": config,
        "per_channel_instead": list(plan.per_channel_instead),
        "padded_mlp_widths": padded,
        "left_float": left,
        "mask_value": getattr(module, "mask_value", None),
    }
    return sim


def plan_weights(
    model: nn.Module,
    *,
    weights: QSpec | None,
    lm_head: QSpec | None,
    embedding: QSpec | None,
    overrides: Mapping[str, QSpec | None],
) -> WeightPlan:
    """Give each linear layer, convolution, embedding and recurrent matrix of a model its spec.

    :param overrides: Specs by pattern, matched with names of the model and of its checkpoint; the
        first one that fits counts.
    :raises ValueError: a pattern that fits nothing, a block size that does not divide a layer
        whose spec says ``on_indivisible="error"``, blocks for recurrent layers alone, or two specs
        for one shared weight.
    """
    matrices = _recurrent_matrices(model)
    recurrent: dict[str, QSpec | None] = dict.fromkeys(matrices, _one_range(weights))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (*LAYERS, *TRANSPOSED))}
    inside = language_model(model)
    output = None if inside is None else inside.get_output_embeddings()
    specs: dict[str, QSpec | None] = {}
    for name, layer in layers.items():
        if layer is output:
            specs[name] = lm_head
        else:
            specs[name] = embedding if isinstance(layer, nn.Embedding) else weights
    for pattern, spec in reversed(list(overrides.items())):  # the first pattern has the last word
        fitting = [name for name in layers if fits(name, pattern, model)]
        within = [n for n, at in matrices.items() if any(fits(x, pattern, model) for x in (n, at))]
        if not fitting and not within:
            names = [original_name(n, model) for n in (*layers, *matrices.values(), *matrices)]
            raise ValueError(
                f"the pattern of an override must fit a layer with a weight, {pattern!r} fits "
                f"none; names look like {next(iter(names), '')!r}{near(pattern, names)}"
            )
        if within and not fitting and spec is not None and spec.block_size is not None:
            raise ValueError(
                f"overrides[{pattern!r}]: one range is required for each matrix of a recurrent "
                f"layer, AIMET has no blocks for {some(within)}, got {spec}; leave the blocks out"
            )
        specs.update(dict.fromkeys(fitting, spec))
        recurrent.update(dict.fromkeys(within, _one_range(spec)))
    _check_shared(layers, specs)
    return fit_blocks(layers, specs)._replace(recurrent=recurrent)


def _recurrent_matrices(model: nn.Module) -> dict[str, str]:
    """Return the names of the matrices of recurrent layers and cells, and the layer of each."""
    return {
        key: name
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase)
        for key, _ in module.named_parameters(name, recurse=False)
        if key.rpartition(".")[2].startswith("weight")
    }


def _one_range(spec: QSpec | None) -> QSpec | None:
    return None if spec is None else replace(spec, granularity=PerTensor())


def fits(name: str, pattern: str, model: nn.Module) -> bool:
    """Return True if a layer's name in the model or in its checkpoint fits a pattern."""
    return fits_pattern(pattern, name, original_name(name, model))


def _embedding(module: nn.Module, lm_head: QSpec | None) -> QSpec | None:
    """Return the spec of an embedding for ``embedding="auto"``."""
    inside = language_model(module)
    if inside is not None:
        output, lookup = inside.get_output_embeddings(), inside.get_input_embeddings()
        if output is not None and output.weight is lookup.weight:
            return lm_head
    bits = _W8.bitwidth if lm_head is None else lm_head.bitwidth
    return QSpec(bitwidth=bits, granularity=PerTensor())


def _check_specs(**specs: object) -> None:
    """Check the type of arguments that are specs; activations may be a number of bits.

    :raises TypeError: one is of another type.
    """
    for name, spec in specs.items():
        is_bits = name == "activations" and isinstance(spec, int)
        if spec is not None and not isinstance(spec, QSpec) and not is_bits:
            raise TypeError(
                f"{name} must be a QSpec, or None for float, got {spec!r}; "
                'write QSpec.parse("int4") for a width in words'
            )


def arguments_from_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of :func:`create_sim` that build the same simulation again.

    :param settings: ``sim.aimet_ext_settings``, or the same read back from a file.
    """
    specs = ("weights", "lm_head", "embedding", "activations")
    return {
        **{name: _spec(settings[name]) for name in specs},
        "overrides": {pattern: _spec(plain) for pattern, plain in settings["overrides"].items()},
        "config_file": settings["config_file"],
        "allow_float": 1.0,  # it was accepted once
    }


def _left_float(
    sim: QuantizationSimModel, dummy_input: Any, plan: WeightPlan, allowed: float
) -> list[str]:
    """Return the names of the matrices that no quantizer takes though none was told to be float.

    What is used element by element is none, such as the decays of state space models.

    :param allowed: largest share of the numbers in all matrices.
    :raises ValueError: it is a larger share.
    """
    from aimet_ext.sim.torch.elementwise import elementwise
    from aimet_ext.sim.torch.unknown import float_matrices

    every = {**plan.specs, **plan.recurrent}
    meant = [name for name, spec in every.items() if spec is None]
    sizes = float_matrices(sim.model, meant)
    if sizes:
        with adapt(sim).disabled_quantizers():
            single = elementwise(sim.model, dummy_input, sizes)
        sizes = {name: size for name, size in sizes.items() if name not in single}
    if not sizes:
        return []
    state = adapt(sim).float_parameters("").items()
    numbers = sum(v.numel() for name, v in state if v.dim() > 1 and name not in single)
    share = sum(sizes.values()) / numbers
    names = [original_name(name, sim.model) for name in sorted(sizes, key=lambda n: -sizes[n])]
    if share > allowed:
        raise ValueError(
            f"at most {allowed:.1%} of the numbers in the model's matrices may stay float, but "
            f"modules with {share:.1%} of them are of no class that can be quantized, or other "
            f"code reads their weights: {some(names)}; compute with nn.Linear there, register "
            "their classes with AIMET's QuantizationMixin.implements, or allow it with "
            f"allow_float={share + 5e-3:.2f}"
        )
    said = "%.2f %% of the numbers in the model's matrices stay float: %s"
    _logger.warning(said, 100 * share, some(names))
    return names


def _check_shared(layers: Mapping[str, Any], specs: Mapping[str, QSpec | None]) -> None:
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(layer.weight), name)
        if specs[name] != specs[other]:
            raise ValueError(
                f"{other} and {name} share one weight and need the same spec, got "
                f"{specs[other]} and {specs[name]}; for a model with tied embeddings pass the "
                "same for embedding and lm_head"
            )


def _plain(spec: QSpec | None) -> dict[str, Any] | None:
    return None if spec is None else spec.to_dict()


def _spec(plain: Mapping[str, Any] | None) -> QSpec | None:
    return None if plain is None else QSpec.from_dict(dict(plain))


def _config(config: str | Path | Mapping[str, Any] | None) -> str | dict[str, Any]:
    """Return AIMET's alias, or the content of a configuration file."""
    if config is None:
        return _CONFIG
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if path.suffix == ".json":
        return read_json(path)
    return str(config)


def _dummy_input(sample: Any, module: nn.Module) -> Any:
    if isinstance(module, PreparedEncoderDecoder):
        return _arguments(sample, module)
    sample = as_tensors(sample.get("input_ids") if isinstance(sample, Mapping) else sample)
    if not isinstance(sample, Tensor | tuple | list):
        raise TypeError(
            "sample_input_ids must be a tensor of ids, a mapping with input_ids or a tuple of "
            f"arguments, got {type(sample).__name__}"
        )
    if isinstance(module, PreparedCausalLM):
        module.check_input(*(sample if isinstance(sample, tuple | list) else (sample,)))
    device = module_device(module)
    return map_tensors(lambda tensor: tensor.to(device), sample)


def _arguments(sample: Any, module: PreparedEncoderDecoder) -> tuple[Any, ...]:
    """Return the positional arguments of an encoder-decoder to trace it with."""
    names = list(inspect.signature(module.forward).parameters)
    args, kwargs = call_arguments(as_tensors(sample))
    given, fault = {}, "no decoder_input_ids"
    try:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        fault = str(error)
    if given.get(TARGET_IDS) is None:
        raise TypeError(
            f"sample_input_ids must be a mapping or tuple of {', '.join(names)} for an "
            f"encoder-decoder (masks may be left out), got {type(sample).__name__}: {fault}"
        )
    device = module_device(module)
    values = [given.get(name) for name in names]
    while values[-1] is None:
        values.pop()
    return tuple(map_tensors(lambda tensor: tensor.to(device), values))
