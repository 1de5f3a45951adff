"""The export of a torch sim: its float32 weights as ONNX with encodings beside it, compared."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.artifact.check_export import exporter_errors
from aimet_ext.artifact.export import write_model, write_quantizers
from aimet_ext.artifact.inputs import Inputs, positional_inputs
from aimet_ext.core.affine import Grid, fake_quantize
from aimet_ext.errors import MissingExtraError
from aimet_ext.files.encodings import Layout, entries, load_encodings, to_grid, to_version_1
from aimet_ext.files.folders import write_json
from aimet_ext.files.manifest import SETTINGS
from aimet_ext.integrity.stored import StoredGraph, hash_values
from aimet_ext.models.huggingface import causal_lm, checkpoint_prefix
from aimet_ext.onnx.apart import WeightsApart
from aimet_ext.onnx.reading import read_model, read_outline
from aimet_ext.onnx.rewrite.rotate import rotate_queries_and_keys
from aimet_ext.onnx.session import open_session
from aimet_ext.progress import step
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.sim.torch.adaptor import TorchSim
from aimet_ext.sim.torch.state import LayerParameter, quantized_parameters, unset_quantizers

# Largest deviation of onnxruntime from the float model, relative to its largest logit.
_TOLERANCE = 1e-4
# Values of a weight that are quantized at a time.
_PIECE = 1 << 22

CHECKPOINT = "checkpoint"


class TorchWriter:
    """Writer of the files of a torch sim, beside scales and ledger.

    :param dummy_input: input to trace the model with.
    :param rounded: True to write weights at their quantized values, for transformers, as well.
    :param options: options of the ONNX file.
    """

    def __init__(
        self,
        sim: Any,
        prefix: str,
        dummy_input: Any,
        tokenizer: Any,
        rounded: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.adaptor, self.prefix, self.tokenizer = TorchSim(sim), prefix, tokenizer
        self.rounded, self.options = rounded, options
        self.without_range = unset_quantizers(sim)
        self.inputs = positional_inputs(sim.model, dummy_input)
        self.name_prefix = checkpoint_prefix(sim.model)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files and return fields for the manifest."""
        sim, model = self.adaptor.sim, self.adaptor.model
        model.eval()
        state = self.adaptor.float_state()
        step("weights")
        facts = write_model(folder, model, state, self.tokenizer)
        write_quantizers(folder, self.adaptor)
        language_model = causal_lm(model)
        config = getattr(language_model, "config", None)
        settings = {
            "create_sim": self.adaptor.settings if language_model is not None else None,
            "attention": getattr(config, "_attn_implementation", None),
            "dtype": str(getattr(language_model, "dtype", "")).removeprefix("torch."),
        }
        write_json(folder / SETTINGS, settings)
        with float32_model(model):
            step("ONNX graph and encodings")
            inputs = self.inputs.in_float32()
            file = write_onnx(sim, folder, self.prefix, inputs, **self.options)
            step("comparison in onnxruntime")
            checks = _check_onnx(file, self.adaptor, inputs)
            if self.rounded:
                rounded = {n: p.rounded() for n, p in quantized_parameters(sim).items()}
                state = {**self.adaptor.float_state(), **rounded}
                write_model(folder / CHECKPOINT, model, state, self.tokenizer)
        names = {name: place.tensor for name, place in file.names.items()}
        return {"model": facts, "checks": checks, "onnx_names": names}


@torch.no_grad()
def _check_onnx(file: OnnxFile, adaptor: TorchSim, inputs: Inputs) -> dict[str, Any]:
    """Compare the ONNX file with the float model; results for the manifest.

    :raises RuntimeError: the outputs differ.
    """
    weights = {name: w.float() for name, w in adaptor.float_state().items() if w.dim() > 1}
    checks: dict[str, Any] = {
        "quantized_parameters_equal": len(file.names),
        "weights_not_found_in_onnx": file.missing(weights),
    }
    try:
        output = run_onnx(file.path, inputs)
    except MissingExtraError:
        return {**checks, "onnxruntime": "not installed"}
    deviation = check_output(adaptor, inputs, output, f"{file.path.name} in onnxruntime")
    checks["onnxruntime"] = metadata.version("onnxruntime")
    checks["onnxruntime_relative_deviation"] = deviation
    return checks


