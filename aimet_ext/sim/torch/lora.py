"""Room for LoRA adapters in an ``aimet_torch.QuantizationSimModel``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch._base.nn.modules.custom import Add
from aimet_torch.quantization.affine import QuantizeDequantize
from torch import Tensor, nn

from aimet_ext.config import PerTensor, QSpec
from aimet_ext.data.batches import module_device
from aimet_ext.sim.torch.quantizers import uninitialize
from aimet_ext.sim.torch.setup import build_sim, calibrated_weight_quantizer

__all__ = [
    "QUANTIZERS",
    "Content",
    "LoraSlot",
    "build_lora_sim",
    "calibrating",
    "described_entry",
    "empty_content",
    "float_content",
    "freeze",
    "probe_content",
    "put_content",
    "quantized_content",
    "slots",
]

#: Quantizers of a slot that belong to its adapter: container and key within the slot.
QUANTIZERS: dict[str, tuple[str, str]] = {
    "A": ("lora_A.param_quantizers", "weight"),
    "A_output": ("lora_A.output_quantizers", "0"),
    "B": ("lora_B.param_quantizers", "weight"),
    "B_output": ("lora_B.output_quantizers", "0"),
    "sum": ("add.output_quantizers", "0"),
}


class LoraSlot(nn.Module):
    """A layer with the low-rank change of one adapter: ``base_layer(x) + lora_B(lora_A(x))``.

    The submodules are called as PEFT calls them; the adapter's scaling is part of ``lora_B``.

    :param base_layer: linear layer, or table of embeddings.
    :param bias: whether an adapter may bring a bias of its own.
    """

    def __init__(self, base_layer: nn.Linear | nn.Embedding, *, bias: bool = False) -> None:
        super().__init__()
        place: dict[str, Any] = {
            "device": base_layer.weight.device,
            "dtype": base_layer.weight.dtype,
        }
        self.base_layer = base_layer
        if isinstance(base_layer, nn.Embedding):
            width = base_layer.embedding_dim
            self.lora_A: nn.Module = nn.Embedding(base_layer.num_embeddings, 1, **place)
        else:
            width = base_layer.out_features
            self.lora_A = nn.Linear(base_layer.in_features, 1, bias=False, **place)
        self.lora_B = nn.Linear(1, width, bias=bias, **place)
        self.add = Add()
        for parameter in (*self.lora_A.parameters(), *self.lora_B.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the layer with the adapter, ``[…, out]``."""
        change = self.lora_B(self.lora_A(x))  # [..., rank] -> [..., out]
        return self.add(self.base_layer(x), change)


@dataclass(eq=False)
class Content:
    """What one adapter puts into one slot: the very objects, which go in and come out.

    :param a: ``[rank, in]``, of a table ``[rows, rank]``.
    :param b: ``[out, rank]``, with the adapter's scaling.
    :param bias: ``[out]``, with the scaling, or None where the slot has none.
    :param quantizers: by the keys of :data:`QUANTIZERS`, None for what stays float.
    """

    a: nn.Parameter
    b: nn.Parameter
    bias: nn.Parameter | None
    quantizers: dict[str, Any]

    def without_quantizers(self) -> Content:
        """The same weights, float."""
        return Content(self.a, self.b, self.bias, dict.fromkeys(QUANTIZERS))


def build_lora_sim(
    base: QuantizationSimModel,
    layers: Mapping[str, bool],
    dummy_input: Any,
    config: str | Mapping[str, Any],
) -> QuantizationSimModel:
    """A simulation of a base's float model with a slot at each of these layers.

    The quantizers are those that AIMET gives such a model; the base's own are still to be put in
    their place. The base is left as it is.

    :param layers: names in the base's model, each with whether its slot takes a bias.
    """
    model = QuantizationSimModel.get_original_model(base.model)
    for name, bias in layers.items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, LoraSlot(model.get_submodule(name), bias=bias))
    activations = QSpec(bitwidth=16, symmetric=False)
    return build_sim(model.eval(), dummy_input, {}, activations, config, in_place=True)


def slots(sim: QuantizationSimModel) -> dict[str, LoraSlot]:
    """The slots of a simulation, by name in its model."""
    every = sim.model.named_modules()
    return {name: module for name, module in every if isinstance(module, LoraSlot)}


def put_content(slot: Any, content: Content) -> None:
    """Make an adapter's weights and quantizers those of a slot; nothing else of it changes."""
    device = module_device(slot.base_layer)
    rank = content.b.shape[1]
    for parameter in (content.a, content.b, content.bias):
        if parameter is not None:
            parameter.data = parameter.data.to(device)
    slot.lora_A.weight, slot.lora_B.weight = content.a, content.b
    if slot.lora_B.bias is not None:
        slot.lora_B.bias = content.bias
    slot.lora_B.in_features = rank
    if isinstance(slot.lora_A, nn.Embedding):
        slot.lora_A.embedding_dim = rank
    else:
        slot.lora_A.out_features = rank
    for key, (container, index) in QUANTIZERS.items():
        quantizer = content.quantizers.get(key)
        if quantizer is not None:
            quantizer.to(device)
        holder = slot.get_submodule(container)
        holder[int(index) if index.isdigit() else index] = quantizer


