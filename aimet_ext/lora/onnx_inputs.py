"""A simulation with adapters as one ONNX graph whose adapters are inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aimet_ext.artifact.inputs import Inputs
from aimet_ext.artifact.torch_export import (
    OnnxFile,
    check_output,
    float32_model,
    run_onnx,
    write_onnx,
)
from aimet_ext.core.affine import fake_quantize
from aimet_ext.errors import MissingExtraError, require
from aimet_ext.files.encodings import Layout, entries, load_encodings, to_grid, to_version_1
from aimet_ext.files.reading import read_safetensors
from aimet_ext.lora.baked import encodings_file
from aimet_ext.lora.sim import LoraState, lora_state, switch
from aimet_ext.onnx.reading import read_model
from aimet_ext.sim.protocol import adapt
from aimet_ext.sim.torch.lora import described_entry, slots

LORA_NAMES = "lora_names.json"
_WEIGHT_LIST = "lora_weight_list.txt"
_ACTIVATIONS = ("A_output", "B_output", "sum")


@dataclass(frozen=True)
class Input:
    """An input of the graph that an adapter fills.

    :param name: Name in the graph.
    :param shape: Shape there, with the largest rank of all adapters.
    :param transposed: True if it lies there with the output channels as columns.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def layout(self) -> Layout:
        """Shape and channel axis."""
        return Layout(self.shape, 1 if self.transposed else 0)

    def laid_out(self, value: Tensor) -> Tensor:
        """Return a weight as the graph takes it: turned, with zeros up to the graph's rank."""
        value = value.detach().float().cpu()
        value = value.T if self.transposed else value
        padded = torch.zeros(self.shape)
        padded[tuple(slice(n) for n in value.shape)] = value
        return padded


@dataclass(frozen=True)
class AdapterGraph:
    """Places of the adapters' tensors in the ONNX graph.

    :param inputs: Inputs by slot and ``"a"``, ``"b"`` or ``"bias"``.
    :param activations: Names of tensors by slot and key of quantizer; several where the tensor
        is reshaped or transposed, of which AIMET gives each an encoding.
    """

    inputs: Mapping[tuple[str, str], Input]
    activations: Mapping[tuple[str, str], tuple[str, ...]]

    def of(self, *keys: str) -> list[str]:
        """Return the names of all activations of these quantizers."""
        return [n for (_, key), names in self.activations.items() if key in keys for n in names]


@torch.no_grad()
def write_adapter_graph(
    sim: Any, folder: Path, prefix: str, inputs: Inputs, *, opset_version: int
) -> dict[str, Any]:
    """Write the graph, the base's encodings, and of each adapter its inputs and encodings.

    Every adapter is checked: its weights quantized by its encodings are those of the simulation,
    bit by bit, and the graph that is fed with it computes what the float model does.

    :returns: results of the checks.
    :raises RuntimeError: something written differs from the simulation.
    """
    state = lora_state(sim)
    active = state.active
    try:
        with adapt(sim).preserved_state():
            graph = _write_graph(sim, folder, prefix, inputs, opset_version)
            for name in state.adapters:
                _write_adapter(state, folder, prefix, name, graph)
            _write_lists(folder, prefix, state, graph)
            return _check(sim, folder, prefix, inputs, graph)
    finally:
        switch(sim, active)


def _write_graph(
    sim: Any, folder: Path, prefix: str, inputs: Inputs, opset_version: int
) -> AdapterGraph:
    """Write the graph; adapters' weights are inputs with zeros as defaults."""
    state = lora_state(sim)
    probes = {}
    for number, (name, room) in enumerate(slots(sim).items()):
        rank = max(contents[name].b.shape[1] for contents in state.adapters.values())
        probes[name] = room.probe_content(rank, number)
        room.put(probes[name])
    with float32_model(sim.model):
        file = write_onnx(
            sim, folder, prefix, inputs, opset_version=opset_version, dynamic_axes=None
        )
    found, names = {}, _by_scale(folder / f"{prefix}.2.0.0.encodings")
    activations = {}
    for slot, module in state.slots.items():
        for key, part in (("a", "lora_A.weight"), ("b", "lora_B.weight"), ("bias", "lora_B.bias")):
            if key == "bias" and probes[slot].bias is None:
                continue
            place = file.names.get(f"{slot}.{part}")
            tensor = f"{slot}.{part}" if place is None else place.tensor
            transposed, shape = place is not None and place.transposed, file.shape(tensor)
            assert shape is not None, tensor
            found[tensor] = (slot, key, Input(f"{module}.{part}", shape, transposed))
        for key in _ACTIVATIONS:
            quantizer = probes[slot].quantizers[key]
            if quantizer is not None:
                activations[slot, key] = names[probes[slot].scale(key)]
    _make_inputs(file.path, {tensor: entry for tensor, (_, _, entry) in found.items()})
    graph = AdapterGraph({(slot, key): e for slot, key, e in found.values()}, activations)
    _clean_base_encodings(sim, folder, prefix, set(found), graph)
    return graph