@dataclass(frozen=True)
class Place:
    """Place of a quantized parameter in the ONNX file.

    :param tensor: the initializer, or the alias of one, that carries the encoding.
    :param transposed: True if its columns are the output channels there.
    """

    tensor: str
    transposed: bool
    layout: Layout


@contextlib.contextmanager
def float32_model(model: nn.Module) -> Iterator[None]:
    """Return a context in which a model of another dtype computes in float32.

    Weights of fewer bits are the same there, those of float64 are rounded.
    """
    tensors = [*model.parameters(), *model.buffers()]
    others = [
        (t, t.data) for t in tensors if t.is_floating_point() and t.dtype is not torch.float32
    ]
    try:
        for tensor, data in others:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in others:
            tensor.data = data


def write_onnx(
    sim: Any,
    folder: Path,
    prefix: str,
    inputs: Inputs,
    *,
    opset_version: int,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None,
    output_names: Sequence[str] = ("logits",),
) -> OnnxFile:
    """Write ``{prefix}.onnx`` and the encodings, both versions, and compare them with the sim.

    AIMET's exporter writes the graph and encodings 2.0.0; 1.0.0 is derived from those.

    :raises RuntimeError: the exporter cannot write the model, or a weight read back from the files
        is not quantized as in the sim.
    """
    path = folder / f"{prefix}.onnx"
    newer, older = folder / f"{prefix}.2.0.0.encodings", folder / f"{prefix}.encodings"
    adaptor, apart = TorchSim(sim), WeightsApart()
    with exporter_errors(sim.model):
        adaptor.write_graph(
            path,
            inputs.args,
            apart,
            input_names=list(inputs.names),
            output_names=list(output_names),
            opset_version=opset_version,
            dynamic_axes=dict(dynamic_axes) if dynamic_axes else None,
        )
    older.rename(newer)
    if adaptor.ledger is not None and adaptor.ledger.rotates_keys:
        model = read_model(path, external=False)
        rotate_queries_and_keys(model, adaptor.ledger.key_maps)
        path.write_bytes(model.SerializeToString())
    apart.write(path)

    file = OnnxFile(path)
    document = load_encodings(newer)
    parameters = quantized_parameters(sim)
    places = file.find(parameters, entries(document))
    shapes = {name: file.shape(name) for name in entries(document)}
    constants = {name: Layout(shape, 0) for name, shape in shapes.items() if shape is not None}
    constants.update({place.tensor: place.layout for place in places.values()})
    converted = to_version_1(document, constants, **adaptor.encoding_settings())
    older.write_text(json.dumps(converted, indent=2), encoding="utf-8")
    for written in (newer, older):
        file.compare(parameters, places, written)
    return file


class OnnxFile(StoredGraph):
    """The constants of an ONNX file, read one at a time, and where a sim's parameters are in it.

    :param path: path of the file; its external data, if any, lies beside it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.names: dict[str, Place] = {}

    def find(
        self, parameters: Mapping[str, LayerParameter], encoded: Mapping[str, Any]
    ) -> dict[str, Place]:
        """Find each quantized parameter: by its values, then by its encoding, then by name.

        The exporter transposes and renames the weights of linear layers and merges equal ones.

        :param parameters: Quantized parameters by name.
        :param encoded: encodings 2.0.0 by tensor name.
        :raises RuntimeError: one of them is not there, or not with the encoding of its quantizer.
        """
        named: dict[str | None, list[str]] = {}
        for name in self.constants:
            named.setdefault(self.hash(name), []).append(name)
        aliases: dict[str, list[str]] = {}
        for alias in self.index.producer:
            if alias not in self.constants:
                aliases.setdefault(self.index.source(alias), []).append(alias)
        faults = []
        for name, parameter in parameters.items():
            value = parameter.value.detach().cpu()
            turned = [(False, value), (True, value.T)] if value.dim() == 2 else [(False, value)]
            places = [
                Place(tensor, transposed, parameter.layout(transposed=transposed))
                for transposed, values in turned
                for source in named.get(_hash(values), [])
                for tensor in (source, *aliases.get(source, []))
                if tensor in encoded
            ]
            places.sort(key=lambda place: not place.tensor.startswith(name))
            expected = parameter.rounded().cpu()
            for place in places:
                if self._difference(place, encoded, expected) == 0:
                    self.names[name] = place
                    break
            else:
                faults.append(f"{name} ({'another grid' if places else 'absent'})")
        if faults:
            raise RuntimeError(
                f"{self.path.name} does not hold these quantized parameters as the sim has them: "
                f"{', '.join(faults)}"
            )
        return self.names

    def compare(
        self,
        parameters: Mapping[str, LayerParameter],
        places: Mapping[str, Place],
        encodings: Path,
    ) -> None:
        """Quantize the weights of the file by an encodings file and compare with the sim, exactly.

        :raises RuntimeError: they differ; each is named with its largest difference.
        """
        encoded = entries(load_encodings(encodings))
        faults = []
        for name, place in places.items():
            difference = self._difference(place, encoded, parameters[name].rounded().cpu())
            if difference:
                faults.append(f"{name} by {difference:.3g}")
        if faults:
            raise RuntimeError(
                f"weights of {self.path.name} quantized by {encodings.name} must equal the sim's, "
                f"but these differ: {', '.join(faults)}"
            )

    def missing(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Return parameters whose float values are in no constant, as they are or transposed."""
        known = {self.hash(name) for name in self.constants}
        return [
            name
            for name, value in parameters.items()
            if _hash(value) not in known and not (value.dim() == 2 and _hash(value.T) in known)
        ]

    def _difference(self, place: Place, encoded: Mapping[str, Any], expected: Tensor) -> float:
        value = self.value(place.tensor)
        assert value is not None, place
        grid = to_grid(encoded[place.tensor], place.layout)
        weight = torch.from_numpy(value if value.flags.writeable else value.copy())
        expected = expected.T if place.transposed else expected
        pieces = _pieces(weight, expected, grid)
        return max(float((fake_quantize(w, g) - e).abs().max()) for w, e, g in pieces)


