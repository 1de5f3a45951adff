"""Torch modules that stand for the layers of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer, stored_bias, stored_weight, weight_shape


class _Shell(nn.Module):
    """Base of all shells: no torch parameters, weight and bias as they are in the graph."""

    # Copies. Any, for torch's classes declare parameters here.
    weight: Any = property(lambda self: stored_weight(self.graph, self.layer))
    bias: Any = property(lambda self: stored_bias(self.graph, self.layer))

    def __init__(self, graph: OnnxGraph, layer: OnnxLayer) -> None:
        nn.Module.__init__(self)
        self.graph, self.layer = graph, layer


class _Linear(_Shell, nn.Linear):
    """A MatMul, with its Add, or a Gemm."""

    def __init__(self, graph: OnnxGraph, layer: OnnxLayer) -> None:
        _Shell.__init__(self, graph, layer)
        self.out_features, self.in_features = weight_shape(graph, layer)


class _Embedding(_Shell, nn.Embedding):
    """A Gather of rows."""

    def __init__(self, graph: OnnxGraph, layer: OnnxLayer) -> None:
        _Shell.__init__(self, graph, layer)
        self.num_embeddings, self.embedding_dim = graph.shape(layer.weight)
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False


class _Convolution(_Shell):
    """A Conv. Its padding is 0 where it is not the same on both sides: inputs come padded then.

    Or a ConvTranspose, where less padding behind the outputs than before is output padding.
    """

    padding_mode: Any

    def __init__(self, graph: OnnxGraph, layer: OnnxLayer) -> None:
        _Shell.__init__(self, graph, layer)
        shape = weight_shape(graph, layer)
        self.out_channels, self.in_channels = shape[0], shape[1] * layer.group
        self.transposed = layer.output_padding is not None
        if self.transposed:
            self.out_channels, self.in_channels = self.in_channels, self.out_channels
        self.kernel_size, self.stride = layer.kernel, layer.strides
        self.padding: Any = layer.padding or (0,) * len(layer.kernel)
        self.dilation, self.groups = layer.dilations, layer.group
        self.padding_mode = "zeros"
        self.output_padding: Any = (0,) * len(layer.kernel)
        if layer.output_padding is not None:
            half = len(layer.kernel)
            sides = zip(layer.output_padding, layer.pads[:half], layer.pads[half:], strict=True)
            self.output_padding = tuple(more + begin - end for more, begin, end in sides)


class _Conv1d(_Convolution, nn.Conv1d):
    pass


class _Conv2d(_Convolution, nn.Conv2d):
    pass


class _Conv3d(_Convolution, nn.Conv3d):
    pass


class _ConvTranspose1d(_Convolution, nn.ConvTranspose1d):
    pass


class _ConvTranspose2d(_Convolution, nn.ConvTranspose2d):
    pass


class _ConvTranspose3d(_Convolution, nn.ConvTranspose3d):
    pass


_CONVOLUTIONS = {
    False: (_Conv1d, _Conv2d, _Conv3d),
    True: (_ConvTranspose1d, _ConvTranspose2d, _ConvTranspose3d),
}


def shell(graph: OnnxGraph, layer: OnnxLayer) -> nn.Module:
    """Return a layer as ``nn.Linear``, ``nn.Embedding`` or a convolution, transposed or not."""
    if layer.kind == "linear":
        return _Linear(graph, layer)
    if layer.kind == "embedding":
        return _Embedding(graph, layer)
    kinds = _CONVOLUTIONS[layer.output_padding is not None]
    return kinds[len(layer.kernel) - 1](graph, layer)


def linear_module(graph: OnnxGraph, layer: OnnxLayer) -> nn.Linear:
    """Return a layer as a module with values of its own."""
    if layer.kind != "linear":
        raise ValueError(f"{layer.name}: a linear layer is required, got kind {layer.kind!r}")
    weight = stored_weight(graph, layer)
    module = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta")
    module.weight = nn.Parameter(weight)
    if layer.bias is not None:
        module.bias = nn.Parameter(graph.tensor(layer.bias))
    return module


def module_tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module whose ``named_modules()`` has these names for these modules.

    A name is cut at its dots, as torch does.
    """
    root = nn.Module()
    for name in sorted(modules, key=lambda name: name.count(".")):
        insert_module(root, name, modules[name])
    return root


def insert_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module under a name, which may be cut at its dots, in place of what was there."""
    *path, last = name.split(".")
    for piece in path:
        if piece not in root._modules:
            root.add_module(piece, nn.Module())
        root = root.get_submodule(piece)
    root.add_module(last, module)