def _by_scale(path: Path) -> dict[float, tuple[str, ...]]:
    """Return the names of activations by their scale."""
    found: dict[float, tuple[str, ...]] = {}
    for name, entry in entries(load_encodings(path)).items():
        if isinstance(entry.get("y_scale"), float):
            scale = torch.tensor(entry["y_scale"], dtype=torch.float32).item()
            found[scale] = (*found.get(scale, ()), name)
    return found


def _make_inputs(path: Path, inputs: Mapping[str, Input]) -> None:
    """Rename initializers, set them to zero, and list them as inputs of the graph as well."""
    onnx = require("onnx", "onnx")
    from aimet_ext.onnx.index import GraphIndex, rename_reads
    from aimet_ext.onnx.values import set_value

    model = read_model(path)
    graph = model.graph
    index = GraphIndex(graph)
    real = {index.source(name): entry for name, entry in inputs.items()}
    for node in graph.node:
        rename_reads(node, {name: entry.name for name, entry in real.items()})
    for proto in graph.initializer:
        if proto.name in real:
            entry = real[proto.name]
            set_value(proto, torch.zeros(entry.shape).numpy())
            proto.name = entry.name
            kind = onnx.helper.make_tensor_value_info(
                entry.name, onnx.TensorProto.FLOAT, list(entry.shape)
            )
            graph.input.append(kind)
    known = {value.name for value in graph.input}
    absent = [entry.name for entry in real.values() if entry.name not in known]
    if absent:
        raise RuntimeError(f"{path.name} must hold the adapters' weights, but lacks {absent}")
    external = [file for file in path.parent.glob(f"{path.name}*") if file != path]
    if external:
        onnx.save_model(
            model,
            str(path),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=external[0].name,
        )
    else:
        onnx.save_model(model, str(path))


def _clean_base_encodings(
    sim: Any, folder: Path, prefix: str, weights: set[str], graph: AdapterGraph
) -> None:
    """Leave the base's encodings alone in its files; sums are as the base alone has them."""
    state = lora_state(sim)
    branches = set(graph.of("A_output", "B_output"))
    sums = {
        name: described_entry(name, state.empty[slot].quantizers["sum"], 0)
        for (slot, key), names in graph.activations.items()
        for name in names
        if key == "sum"
    }
    older = to_version_1({"version": "2.0.0", "encodings": list(sums.values())}, {})[
        "activation_encodings"
    ]
    for file, replaced in (
        (folder / f"{prefix}.2.0.0.encodings", sums),
        (folder / f"{prefix}.encodings", {entry["name"]: entry for entry in older}),
    ):
        document = load_encodings(file)
        for section in ("encodings", "activation_encodings", "param_encodings"):
            if section in document:
                document[section] = [
                    replaced.get(entry["name"], entry)
                    for entry in document[section]
                    if entry["name"] not in weights | branches
                ]
        file.write_text(json.dumps(document, indent=2), encoding="utf-8")


