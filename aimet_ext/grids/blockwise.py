"""Blockwise grids for the weights of a simulation that exists already."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from aimet_ext.errors import some
from aimet_ext.grids.patterns import Layers, LayerTable, select_specs
from aimet_ext.sim.protocol import SimAdaptor, adapt
from aimet_ext.specs import LPBQ, Blockwise, OnIndivisible, QSpec, WeightPlan, fit_blocks
from aimet_ext.techniques.call import accepts_aimet_arguments
from aimet_ext.techniques.layer_report import LayerwiseReport


@dataclass(frozen=True, kw_only=True)
class GridReport:
    """Result of :func:`set_lpbq` or :func:`set_blockwise`; ``print`` shows a table.

    :param specs: Grid that each layer has now, by name; None for a weight that is float now.
    :param per_channel_instead: Layers whose width the block size does not divide, and which are
        quantized per channel instead.
    :param padded: New inner width of each MLP by name of block, if any was padded.
    :param untouched: Layers with a quantized weight that were left as they are.
    :param search: Report of the search for scales by :func:`apply_lpbq`; None without data.
    """

    specs: dict[str, QSpec | None]
    per_channel_instead: tuple[str, ...] = ()
    padded: dict[str, int] = field(default_factory=dict)
    untouched: tuple[str, ...] = ()
    search: LayerwiseReport | None = None

    def __str__(self) -> str:
        rows = Counter(
            (re.sub(r"(?<=[./])\d+(?=[./])", "*", name), self._grid(name)) for name in self.specs
        )
        width = max([len("layers"), *(len(name) for name, _ in rows)]) + 2
        lines = [f"{'layers':<{width}}{'':>5}  weights"]
        lines += [f"{name:<{width}}{count:>5}  {grid}" for (name, grid), count in rows.items()]
        if self.padded:
            widths = ", ".join(map(str, sorted(set(self.padded.values()))))
            lines.append(f"{len(self.padded)} MLPs padded with zeros to an inner width of {widths}")
        lines.append(f"{len(self.untouched)} other quantized layers left as they are")
        if self.search is not None:
            lines.append(str(self.search))
        return "\n".join(lines)

    def _grid(self, name: str) -> str:
        spec = self.specs[name]
        if spec is None:
            return "float"
        text = f"{spec.width} {spec.granularity}"
        return text + (" instead" if name in self.per_channel_instead else "")


@accepts_aimet_arguments(order=("sim", "block_size"))
def set_lpbq(
    sim: Any,
    block_size: int = 64,
    *,
    bitwidth: int = 4,
    scale_bits: int = 4,
    layers: Layers = "*",
    modules_to_exclude: str | nn.Module | Iterable[str | nn.Module] = (),
    overrides: Mapping[str, QSpec | None] | None = None,
    on_indivisible: OnIndivisible = "error",
) -> GridReport:
    """Quantize weights of a simulation by LPBQ: in blocks, with integer block scales.

    Source: ``set_grouped_blockwise_quantization_for_weights`` of AIMET 2.42.

    A block is ``block_size`` neighbouring input channels of one output channel, with the whole
    kernel of a convolution; the input channels of a grouped convolution are those of one group, so
    that a depthwise one has a single channel, which no block size divides. Kernels of any size are
    simulated and exported as AIMET does; not every runtime takes other than 1x1 ones in blocks.
    Where a weight is shared its layers share one quantizer.

    Layers of an ONNX simulation have the names of their nodes, before AIMET fused them too; they go
    without the type at their end, and with dots: ``"/layers.0/up_proj/MatMul"``,
    ``"/layers.0/up_proj"`` and ``"layers.0.up_proj"`` are one layer.

    Ranges are set at once from the weights, as ``sim.compute_encodings`` does, which may be called
    later for the rest. Everything is checked before anything changes; if a change fails
    nevertheless, the simulation is put back as it was.

    Does what ``set_grouped_blockwise_quantization_for_weights(sim, arg, bitwidth, True,
    decompressed_bw, block_size, block_grouping=-1)`` of AIMET does, ``decompressed_bw`` being
    ``bitwidth + scale_bits`` and ``arg`` being ``layers``, and sets the ranges; on ONNX what
    ``set_lpbq_for_params`` does. Unlike there, a width that is not divided is an error unless
    ``on_indivisible`` says otherwise, linear layers with a bias are among those of type
    ``"MatMul"``, and frozen quantizers are not replaced.

    :param sim: ``aimet_torch.QuantizationSimModel``, from ``create_sim`` or built by hand, or
        ``aimet_onnx.QuantizationSimModel``.
    :param block_size: Input channels of a block.
    :param bitwidth: Bits of a quantized weight.
    :param scale_bits: Bits of the integer scales.
    :param layers: Layers to change, among those whose weight is quantized today; one of these or a
        list of them: a name or pattern (in the model or in the checkpoint it came from); a module
        of ``sim.model``; a type of module; a function that takes a module and returns a bool; in
        an ONNX simulation a type of node such as ``"Gemm"`` (AIMET's name ``op_types`` is
        understood). The default ``"*"`` means all linear layers and 2-d convolutions. Embeddings
        and the output layer of a language model are left out by patterns, unless these end with
        the layer's own name, as ``"lm_head"`` does; types and functions mean all that they fit, as
        in AIMET. The output layer of an ONNX model with an embedding is what makes ``"logits"``,
        or its first output if none is called so.
    :param modules_to_exclude: Names, patterns or modules to leave as they are, with all in them
        (AIMET's name ``nodes_to_exclude`` is understood).
    :param overrides: Other specs by pattern, for any layer with a weight, also one that ``layers``
        leaves out; None leaves the weight float. Of several that fit, the first one counts.
    :param on_indivisible: Treatment of a layer whose width ``block_size`` does not divide:
        ``"error"``, ``"per_channel"``, or ``"pad"``, which widens the MLPs of all blocks, in place,
        by zeros, so that the model computes what it did; only MLPs of PyTorch models can be
        widened. Parameters of padded layers are new objects: build optimizers afterwards.
    :returns: what was done. ``sim.aimet_ext_settings``, if there, is brought up to date.
    :raises TypeError: no simulation of AIMET, or a wrong type of argument.
    :raises ValueError: a setting out of range; a pattern, name, type or function that fits nothing;
        a module that is not in the model; a width that is not divided; a frozen quantizer or
        rounded weight; two specs for a shared weight; a weight that is not finite.

    >>> report = set_lpbq(sim, 64, modules_to_exclude=["*.layers.0.*"], on_indivisible="pad")
    >>> print(report)
    """
    spec = lpbq_spec(block_size, bitwidth, scale_bits, on_indivisible)
    with ExitStack() as undo:
        report = set_grids(sim, spec, layers, modules_to_exclude, overrides, undo)
        undo.pop_all()  # all went well
    return report


def lpbq_spec(
    block_size: int, bitwidth: int, scale_bits: int, on_indivisible: OnIndivisible
) -> QSpec:
    """Return the spec that :func:`set_lpbq` gives layers."""
    return QSpec(
        bitwidth=bitwidth,
        granularity=LPBQ(block_size=block_size, scale_bits=scale_bits),
        on_indivisible=on_indivisible,
    )


@accepts_aimet_arguments(order=("sim", "block_size"))
def set_blockwise(
    sim: Any,
    block_size: int = 64,
    *,
    bitwidth: int = 4,
    symmetric: bool = True,
    layers: Layers = "*",
    modules_to_exclude: str | nn.Module | Iterable[str | nn.Module] = (),
    overrides: Mapping[str, QSpec | None] | None = None,
    on_indivisible: OnIndivisible = "error",
) -> GridReport:
    """Quantize weights of a simulation in blocks, each with a float range of its own.

    Source: ``set_blockwise_quantization_for_weights`` of AIMET 2.42.

    Which layers, what is checked and what happens to ranges is as in :func:`set_lpbq`. Does what
    ``set_blockwise_quantization_for_weights(sim, arg, bitwidth, symmetric, block_size)`` of AIMET
    does, and sets the ranges.

    :param sim: As for :func:`set_lpbq`, as are the layers, exceptions and what does not divide.
    :param block_size: Input channels of a block.
    :param bitwidth: Bits of a quantized weight.
    :param symmetric: Signed and symmetric grids if true, else unsigned ones with an offset.
    :param layers: Layers to change.
    :param modules_to_exclude: Names, patterns or modules to leave as they are.
    :param overrides: Other specs by pattern; None leaves the weight float.
    :param on_indivisible: ``"error"``, ``"per_channel"`` or ``"pad"``.
    :returns: what was done.
    :raises TypeError: see :func:`set_lpbq`.
    :raises ValueError: see :func:`set_lpbq`.

    >>> set_blockwise(sim, 32, bitwidth=3, symmetric=False, layers=[torch.nn.Linear])
    """
    spec = QSpec(
        bitwidth=bitwidth,
        symmetric=symmetric,
        granularity=Blockwise(block_size=block_size),
        on_indivisible=on_indivisible,
    )
    with ExitStack() as undo:
        report = set_grids(sim, spec, layers, modules_to_exclude, overrides, undo)
        undo.pop_all()  # all went well
    return report


def set_grids(
    sim: Any,
    spec: QSpec,
    layers: Layers,
    modules_to_exclude: Any,
    overrides: Mapping[str, QSpec | None] | None,
    undo: ExitStack,
) -> GridReport:
    """Give layers their grids; all is checked before anything changes.

    :param undo: Stack that gets the calls which put the simulation back as it was.
    """
    adaptor = adapt(sim)
    table = _table(adaptor)
    specs = select_specs(
        table,
        spec,
        layers=layers,
        modules_to_exclude=modules_to_exclude,
        overrides=dict(overrides or {}),
    )
    _check_free(table, specs)
    plan = fit_blocks(table.layers, specs)
    padded = table.apply(plan, undo)
    if adaptor.settings is not None:
        undo.callback(setattr, adaptor, "settings", adaptor.settings)
        adaptor.settings = _updated(table, specs, plan, padded)
    return GridReport(
        specs=plan.specs,
        per_channel_instead=plan.per_channel_instead,
        padded=padded,
        untouched=tuple(name for name in table.quantized if name not in specs),
    )


def _table(adaptor: SimAdaptor) -> LayerTable:
    """Return the layers of a simulation of either kind."""
    if adaptor.framework == "onnx":
        from aimet_ext.grids.onnx_layers import OnnxTable

        return OnnxTable(adaptor)
    from aimet_ext.grids.torch_layers import TorchTable

    return TorchTable(adaptor)


def _check_free(table: LayerTable, specs: Mapping[str, QSpec | None]) -> None:
    """Refuse layers that an earlier technique decided, and weights without a range."""
    frozen = [name for name in specs if table.is_frozen(name)]
    if frozen:
        raise ValueError(
            f"{some(frozen)}: a weight quantizer that may change is required, but an earlier "
            "technique froze its range; set grids first, or list it in modules_to_exclude"
        )
    for run in table.adaptor.ledger.runs if table.adaptor.ledger is not None else ():
        rounded = [name for name in specs if run.rounds and name in run.modules]
        if rounded:
            raise ValueError(
                f"{some(rounded)}: a float weight is required, but {run.technique} already rounded "
                "it to its grid; set grids first, or list it in modules_to_exclude"
            )
    broken = [name for name in specs if not bool(table.layers[name].weight.isfinite().all())]
    if broken:
        raise ValueError(f"{some(broken)}: a finite weight is required, it holds NaN or infinity")


def _updated(
    table: LayerTable,
    specs: Mapping[str, QSpec | None],
    plan: WeightPlan,
    padded: Mapping[str, int],
) -> dict[str, Any]:
    """Return the settings with which ``create_sim`` builds the simulation as it is now."""
    settings = table.adaptor.settings or {}
    new = {name: None if spec is None else spec.to_dict() for name, spec in specs.items()}
    old = {name: spec for name, spec in settings["overrides"].items() if name not in new}
    instead = {name for name in settings["per_channel_instead"] if name not in new}
    return {
        **settings,
        "overrides": {**new, **old},  # the first one that fits counts
        "per_channel_instead": [
            name for name in table.layers if name in instead or name in plan.per_channel_instead
        ],
        "padded_mlp_widths": {**settings["padded_mlp_widths"], **padded},
    }
