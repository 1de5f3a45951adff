"""Adapters of the original model, made to fit the model that scales were folded into.

A transform is ``W' = OUT W IN``, with diagonal matrices for scales and block-diagonal ones for
rotations. A change ``ΔW = BA`` of the weight becomes ``(OUT B) (A IN)``, so that ``W' + ΔW' = OUT
(W + ΔW) IN``: the adapted weight is transformed as the base is, and what the transform leaves
unchanged on the base, it leaves unchanged with any adapter.

DoRA multiplies the rows of ``W + ΔW`` by ``m / ‖W + ΔW‖``. The transformed rows have other norms,
``n' = |OUT| ‖(W + ΔW) IN‖``, so ``m' = m n' / n`` keeps every factor as it was, where ``OUT`` is
diagonal; rows that a rotation mixed have no such factors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimet_ext.core.factors import Product
from aimet_ext.files.folders import check_output, replace_folder
from aimet_ext.files.manifest import versions, write_manifest
from aimet_ext.files.scales import SCALES_FILE, ModuleScales, Scales, load_scales
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.lora.adapter import SIDES, Adapter, Part, read_adapter, read_adapters
from aimet_ext.lora.checkpoint import Checkpoint, Target, open_checkpoint, open_target
from aimet_ext.lora.unfit import check_fit, check_variant, named_like, refuse, without_gain

_NONE = ModuleScales()


def fold_adapter(
    adapter: Any,
    scales: Scales | str | Path,
    output: str | Path | None = None,
    *,
    name: str | None = None,
    base: Any = None,
) -> Adapter:
    r"""Return the adapter that does to the transformed model what it did to the original one.

    With ``W' = OUT W IN``, the product of all scales and rotations, a module's change ``ΔW = s B
    A`` becomes

    .. math::
        A' = A \, \mathrm{IN}, \qquad B' = \mathrm{OUT} \, B

    so that ``W' + ΔW' = OUT (W + ΔW) IN``: base and adapter together are transformed as the base
    alone was, and compute the same function. Ranks, alphas and everything else in the adapter's
    config stay as they are. Biases, and copies of whole modules (``modules_to_save``), are
    transformed as the base's own. DoRA's magnitudes follow the norms of the rows, for which the
    original weights are needed (``base``). Where MLPs of the base were padded, so is the adapter.

    Of a rotated model, DoRA on layers whose rows were rotated, and copies of norms whose gains were
    folded, do not fit and are refused.

    The adapter may have been trained on the original model before or after the transform was
    chosen; it is folded after training.

    :param adapter: Folder that PEFT wrote, ``PeftModel`` or :class:`Adapter`. Not changed.
    :param scales: Result of :func:`aimet_ext.load_scales`, or the file or folder itself. Best is
        the folder of an export: it says what modules there are, and which were padded.
    :param output: Folder for the adapter, for PEFT to read; one of this package is replaced.
    :param name: Name of the adapter, where there are several.
    :param base: Original model or its folder; by default what the ``PeftModel`` is around, or
        the folder that the adapter's config names, if it is there. Its hash must be the one in the
        scales.
    :returns: the adapter, with ``folded`` set.
    :raises FileNotFoundError: no adapter, or no scales.
    :raises CorruptFileError: a file is damaged.
    :raises ValueError: the adapter or ``base`` belongs to another model, the adapter was folded
        before, or modules cannot be folded; all of these are named, with the reason.
    :raises FileExistsError: ``output`` holds files of another program.

    >>> folded = fold_adapter("adapter", "llama-w4", "adapter-w4")
    """
    chosen = read_adapter(adapter, name)
    return _fold(adapter, {chosen.name: chosen}, scales, output, base)[chosen.name]


def fold_adapters(
    adapter: Any,
    scales: Scales | str | Path,
    output: str | Path | None = None,
    *,
    base: Any = None,
) -> dict[str, Adapter]:
    """Fold all adapters of a folder or a model, see :func:`fold_adapter`; by name.

    In ``output``, the adapter ``"default"`` lies at the top and others in folders of their names,
    as PEFT writes them.

    :param adapter: Folder that PEFT wrote, or ``PeftModel``. Not changed.
    :param scales: As for :func:`fold_adapter`.
    :param output: Folder for the adapters; one of this package is replaced.
    :param base: Original model or its folder, as for :func:`fold_adapter`.
    :raises ValueError: as :func:`fold_adapter`, whose other errors it raises, too.
    """
    return _fold(adapter, read_adapters(adapter), scales, output, base)


def scales_digest(scales: Scales) -> str:
    """Return the SHA-256 of scales: names, widths and values."""
    tensors, products = scales.to_tensors()
    named = sorted(tensors.items(), key=lambda item: item[0])
    if products:
        named.insert(0, (json.dumps(products, sort_keys=True), torch.empty(0)))
    return hash_tensors(named)


def _fold(
    source: Any,
    adapters: Mapping[str, Adapter],
    scales: Scales | str | Path,
    output: str | Path | None,
    base: Any,
) -> dict[str, Adapter]:
    if output is not None:
        check_output(output)
    target = open_target(None if isinstance(scales, Scales) else Path(scales))
    table = scales if isinstance(scales, Scales) else _load(Path(scales))
    digest = scales_digest(table)
    folded = {}
    for name, adapter in adapters.items():
        check_variant(adapter)
        original = _original(source, adapter, base)
        if original is not None and table.origin is not None:
            _check_origin(original, table.origin, target)
        folded[name] = _Folding(adapter, table, target, original).run(digest)
    if output is not None:
        _write(Path(output), folded, table)
    return folded


def _load(path: Path) -> Scales:
    try:
        return load_scales(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: a file of scales, or the folder of an export or a technique with a "
            f"{SCALES_FILE}, is required"
        ) from error


def _original(source: Any, adapter: Adapter, base: Any) -> Checkpoint | None:
    """Return the weights of the original model, if there is a way to know them."""
    if base is not None:
        return open_checkpoint(base)
    if hasattr(source, "get_base_model"):
        # Biases that were trained are the base's own until the adapter is saved.
        trained = adapter.config.get("bias", "none") != "none"
        return None if trained else open_checkpoint(source)
    named = adapter.config.get("base_model_name_or_path")
    if named and (Path(named) / "config.json").is_file():
        return open_checkpoint(named)
    return None


def _check_origin(original: Checkpoint, origin: str, target: Target) -> None:
    if not original.has_hash(origin, target.padding):
        raise ValueError(
            f"base: the model that the scales were made for (hash {origin[:12]}…) is required, but "
            f"the weights of {original.source} are others; fold with scales of that model, or "
            "pass base= the checkpoint that the simulation was made from"
        )


class _Folding:
    """One adapter on its way through the scales."""

    def __init__(
        self, adapter: Adapter, scales: Scales, target: Target, original: Checkpoint | None
    ) -> None:
        known = target.checkpoint or original
        self.adapter = adapter
        self.scales = named_like(scales, adapter.modules if known is None else known.modules())
        self.without_gain = without_gain(scales)
        self.target = target
        self.original = original
        self.problems: dict[str, str] = {}

    def run(self, digest: str) -> Adapter:
        """Return the folded adapter.

        :raises ValueError: modules do not fit; all are named.
        """
        padded = self._padded()
        self.problems.update(check_fit(padded, self.scales, self.target, self.original))
        changed: dict[str, Tensor] = {}
        for part in padded.parts:
            value = padded.tensors[part.key]
            if part.module not in self.problems:
                try:
                    changed[part.key] = self._part(padded, part, value)
                except ValueError as error:
                    self.problems[part.module] = str(error)
        if self.problems:
            refuse(self.adapter, self.problems)
        touched = sorted({part.module for part in padded.parts if part.module in self.scales})
        record = {
            "origin": self.scales.origin,
            "techniques": list(self.scales.techniques),
            "scales": digest,
            "modules": touched,
            "version": versions()["aimet-ext"],
        }
        return replace(padded, tensors=changed, folded=record)

    def _padded(self) -> Adapter:
        """Return the adapter with zeros where MLPs of the base were padded."""
        padding = self.target.padding
        if not padding.widths:
            return self.adapter
        tensors = dict(self.adapter.tensors)
        for part in self.adapter.parts:
            value = tensors[part.key]
            if part.kind in ("A", "weight") and value.dim() > 1:
                value = padding.columns(part.module, value)
            if part.kind in ("B", "B_bias", "bias", "weight", "magnitude"):
                value = padding.rows(part.module, value)
            if part.kind == "magnitude" and value.shape != tensors[part.key].shape:
                self.problems[part.module] = (
                    "DoRA cannot be folded where rows of the base were padded, as they are zero "
                    'and have no norm; use on_indivisible="per_channel" for the base'
                )
            tensors[part.key] = value
        return replace(self.adapter, tensors=tensors)

    def _part(self, adapter: Adapter, part: Part, value: Tensor) -> Tensor:
        """Return one tensor after the transform."""
        scales = self.scales.get(part.module, _NONE)
        if part.module in self.without_gain:
            raise ValueError(
                "the gains of this norm were folded into the layers behind it, so it cannot be "
                "replaced; leave it out of modules_to_save, or fold with scales of a model that "
                "was not rotated"
            )
        if scales.input is None and scales.output is None:
            return value
        if part.kind in SIDES:
            dim, side = SIDES[part.kind]
            fold = scales.fold_input if side == "input" else scales.fold_output
            return fold(value, dim)
        if part.kind == "magnitude":
            return self._magnitude(adapter, part.module, value, scales)
        if value.dim() == 1:
            return self._gain(value, scales)
        return scales.fold_input(scales.fold_output(value))

    def _gain(self, value: Tensor, scales: ModuleScales) -> Tensor:
        """Return a norm's weight; some norms multiply by ``1 + weight``."""
        known = self.target.checkpoint or self.original
        offset = None if known is None else known.gain_offset
        if offset is None:
            raise ValueError(
                "whether this norm multiplies by its weight or by 1 + weight is not known; pass "
                "base= the original model, of a known family"
            )
        return scales.fold_output(value + offset) - offset

    def _magnitude(
        self, adapter: Adapter, module: str, value: Tensor, scales: ModuleScales
    ) -> Tensor:
        layer = adapter.layers[module]
        if layer.embedding:  # its norms are those of the columns
            scales = ModuleScales(input=scales.output, output=scales.input)
        if isinstance(scales.output, Product):
            raise ValueError(  # noqa: TRY004
                "the rows of its weight were rotated, and DoRA's magnitudes of rows do not go "
                "through that; merge the adapter into the model before it is quantized"
            )
        if scales.input is None:
            return _dora_magnitude(value, scales)
        if self.original is None:
            raise ValueError(
                "DoRA divides by norms of the original weights, which are not known; pass base= "
                "the original model or its folder"
            )
        weight = self.original.read(f"{module}.weight")
        if layer.embedding or adapter.config.get("fan_in_fan_out"):
            weight = weight.T  # [out, in]
        weight = self.target.padding.columns(module, weight)
        a, b = layer.a.double(), layer.b.double()
        change = layer.scaling * (b.flatten(1) @ a.flatten(1))
        return _dora_magnitude(value, scales, weight, change.view(weight.shape).to(weight.device))