def float_content(slot: Any, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Content:
    """An adapter's weights for a slot, in the base layer's dtype, without quantizers.

    :param a: see :class:`Content`.
    :param b: see :class:`Content`.
    :param bias: see :class:`Content`; zeros where the slot takes one and none is given.
    """
    weight = slot.base_layer.weight
    if slot.lora_B.bias is None:
        bias = None
    elif bias is None:
        bias = torch.zeros(b.shape[0])
    made = [
        None if t is None else nn.Parameter(t.detach().to(weight.device, weight.dtype, copy=True))
        for t in (a, b, bias)
    ]
    assert made[0] is not None and made[1] is not None
    return Content(made[0], made[1], made[2], dict.fromkeys(QUANTIZERS))


def empty_content(slot: Any) -> Content:
    """No adapter: the slot's output is that of its base layer, bit by bit.

    Its sum lies on the grid of the base layer's output, which a sum with zeros does not leave.
    """
    weight = slot.base_layer.weight
    table = isinstance(slot.lora_A, nn.Embedding)
    rows = slot.base_layer.weight.shape[0]
    a = weight.new_zeros((rows, 1) if table else (1, weight.shape[1]))
    b = weight.new_zeros((weight.shape[1] if table else rows, 1))
    content = float_content(slot, a, b)
    content.quantizers["sum"] = copy.deepcopy(slot.base_layer.output_quantizers[0])
    return content


def quantized_content(
    slot: Any, content: Content, weights: QSpec | None, activations: QSpec | None, *, new_sum: bool
) -> Content:
    """The same weights with new quantizers: those of weights have ranges, the others have none.

    The sum has the width of the base layer's output, and no quantizer where that has none.

    :param weights: None leaves them float.
    :param activations: of the outputs of ``lora_A`` and ``lora_B``; None leaves them float.
    :param new_sum: give the sum a range of its own; else the one of the base layer's output.
    """
    output = slot.base_layer.output_quantizers[0]
    quantizers: dict[str, Any] = dict.fromkeys(QUANTIZERS)
    quantizers["sum"] = copy.deepcopy(output)
    if output is not None and new_sum:
        uninitialize(quantizers["sum"])
        quantizers["sum"].allow_overwrite(True)
    if activations is not None:
        for key in ("A_output", "B_output"):
            quantizers[key] = _activation_quantizer(activations, output)
    filled = Content(content.a, content.b, content.bias, quantizers)
    put_content(slot, filled)
    if weights is not None:
        table = isinstance(slot.lora_A, nn.Embedding)
        spec = QSpec(
            bitwidth=weights.bitwidth,
            symmetric=weights.symmetric,
            granularity=PerTensor() if table else weights.granularity,
        )
        quantizers["A"] = calibrated_weight_quantizer(spec, slot.lora_A)
        quantizers["B"] = calibrated_weight_quantizer(weights, slot.lora_B)
        put_content(slot, filled)
    return filled


@contextmanager
def calibrating(found: Iterable[Any]) -> Iterator[None]:
    """Context in which the adapters' own quantizers observe what slots compute.

    At its end those that may change have a range. All others quantize as ever; of a base whose
    ranges are frozen, AIMET's own ``sim.compute_encodings`` warns that it cannot adjust them.

    :param found: the slots.
    """
    with contextlib.ExitStack() as stack:
        for slot in found:
            for part in (slot.lora_A, slot.lora_B, slot.add):
                stack.enter_context(part.compute_encodings())
        yield


def freeze(quantizers: Iterable[Any]) -> None:
    """Have neither ``compute_encodings`` nor training change these ranges."""
    for quantizer in quantizers:
        quantizer.allow_overwrite(False)
        quantizer.requires_grad_(False)


def _activation_quantizer(spec: QSpec, template: Any) -> Any:
    """A quantizer of this spec that observes as the base's own do."""
    if template is None:
        return QuantizeDequantize((), spec.bitwidth, spec.symmetric)
    quantizer = copy.deepcopy(template)
    quantizer.symmetric = spec.symmetric
    quantizer.signed = spec.symmetric
    quantizer.bitwidth = spec.bitwidth
    uninitialize(quantizer)
    quantizer.allow_overwrite(True)
    return quantizer


def probe_content(slot: Any, rank: int, number: int) -> Content:
    """Weights and quantizers by which a slot's tensors are told apart in an exported graph.

    All values are random, and every quantizer of an activation has a scale of its own.

    :param number: of the slot, counted from 0.
    """
    rows, columns = slot.base_layer.weight.shape
    table = isinstance(slot.lora_A, nn.Embedding)
    generator = torch.Generator().manual_seed(number)
    a = torch.randn((rows, rank) if table else (rank, columns), generator=generator)
    b = torch.randn((columns if table else rows, rank), generator=generator)
    bias = torch.randn(b.shape[0], generator=generator)
    content = float_content(slot, a, b, bias)
    found = quantized_content(slot, content, QSpec(bitwidth=8), None, new_sum=False)
    for place, key in enumerate(("A_output", "B_output", "sum")):
        if key == "sum" and found.quantizers[key] is None:
            continue
        half = torch.tensor(1.0 + len(QUANTIZERS) * number + place)
        found.quantizers[key] = QuantizeDequantize((), 16, False)
        found.quantizers[key].set_range(-half, half)
    return found


def described_entry(name: str, quantizer: Any, axis: int, padded: int = 0) -> dict[str, Any]:
    """A quantizer as an entry of an encodings file 2.0.0.

    :param axis: of the channels, in the tensor as it lies in the graph.
    :param padded: channels of zeros that the tensor has there in addition; they take the largest
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
