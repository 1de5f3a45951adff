"""Layers of an ONNX graph as torch modules that hold no weights: they read the graph's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import OnnxLayer

__all__ = ["insert_module", "module_tree", "shell", "stored_bias", "stored_weight"]


def stored_weight(graph: OnnxGraph, layer: OnnxLayer) -> Tensor:
    """A copy of a layer's weight, output channels first."""
    weight = graph.tensor(layer.weight)
    return weight.mT.contiguous() if layer.transposed else weight


def stored_bias(graph: OnnxGraph, layer: OnnxLayer) -> Tensor | None:
    """A copy of a layer's bias ``[out]``, None if it has none."""
    return None if layer.bias is None else graph.tensor(layer.bias)


class _Shell(nn.Module):
    """What all shells share: no parameters of torch's, weight and bias as they are in the graph."""

    graph: OnnxGraph
    layer: OnnxLayer
    # Copies. Any, for torch's classes declare parameters here.
    weight: Any = property(lambda self: stored_weight(self.graph, self.layer))
    bias: Any = property(lambda self: stored_bias(self.graph, self.layer))


class _Linear(_Shell, nn.Linear):
    """A MatMul, with its Add, or a Gemm."""

    def __init__(self, graph: OnnxGraph, layer: OnnxLayer) -> None:
        nn.Module.__init__(self)
        self.graph, self.layer = graph, layer
        shape = graph.shape(layer.weight)
        self.out_features, self.in_features = reversed(shape) if layer.transposed else shape


class _Embedding(_Shell, nn.Embedding):
    """A Gather of rows."""

    def __init__(self, graph: OnnxGraph, layer: OnnxLayer) -> None:
        nn.Module.__init__(self)
        self.graph, self.layer = graph, layer
        self.num_embeddings, self.embedding_dim = graph.shape(layer.weight)
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False


class _Convolution(_Shell):
    """A Conv. Its padding is 0 where it is not the same on both sides: inputs come padded then."""

    padding_mode: Any

    def __init__(self, graph: OnnxGraph, layer: OnnxLayer) -> None:
        nn.Module.__init__(self)
        self.graph, self.layer = graph, layer
        shape = graph.shape(layer.weight)
        self.out_channels, self.in_channels = shape[0], shape[1] * layer.group
        self.kernel_size, self.stride = layer.kernel, layer.strides
        self.padding: Any = layer.padding or (0,) * len(layer.kernel)
        self.dilation, self.groups = layer.dilations, layer.group
        self.padding_mode, self.transposed = "zeros", False
        self.output_padding = (0,) * len(layer.kernel)


class _Conv1d(_Convolution, nn.Conv1d):
    pass


class _Conv2d(_Convolution, nn.Conv2d):
    pass


class _Conv3d(_Convolution, nn.Conv3d):
    pass


def shell(graph: OnnxGraph, layer: OnnxLayer) -> nn.Module:
    """A layer as ``nn.Linear``, ``nn.Embedding`` or ``nn.Conv1d`` to ``nn.Conv3d``."""
    if layer.kind == "linear":
        return _Linear(graph, layer)
    if layer.kind == "embedding":
        return _Embedding(graph, layer)
    return (_Conv1d, _Conv2d, _Conv3d)[len(layer.kernel) - 1](graph, layer)


def module_tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A module whose ``named_modules()`` has these names for these modules.

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