def _write_adapter(
    state: LoraState, folder: Path, prefix: str, name: str, graph: AdapterGraph
) -> None:
    """Write ``{name}.safetensors``, what the graph's inputs take, and the encodings."""
    tensors, found, layouts = {}, [], {}
    for (slot, key), place in graph.inputs.items():
        content = state.adapters[name][slot]
        value = getattr(content, key)
        tensors[place.name] = place.laid_out(value)
        quantizer = None if key == "bias" else content.quantizers[key.upper()]
        if quantizer is None:
            continue
        layouts[place.name] = place.layout
        axis = place.layout.channel_axis
        padded = place.shape[axis] - value.shape[0]
        found.append(described_entry(place.name, quantizer, axis, padded))
    for (slot, key), names in graph.activations.items():
        quantizer = state.adapters[name][slot].quantizers[key]
        if quantizer is not None:
            found += [described_entry(tensor, quantizer, 0) for tensor in names]
    document = to_version_1({"version": "2.0.0", "encodings": found}, layouts)
    path = folder / encodings_file(prefix, name)
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")
    save_file(tensors, folder / f"{name}.safetensors")
    _compare(state, name, graph, document, tensors)


def _compare(
    state: LoraState,
    name: str,
    graph: AdapterGraph,
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Quantize the inputs by the encodings, and compare with the simulation's weights, exactly."""
    encoded = entries(document)
    for (slot, key), place in graph.inputs.items():
        if place.name not in encoded:
            continue
        quantized = state.adapters[name][slot].rounded(key, torch.float32)
        grid = to_grid(encoded[place.name], place.layout)
        read = fake_quantize(tensors[place.name], grid)
        if not torch.equal(read, place.laid_out(quantized)):
            raise RuntimeError(
                f"adapter {name!r}: {place.name} quantized by its encodings must equal the "
                "simulation's, but differs"
            )


def _write_lists(folder: Path, prefix: str, state: LoraState, graph: AdapterGraph) -> None:
    """Write what AIMET's own functions and Qualcomm's tools read beside the graph."""
    params = [place.name for place in graph.inputs.values()]
    names = {
        "params": params,
        "activations": graph.of("A_output", "B_output"),
        "sums": graph.of("sum"),
        "scales": {},
    }
    (folder / LORA_NAMES).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    (folder / _WEIGHT_LIST).write_text("".join(f"{name}\n" for name in params), encoding="utf-8")
    config, adapters = ["use_case:"], []
    for name in sorted(state.adapters):
        config += [
            f"  - name: {json.dumps(name)}",
            f"    model_name: {json.dumps(f'{prefix}.onnx')}",
            f"    lora_weights: {json.dumps(f'{name}.safetensors')}",
            f"    quant_overrides: {json.dumps(encodings_file(prefix, name))}",
            '    output_path: "./output"',
        ]
        adapters += [
            f"- name: {json.dumps(name)}",
            f"  encodings_path: {json.dumps(encodings_file(prefix, name))}",
            f"  safetensor_path: {json.dumps(f'{name}.safetensors')}",
        ]
    (folder / "lora_config.yaml").write_text("\n".join(config) + "\n", encoding="utf-8")
    (folder / "lora_adaptor_list.yaml").write_text("\n".join(adapters) + "\n", encoding="utf-8")


def _check(
    sim: Any, folder: Path, prefix: str, inputs: Inputs, graph: AdapterGraph
) -> dict[str, Any]:
    """Run the graph with each adapter and with none, and compare with the float model."""
    file = OnnxFile(folder / f"{prefix}.onnx")
    adaptor = adapt(sim)
    own = tuple(
        f"{slot}.{part}." for slot in lora_state(sim).slots for part in ("lora_A", "lora_B")
    )
    weights = {
        name: value.float()
        for name, value in adaptor.float_state().items()
        if value.dim() > 1 and not name.startswith(own)
    }
    checks: dict[str, Any] = {"base_weights_not_found_in_onnx": file.missing(weights)}
    deviations = {}
    for name in (None, *lora_state(sim).adapters):
        switch(sim, name)
        own_feed = {} if name is None else read_safetensors(folder / f"{name}.safetensors")[0]
        try:
            output = run_onnx(file.path, inputs, own_feed)
        except MissingExtraError:
            return {**checks, "onnxruntime": "not installed"}
        with float32_model(sim.model):
            who = f"{prefix}.onnx with adapter {name!r}"
            deviations[name or ""] = check_output(adaptor, inputs, output, who)
    checks["onnxruntime"] = metadata.version("onnxruntime")
    checks["onnxruntime_relative_deviation"] = deviations
    return checks
