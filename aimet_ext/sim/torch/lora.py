"""Room for LoRA adapters in an ``aimet_torch.QuantizationSimModel``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch._base.nn.modules.custom import Add
from aimet_torch.quantization.affine import QuantizeDequantize
from torch import Tensor, nn

from aimet_ext.data.batches import module_device
from aimet_ext.sim.torch.setup import build_sim
from aimet_ext.sim.torch.state import (
    calibrated_weight_quantizer,
    freeze,
    load_quantizers,
    make_quantizer,
    named_quantizers,
    pack_quantizers,
    put_quantizer,
    quantizers_to_tensors,
    restore_quantizer,
    uninitialize,
)
from aimet_ext.specs import PerTensor, QSpec

# Quantizers of a slot that belong to its adapter, by their names within the slot.
_QUANTIZERS = {
    "A": "lora_A.param_quantizers.weight",
    "A_output": "lora_A.output_quantizers.0",
    "B": "lora_B.param_quantizers.weight",
    "B_output": "lora_B.output_quantizers.0",
    "sum": "add.output_quantizers.0",
}


@dataclass(eq=False)
class Content:
    """An adapter's share in one slot: the very objects, which go in and come out.

    :param a: Weight ``[rank, in]``, of a table ``[rows, rank]``.
    :param b: Weight ``[out, rank]``, with the adapter's scaling.
    :param bias: Bias ``[out]``, with the scaling, or None where the slot has none.
    :param quantizers: Quantizers by ``"A"``, ``"A_output"``, ``"B"``, ``"B_output"`` and
        ``"sum"``, None for a tensor that stays float.
    """

    a: nn.Parameter
    b: nn.Parameter
    bias: nn.Parameter | None
    quantizers: dict[str, Any]

    def without_quantizers(self) -> Content:
        """Return the same weights, float."""
        return Content(self.a, self.b, self.bias, dict.fromkeys(_QUANTIZERS))

    def rounded(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``"a"``, ``"b"`` or ``"bias"``, quantized where it has a quantizer.

        :param dtype: Type to quantize in, None: the one of the weight.
        """
        quantizer = self.quantizers.get(key.upper())
        value: Tensor = getattr(self, key).to(dtype)
        return value if quantizer is None else quantizer(value).as_subclass(Tensor)

    def freeze(self) -> None:
        """Keep calibration and training from changing the ranges."""
        freeze(quantizer for quantizer in self.quantizers.values() if quantizer is not None)

    def scale(self, key: str) -> float:
        """Return the scale of a quantizer of an activation."""
        return float(self.quantizers[key].get_scale())

    def unset(self) -> list[str]:
        """Return the keys of the quantizers without a range."""
        every = self.quantizers.items()
        return [key for key, q in every if q is not None and not q.is_initialized()]

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return weights and quantizers as tensors, and the quantizers as JSON values."""
        every = ((key, q) for key, q in self.quantizers.items() if q is not None)
        tensors, described = pack_quantizers(every, "/")
        weights = {key: getattr(self, key) for key in ("a", "b", "bias")}
        return {**{k: v for k, v in weights.items() if v is not None}, **tensors}, described

    @classmethod
    def unpack(
        cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any], empty: Content
    ) -> Content:
        """Return what :meth:`pack` was called on, with frozen ranges.

        :param empty: Content whose weights are taken where ``tensors`` holds none.
        """
        quantizers: dict[str, Any] = dict.fromkeys(_QUANTIZERS)
        for key, description in described.items():
            quantizers[key] = make_quantizer(description)
            restore_quantizer(quantizers[key], tensors, description["state"], f"{key}/")
            if quantizers[key].is_initialized():
                freeze([quantizers[key]])
        content = cls(empty.a, empty.b, empty.bias, quantizers)
        if "a" in tensors:
            stored = tensors.get("bias")
            content.a, content.b = nn.Parameter(tensors["a"]), nn.Parameter(tensors["b"])
            content.bias = None if stored is None else nn.Parameter(stored)
        return content


class LoraSlot(nn.Module):
    """A layer with the low-rank change of one adapter: ``base_layer(x) + lora_B(lora_A(x))``.

    The submodules are called as PEFT calls them; the adapter's scaling is part of ``lora_B``.

    :param base_layer: Linear layer, or table of embeddings.
    :param bias: True if an adapter may bring a bias of its own.
    """

    def __init__(self, base_layer: nn.Linear | nn.Embedding, *, bias: bool = False) -> None:
        super().__init__()
        place: dict[str, Any] = {
            "device": base_layer.weight.device,
            "dtype": base_layer.weight.dtype,
        }
        self.base_layer: Any = base_layer
        self.lora_A: Any
        if isinstance(base_layer, nn.Embedding):
            width = base_layer.embedding_dim
            self.lora_A = nn.Embedding(base_layer.num_embeddings, 1, **place)
        else:
            width = base_layer.out_features
            self.lora_A = nn.Linear(base_layer.in_features, 1, bias=False, **place)
        self.lora_B: Any = nn.Linear(1, width, bias=bias, **place)
        self.add: Any = Add()
        for parameter in (*self.lora_A.parameters(), *self.lora_B.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer with the adapter, ``[…, out]``."""
        change = self.lora_B(self.lora_A(x))  # [..., rank] -> [..., out]
        return self.add(self.base_layer(x), change)

    @property
    def table(self) -> bool:
        """True for a table of embeddings."""
        return isinstance(self.base_layer, nn.Embedding)

    @property
    def takes_bias(self) -> bool:
        """True if an adapter may bring a bias."""
        return self.lora_B.bias is not None

    @property
    def output_spec(self) -> QSpec | None:
        """Width and symmetry of the base layer's output, None where that is float."""
        output = self.base_layer.output_quantizers[0]
        if output is None:
            return None
        return QSpec(bitwidth=output.bitwidth, symmetric=output.symmetric)

    def put(self, content: Content) -> None:
        """Make an adapter's weights and quantizers those of the slot; nothing else changes."""
        device = module_device(self.base_layer)
        rank = content.b.shape[1]
        for parameter in (content.a, content.b, content.bias):
            if parameter is not None:
                parameter.data = parameter.data.to(device)
        self.lora_A.weight, self.lora_B.weight = content.a, content.b
        if self.takes_bias:
            self.lora_B.bias = content.bias
        self.lora_B.in_features = rank
        setattr(self.lora_A, "embedding_dim" if self.table else "out_features", rank)
        for key, place in _QUANTIZERS.items():
            quantizer = content.quantizers.get(key)
            put_quantizer(self, place, None if quantizer is None else quantizer.to(device))

    def float_content(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Content:
        """Return an adapter's weights in the base layer's dtype, without quantizers.

        :param a: Weight, see :class:`Content`.
        :param b: Weight, see :class:`Content`.
        :param bias: Bias; zeros where the slot takes one and none is given.
        """
        weight = self.base_layer.weight

        def own(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value.detach().to(weight.device, weight.dtype, copy=True))

        bias = torch.zeros(b.shape[0]) if bias is None else bias
        kept = own(bias) if self.takes_bias else None
        return Content(own(a), own(b), kept, dict.fromkeys(_QUANTIZERS))

    def empty_content(self) -> Content:
        """Return no adapter: the slot's output is that of its base layer, bit by bit.

        Its sum lies on the grid of the base layer's output, which a sum with zeros does not leave.
        """
        content = self.float_content(*self._shaped(torch.zeros, 1))
        content.quantizers["sum"] = copy.deepcopy(self.base_layer.output_quantizers[0])
        return content

    def quantized_content(
        self,
        content: Content,
        weights: QSpec | None,
        activations: QSpec | None,
        *,
        new_sum: bool,
    ) -> Content:
        """Return the same weights with new quantizers: those of weights have ranges, others none.

        The sum has the width of the base layer's output, and no quantizer where that has none.

        :param weights: Spec of both weights; None leaves them float.
        :param activations: Spec of the outputs of ``lora_A`` and ``lora_B``; None leaves them
            float.
        :param new_sum: True gives the sum a range of its own, else it has the one of the base
            layer's output.
        """
        output = self.base_layer.output_quantizers[0]
        filled = content.without_quantizers()
        quantizers = filled.quantizers
        quantizers["sum"] = copy.deepcopy(output)
        if output is not None and new_sum:
            uninitialize(quantizers["sum"])
            quantizers["sum"].allow_overwrite(True)
        if activations is not None:
            for key in ("A_output", "B_output"):
                quantizers[key] = _activation_quantizer(activations, output)
        self.put(filled)
        if weights is not None:
            granularity = PerTensor() if self.table else weights.granularity
            spec = replace(weights, granularity=granularity)
            quantizers["A"] = calibrated_weight_quantizer(spec, self.lora_A)
            quantizers["B"] = calibrated_weight_quantizer(weights, self.lora_B)
            self.put(filled)
        return filled

    def probe_content(self, rank: int, number: int) -> Content:
        """Return weights and quantizers that tell the slot's tensors apart in an exported graph.

        All values are random, and every quantizer of an activation has a scale of its own.

        :param number: Number of the slot, counted from 0.
        """
        generator = torch.Generator().manual_seed(number)
        a, b = self._shaped(torch.randn, rank, generator=generator)
        bias = torch.randn(b.shape[0], generator=generator)
        content = self.float_content(a, b, bias)
        found = self.quantized_content(content, QSpec(bitwidth=8), None, new_sum=False)
        for place, key in enumerate(("A_output", "B_output", "sum")):
            if key == "sum" and found.quantizers[key] is None:
                continue
            half = torch.tensor(1.0 + len(_QUANTIZERS) * number + place)
            found.quantizers[key] = QuantizeDequantize((), 16, False)
            found.quantizers[key].set_range(-half, half)
        return found

    def _shaped(self, make: Any, rank: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Return values for both weights at a rank."""
        rows, columns = self.base_layer.weight.shape
        a = make((rows, rank) if self.table else (rank, columns), **options)
        return a, make((columns if self.table else rows, rank), **options)


def build_lora_sim(
    base: QuantizationSimModel,
    layers: Mapping[str, bool],
    dummy_input: Any,
    config: str | Mapping[str, Any],
) -> QuantizationSimModel:
    """Return a simulation of a base with an empty slot at each of these layers.

    The quantizers of the base are in their places and frozen, as all parameters are; those of
    slots are absent. The base is left as it is.

    :param layers: True by name of layer in the base's model if its slot takes a bias.
    """
    model = QuantizationSimModel.get_original_model(base.model)
    for name, bias in layers.items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, LoraSlot(model.get_submodule(name), bias=bias))
    activations = QSpec(bitwidth=16, symmetric=False)
    sim = build_sim(model.eval(), dummy_input, {}, activations, config, in_place=True, ranges=False)
    for slot in slots(sim).values():
        for place in _QUANTIZERS.values():
            put_quantizer(slot, place, None)
        for part in (slot.lora_A, slot.lora_B, slot.add):
            for index in range(len(part.input_quantizers)):
                part.input_quantizers[index] = None
    tensors, described = quantizers_to_tensors(base)
    load_quantizers(
        sim,
        {renamed(key, layers): value for key, value in tensors.items()},
        {
            renamed(name, layers): (
                {"same_as": renamed(entry["same_as"], layers)} if "same_as" in entry else entry
            )
            for name, entry in described.items()
        },
    )
    for slot in slots(sim).values():  # both branches read one tensor
        if len(slot.base_layer.input_quantizers) and not slot.table:
            slot.lora_A.input_quantizers[0] = slot.base_layer.input_quantizers[0]
    freeze(quantizer for _, quantizer in named_quantizers(sim.model))
    return sim


def slots(sim: QuantizationSimModel) -> dict[str, LoraSlot]:
    """Return the slots of a simulation, by name in its model."""
    every = sim.model.named_modules()
    return {name: module for name, module in every if isinstance(module, LoraSlot)}


def renamed(name: str, places: Iterable[str]) -> str:
    """Return the name in a model with slots of something that the base's model has."""
    place = next((p for p in places if name == p or name.startswith(f"{p}.")), None)
    return name if place is None else f"{place}.base_layer{name[len(place) :]}"


def base_name(name: str) -> str:
    """Undo :func:`renamed`."""
    return name.replace(".base_layer.", ".")


def base_state(
    sim: QuantizationSimModel, floats: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return weights, ranges and grids of the base under the names that it has without slots.

    :param floats: Float state of the simulation.
    """
    parts = ("lora_A", "lora_B", "add")
    own = tuple(f"{slot}.{part}." for slot in slots(sim) for part in parts)
    tensors, described = quantizers_to_tensors(sim)

    def of_base(named: Mapping[str, Any]) -> dict[str, Any]:
        return {base_name(n): value for n, value in named.items() if not n.startswith(own)}

    return of_base(floats), of_base(tensors), of_base(described)


@contextmanager
def calibrating(found: Iterable[LoraSlot]) -> Iterator[None]:
    """Calibrate the adapters' own quantizers on what slots compute, in a context.

    At its end those that may change have a range. All others quantize as ever; of a base whose
    ranges are frozen, AIMET's own ``sim.compute_encodings`` warns that it cannot adjust them.
    """
    with contextlib.ExitStack() as stack:
        for slot in found:
            for part in (slot.lora_A, slot.lora_B, slot.add):
                stack.enter_context(part.compute_encodings())
        yield


@torch.no_grad()
def share_ranges(contents: Iterable[Content]) -> None:
    """Give the quantizers of several adapters in one slot the range that holds all of theirs."""
    every = [content.quantizers for content in contents]
    for key in every[0]:
        quantizers = [quantizers[key] for quantizers in every]
        if quantizers[0] is None:
            continue
        low = torch.stack([quantizer.get_min() for quantizer in quantizers]).amin(0)
        high = torch.stack([quantizer.get_max() for quantizer in quantizers]).amax(0)
        for quantizer in quantizers:
            quantizer.set_range(low, high)


def _activation_quantizer(spec: QSpec, template: Any) -> Any:
    """Return a quantizer of this spec that observes as the base's own do."""
    if template is None:
        return QuantizeDequantize((), spec.bitwidth, spec.symmetric)
    quantizer = copy.deepcopy(template)
    quantizer.symmetric = spec.symmetric
    quantizer.signed = spec.symmetric
    quantizer.bitwidth = spec.bitwidth
    uninitialize(quantizer)
    quantizer.allow_overwrite(True)
    return quantizer


def described_entry(name: str, quantizer: Any, axis: int, padded: int = 0) -> dict[str, Any]:
    """Return a quantizer as an entry of an encodings file 2.0.0.

    :param axis: Axis of the channels, in the tensor as it lies in the graph.
    :param padded: Channels of zeros that the tensor has there in addition; they take the largest
        scale.
    """
    scale = quantizer.get_scale(dtype=torch.float32).detach().flatten().cpu()
    offset = quantizer.get_offset(dtype=torch.float32).detach().expand(quantizer.shape)
    zero_point = -(offset.flatten().cpu() + quantizer.zero_point_shift)
    if padded and quantizer.shape:
        scale = torch.cat([scale, scale.max().expand(padded)])
        zero_point = torch.cat([zero_point, zero_point[:1].expand(padded)])
    bits = int(quantizer.qmax - quantizer.qmin).bit_length()
    entry: dict[str, Any] = {
        "name": name,
        "output_dtype": f"{'int' if quantizer.qmin < 0 else 'uint'}{bits}",
        "y_scale": scale.tolist() if quantizer.shape else float(scale),
    }
    if zero_point.any():
        values = zero_point.long() if not quantizer.zero_point_shift else zero_point
        entry["y_zero_point"] = values.tolist() if quantizer.shape else values.item()
    if quantizer.shape:
        entry["axis"] = axis
    return entry
