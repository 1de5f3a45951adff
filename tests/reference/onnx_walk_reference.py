"""Models and batches to walk through, and what reaches a layer by running a whole copy."""

from __future__ import annotations

import onnx
import onnx_models
import torch
from onnx import numpy_helper

from aimet_ext.onnx.graph import OnnxGraph
from aimet_ext.onnx.layers import find_layers
from aimet_ext.onnx.shells import shell
from aimet_ext.onnx.walk.walk import OnnxWalk


def opened(model):
    """Graph, layers and shells of a model."""
    graph = OnnxGraph(model)
    layers = find_layers(graph)
    return graph, layers, {name: shell(graph, layer) for name, layer in layers.items()}


def with_weights(model, weights):
    """A copy of a model whose layers have these weights, in torch's order of dimensions."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _, layers, _ = opened(copy)
    values = {}
    for name, weight in weights.items():
        layer = layers[name]
        values[layer.weight] = (weight.T if layer.transposed else weight).contiguous().numpy()
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return copy


def layer_inputs(model, tensors, batch, weights):
    """These tensors of a model with these weights, by name."""
    inner = [name for name in tensors if name not in batch]
    found = onnx_models.run_onnx(with_weights(model, weights), batch, inner) if inner else []
    values = dict(zip(inner, map(torch.as_tensor, found), strict=True))
    return {name: values[name] if name in values else batch[name] for name in tensors}


IDS = [[5, 9, 33, 7, 81, 4, 12, 60], [71, 3, 3, 25, 90, 14, 6, 44]]


def images(count=2, size=3):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(size, 3, 8, 8, generator=generator)} for _ in range(count)]


def rows(count=2, size=5, width=8):
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(size, width, generator=generator)} for _ in range(count)]


def prompts(model, mask=None):
    ids = torch.tensor(IDS)
    if len(model.graph.input) > 2:
        feeds = onnx_models.genai_inputs(model, ids, mask)
        return [{name: torch.from_numpy(value) for name, value in feeds.items()}]
    mask = torch.ones_like(ids) if mask is None else mask
    return [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids + 1, "attention_mask": mask},
    ]


def padded_mask():
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return mask


def walk_of(model, batches, names=None, **settings):
    """A walk to these layers, all but embeddings by default, and what it was made of."""
    graph, layers, shells = opened(model)
    if names is None:
        names = [name for name, layer in layers.items() if layer.kind != "embedding"]
    return OnnxWalk(graph, layers, shells, batches, names, **settings), graph, layers, shells


def through(walk, shells):
    """Decide every layer as its own weight, and return the stages."""
    stages = []
    for stage in walk.stages():
        stages.append(stage)
        for layer in stage.layers:
            walk.decide(layer, shells[layer].weight)
    walk.close()
    return stages


def linear_model(**settings):
    return onnx_models.mlp_model((8, 16, 16, 4), **settings), rows()


def llama(**settings):
    model = onnx_models.exported_llama(**settings).model
    return model, prompts(model)


def genai(**settings):
    model, _ = onnx_models.genai_llama(**settings)
    return model, prompts(model)


MODELS = {
    "gemm": lambda: linear_model(),
    "gemm, weights [in, out]": lambda: linear_model(transposed=True),
    "matmul, add": lambda: linear_model(bias="add"),
    "matmul, weights behind a transpose": lambda: linear_model(bias=None, transposed=True),
    "convolutions": lambda: (onnx_models.conv_model(), images()),
    "llama": llama,
    "qwen2": lambda: llama(bias=True),
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "genai": genai,
    "genai qwen2": lambda: genai(family="qwen2"),
}