def _pieces(value: Tensor, expected: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor, Grid]]:
    """Yield parts of a weight with the same parts of another one and of the grid."""
    cells = (1,) * (value.dim() - grid.scale.dim()) + tuple(grid.scale.shape)
    whole = [n in (1, size) for n, size in zip(cells, value.shape, strict=True)]
    if value.numel() <= _PIECE or True not in whole:
        yield value, expected, grid
        return
    axis = whole.index(True)
    step = max(1, _PIECE * value.shape[axis] // value.numel())

    def cut(tensor: Tensor, start: int) -> Tensor:
        one = tensor.dim() < value.dim() or tensor.shape[axis] == 1
        return tensor if one else tensor.narrow(axis, start, min(step, tensor.shape[axis] - start))

    for start in range(0, value.shape[axis], step):
        scale, offset = cut(grid.scale, start), cut(grid.offset, start)
        part = cut(value, start).contiguous()
        yield part, cut(expected, start), replace(grid, scale=scale, offset=offset)


def run_onnx(path: Path, inputs: Inputs, further: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the first output of an ONNX file in onnxruntime on the CPU.

    :param further: Inputs by name beside those of the model.
    """
    # Weights are mapped from the file: neither parsed, nor copied, nor packed for speed.
    mapped = {"session.disable_prepacking": "1"}
    outline = read_outline(path).SerializeToString()
    session = open_session(outline, folder=path.parent, entries=mapped)
    wanted = {value.name for value in session.get_inputs()}
    given = {name: tensor for name, tensor in inputs.tensors.items() if name in wanted}
    feed = {name: t.cpu().numpy() for name, t in {**given, **(further or {})}.items()}
    return torch.from_numpy(session.run(None, feed)[0])


def check_output(adaptor: SimAdaptor, inputs: Inputs, output: Tensor, who: str) -> float:
    """Return the deviation of an ONNX file's output from the float model's.

    :param who: Name of what made the output, for the message.
    :returns: the largest difference relative to the model's largest output.
    :raises RuntimeError: it is too large.
    """
    with adaptor.disabled_quantizers():
        expected = adaptor.model(*inputs.args)
    if not isinstance(expected, Tensor):
        expected = expected[0]
    expected = expected.as_subclass(Tensor).cpu()
    deviation = float((output - expected).abs().max() / expected.abs().max())
    if not deviation <= _TOLERANCE:
        raise RuntimeError(
            f"{who} must agree with the float model to {_TOLERANCE} of its largest output, "
            f"but deviates by {deviation:.3g}"
        )
    return deviation


def _hash(tensor: Tensor) -> str:
    return hash_values(tensor.detach().cpu().numpy())
