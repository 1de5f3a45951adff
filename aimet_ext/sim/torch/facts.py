"""Facts of a PyTorch simulation that a lint judges."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from aimet_ext.sim.facts import FIXED_RANGES, Activation, LintLayer, NormFacts, SimFacts

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)
# Operators of AIMET's graph that move values and compute none, and those that it takes together
# with the layer before them.
_MOVES = {
    *("Split", "clone", "contiguous", "expand", "flatten", "permute", "reshape", "slice"),
    *("squeeze", "transpose", "unsqueeze", "view"),
}
_FUSED = {
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Hardswish", "Hardtanh", "LeakyReLU"),
    *("PReLU", "ReLU", "ReLU6"),
}


def read_facts(adaptor: Any) -> SimFacts:
    """Return the facts of a PyTorch simulation.

    A torch simulation quantizes what modules read and make. What functions between them make has
    no quantizer here and gets one when the model is handed over, so that is no finding.

    :param adaptor: Adaptor of ``aimet_torch.QuantizationSimModel``.
    """
    return _Reader(adaptor).facts()


class _Reader:
    def __init__(self, adaptor: Any) -> None:
        self.adaptor = adaptor
        self.modules: dict[str, Any] = dict(adaptor.model.named_modules())
        self.names = {id(module): name for name, module in self.modules.items()}
        self.activations: dict[int, Activation] = {}
        for name, quantizer in adaptor.activation_quantizers().items():
            if hasattr(quantizer, "qmin"):
                self.activations[id(quantizer)] = _activation(name, quantizer)
        self.operators = self._operators()

    def facts(self) -> SimFacts:
        """Return all facts; the modules are gone over once for each."""
        shared = self.adaptor.shared_weights()
        layers = [
            self._layer(name, module, name in shared)
            for name, module in self.modules.items()
            if isinstance(module, _LAYERS)
        ]
        return SimFacts(
            layers=tuple(layers),
            activations=tuple(self.activations.values()),
            norms=tuple(self._norms()),
            unset=tuple(self._unset_parameters()),
            fixed=tuple(self._fixed()),
            mask=self._mask(),
            conversions=tuple(self._conversions()),
        )

    def _operators(self) -> dict[str, Any]:
        """Return the operators of AIMET's graph by the name of their module."""
        graph = getattr(self.adaptor.sim, "connected_graph", None)
        operators = () if graph is None else graph.ordered_ops
        named = ((self.names.get(id(op.get_module())), op) for op in operators)
        return {name: op for name, op in named if name is not None}

    def _layer(self, name: str, module: Any, shared: bool) -> LintLayer:
        made, fused = self._made(name, module)
        common: dict[str, Any] = {
            "name": name,
            "width": module.weight.shape[1],
            "weight": self._weight(name),
            "tied": shared,
        }
        if isinstance(module, nn.Embedding):
            return LintLayer(kind="embedding", **common)
        return LintLayer(
            **common,
            kind="conv" if isinstance(module, _CONVOLUTIONS) else "linear",
            kernel=tuple(module.weight.shape[2:]),
            bias=module.bias,
            reads=self._own(module, "input_quantizers") or self._read(name),
            makes=made,
            floats=() if made is not None or fused else ("output",),
        )

    def _weight(self, name: str) -> Any:
        """Return the integer quantizer of a layer's weight, None where there is none."""
        found = dict(getattr(self.modules[name], "param_quantizers", {})).get("weight")
        return self.adaptor.weight_quantizer(name) if hasattr(found, "qmin") else None

    def _norms(self) -> Iterator[NormFacts]:
        """Yield the RMS norms: modules by that name with a gain, and no shift or running mean."""
        for name, module in self.modules.items():
            gain = dict(getattr(module, "param_quantizers", {})).get("weight")
            kinds = " ".join(cls.__name__ for cls in type(module).__mro__)
            if gain is None or not hasattr(gain, "qmin") or "RMSNorm" not in kinds:
                continue
            yield NormFacts(
                name=f"{name}.weight",
                bitwidth=_bits(gain),
                signed=int(gain.qmin) < 0,
                reads=self._own(module, "input_quantizers") or self._read(name),
                makes=self._made(name, module)[0],
            )

    def _own(self, module: Any, key: str) -> Activation | None:
        """Return the first of a module's own input or output quantizers."""
        for quantizer in getattr(module, key, None) or ():
            if quantizer is not None:
                return self.activations.get(id(quantizer))
        return None

    def _read(self, name: str) -> Activation | None:
        """Return the output quantizer of the module whose output a layer reads, if it is known."""
        op = self.operators.get(name)
        while op is not None:
            op = op.inputs[0].producer if op.inputs else None
            if op is None or op.type in _MOVES:
                continue
            return self._own(op.get_module(), "output_quantizers")
        return None

    def _made(self, name: str, module: Any) -> tuple[Activation | None, bool]:
        """Return the quantizer of a layer's output; True if AIMET takes it with what comes next."""
        own = self._own(module, "output_quantizers")
        op = self.operators.get(name)
        while own is None and op is not None:
            after = [reader for output in op.outputs for reader in output.consumers]
            if len(after) != 1:
                break
            op = after[0]
            following = op.get_module()
            kinds = {cls.__name__ for cls in type(following).__mro__}
            if following is not None and kinds & _FUSED:
                own = self._own(following, "output_quantizers")
                if own is not None:
                    return own, True
            elif op.type not in _MOVES:
                break
        return own, False

    def _unset_parameters(self) -> Iterator[str]:
        for name, module in self.modules.items():
            for key, quantizer in dict(getattr(module, "param_quantizers", {})).items():
                if quantizer is not None and not quantizer.is_initialized():
                    yield f"{name}.param_quantizers.{key}"

    def _fixed(self) -> Iterator[tuple[str, Activation]]:
        for module in self.modules.values():
            made = self._own(module, "output_quantizers")
            kinds = {cls.__name__ for cls in type(module).__mro__}
            for operator in sorted(kinds & FIXED_RANGES.keys()):
                if made is not None:
                    yield operator, made

    def _conversions(self) -> Iterator[tuple[Activation, Activation]]:
        """Yield pairs of quantizers that quantize one tensor to different bits."""
        for name, module in self.modules.items():
            again = self._own(module, "input_quantizers")
            first = self._read(name) if again is not None else None
            if again is not None and first is not None and first.bitwidth != again.bitwidth:
                yield first, again

    def _mask(self) -> float | None:
        """Return the number that a prepared language model adds to masked scores, else None."""
        if "transformers" not in sys.modules:
            return None
        from aimet_ext.models.encoder_decoder import PreparedEncoderDecoder
        from aimet_ext.models.huggingface import PreparedCausalLM

        for module in self.modules.values():
            if isinstance(module, PreparedCausalLM | PreparedEncoderDecoder):
                return module.mask_value or torch.finfo(module.model.dtype).min / 2
        return None


def _bits(quantizer: Any) -> int:
    return (int(quantizer.qmax) - int(quantizer.qmin)).bit_length()


@torch.no_grad()
def _activation(name: str, quantizer: Any) -> Activation:
    bitwidth = _bits(quantizer)
    if not quantizer.is_initialized():
        return Activation(name=name, bitwidth=bitwidth)
    low, high = float(quantizer.get_min().min()), float(quantizer.get_max().max())
    return Activation(name=name, bitwidth=bitwidth, low=low, high=high)
