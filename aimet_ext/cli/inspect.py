"""The ``inspect`` command: what an export, or a graph, holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from aimet_ext.cli.output import Result

EPILOG = """\b
Examples:
  aimet-ext inspect ./llama-w4
  aimet-ext inspect ./llama-w4 --json | jq .files
  aimet-ext inspect ./llama
"""

_WORDS = {"conv": "convolution", "embedding": "lookup table", "linear": "linear"}
_MOST = 8  # reasons, and layers of each, that are named
_COMPILED = "EPContext"  # onnxruntime's operator that holds a compiled model


def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            exists=True,
            metavar="FOLDER",
            help="What quantize or verify --output wrote, a Hugging Face model, or an .onnx file.",
        ),
    ],
) -> Result:
    """Check an exported folder and list it; say what a model or a graph holds."""
    from aimet_ext.cli import graphs

    if graphs.is_graph(folder):
        found = of_graph(folder)
        return Result("\n".join(_as_text(folder, found)), found)
    from aimet_ext.cli import model_folder

    if model_folder.is_model(folder):
        found = model_folder.of_model(folder)
        return Result("\n".join(model_folder.as_text(folder, found)), found)
    from aimet_ext.artifact.inspect import inspect_export
    from aimet_ext.cli.summary import summary
    from aimet_ext.files.reading import naming

    found = inspect_export(folder)
    with naming(folder):
        return Result(summary(found), found)


def of_graph(path: Path) -> dict[str, Any]:
    """Return what a graph takes, gives and holds, as JSON values.

    :returns: ``inputs`` and ``outputs`` with their shapes, ``opset`` of the operators that are
        used, ``nodes`` by type, ``layers`` with weights by name, ``integers`` with the grid of each
        layer that is stored as integers, ``skipped`` layers with the reason, ``quantized``, and
        ``compiled`` with what is told of a compiled model, empty without one.
    """
    from aimet_ext.files.reading import naming
    from aimet_ext.onnx.graph import OnnxGraph
    from aimet_ext.onnx.index import attributes
    from aimet_ext.onnx.integers import stored_integers
    from aimet_ext.onnx.layers import find_layers
    from aimet_ext.onnx.reading import read_model
    from aimet_ext.onnx.values import input_specs

    model = read_model(path)
    with naming(path):
        graph, integers = OnnxGraph(model), stored_integers(model)
        layers = find_layers(graph)
        kinds = {name: layer.kind for name, layer in layers.items()}
        stored = {name: kind for name, (kind, _) in integers.items()}
        used = {node.domain for node in model.graph.node}
        outputs = {value.name: value for value in model.graph.output}
        held = [attributes(node) for node in model.graph.node if node.op_type == _COMPILED]
        fields = ("source", "hardware_architecture", "ep_sdk_version")
        return {
            "kind": "graph",
            "inputs": {n: list(s.shape or ()) for n, s in input_specs(graph.inputs).items()},
            "outputs": {n: list(s.shape or ()) for n, s in input_specs(outputs).items()},
            "opset": {name: n for name, n in graph.opset.items() if name in used or not held},
            "nodes": dict(Counter(node.op_type for node in model.graph.node).most_common()),
            "layers": {**kinds, **stored},
            "integers": {name: grid for name, (_, grid) in integers.items()},
            "skipped": {n: why for n, why in layers.skipped.items() if n not in integers},
            "quantized": any(node.op_type == "DequantizeLinear" for node in model.graph.node),
            "compiled": {
                **{name: held[0][name] for name in fields if held[0].get(name)},
                "file": "" if held[0].get("embed_mode", 1) else held[0]["ep_cache_context"],
            }
            if held
            else {},
        }


def _as_text(path: Path, found: Mapping[str, Any]) -> Iterator[str]:
    from aimet_ext.cli.summary import laid_out

    rows = [("kind", _kind(path, found))]
    compiled = dict(found["compiled"])
    if compiled:
        rows.append(("file", compiled.pop("file") or "in the graph itself"))
        rows.append(("compiled by", ", ".join(compiled.values())))
    for name, word in (("takes", "input"), ("gives", "output")):
        rows += [(name, f"{word} {each} {shape}") for each, shape in found[f"{word}s"].items()]
    if not compiled:
        counts = Counter(found["layers"].values()).items()
        rows.append(("layers", ", ".join(f"{n} {_WORDS[kind]}" for kind, n in counts) or "none"))
    grids = Counter(found["integers"].values()).items()
    rows.append(("weights", ", ".join(f"{count} {grid}" for grid, count in grids)))
    rows += [("left out", line) for line in _left_out(found["skipped"])]
    nodes = ", ".join(f"{count} {kind}" for kind, count in found["nodes"].items())
    rows.append(("nodes", nodes))
    opset = ", ".join(f"{name or 'ai.onnx'} {n}" for name, n in found["opset"].items())
    yield from laid_out([*rows, ("opset", opset)])


def _kind(path: Path, found: Mapping[str, Any]) -> str:
    from aimet_ext.files.manifest import is_ours, read_manifest

    beside = read_manifest(path.parent, verify=False) if is_ours(path.parent) else {}
    if found["compiled"]:
        target = beside.get("target")
        return f"compiled model{f' for {target}' if target else ''}, for onnxruntime"
    if found["quantized"]:
        return "quantized graph (QDQ)"
    if beside.get("kind") == "export":
        return f"float graph of an export, with its quantizers beside it: inspect {path.parent}"
    return "float graph"


def _left_out(skipped: Mapping[str, str]) -> Iterator[str]:
    """Yield each reason once, with the layers that it is of."""
    from aimet_ext.errors import some

    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in list(by_reason.items())[:_MOST]:
        yield f"{some(names, _MOST)}: {reason}"
    if (rest := len(by_reason) - _MOST) > 0:
        yield f"and {rest} more"