def _dora_magnitude(
    magnitude: Tensor,
    scales: ModuleScales,
    weight: Tensor | None = None,
    change: Tensor | None = None,
) -> Tensor:
    """Return magnitudes ``m'`` that leave the factor of each row in DoRA as it was.

    :param magnitude: Magnitudes ``m``, ``[out]``, or ``[1, out, 1, …]`` of a convolution.
    :param scales: Scales of the module, whose rows were not rotated.
    :param weight: Weight ``W`` ``[out, in, …]`` of the original base; not needed where
        ``scales.input`` is None, as norms then change by ``|output|`` alone.
    :param change: Change ``ΔW`` of the same shape.
    :raises ValueError: a row of ``W + ΔW`` is zero, and has no direction.
    """
    factor = torch.ones_like(magnitude, dtype=torch.float64).flatten()
    if scales.output is not None:
        assert isinstance(scales.output, Tensor)
        factor = factor * scales.output.double().abs()
    if scales.input is not None:
        assert weight is not None and change is not None
        adapted = weight.double() + change.double()  # [out, in, …]
        before = adapted.flatten(1).norm(dim=1)
        if not bool((before > 0).all()):
            raise ValueError("a row of its weight is zero, which DoRA cannot multiply to a norm")
        factor = factor * scales.fold_input(adapted).flatten(1).norm(dim=1) / before
    return (magnitude.double() * factor.view(magnitude.shape)).to(magnitude.dtype)


def _write(output: Path, adapters: Mapping[str, Adapter], scales: Scales) -> None:
    with replace_folder(output) as folder:
        for name, adapter in adapters.items():
            alone = len(adapters) == 1 or name == "default"
            adapter.save(folder if alone else folder / name)
        write_manifest(
            folder,
            "adapter",
            adapters=sorted(adapters),
            techniques=list(scales.techniques),
            origin=scales.origin,
        )
