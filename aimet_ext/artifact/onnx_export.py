"""An ONNX sim written to a folder, each file read back and compared, and rebuilt from it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from pydantic import BaseModel, Json
from torch import Tensor

from aimet_ext.errors import some
from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.files.folders import write_json
from aimet_ext.files.manifest import QUANTIZERS, SETTINGS
from aimet_ext.files.numbers import quantizer_faults, refuse_faults
from aimet_ext.files.tensors import read_sealed, write_sealed
from aimet_ext.onnx.index import stored_values
from aimet_ext.onnx.values import to_torch, torch_array
from aimet_ext.progress import step
from aimet_ext.sim.onnx import files
from aimet_ext.sim.onnx.build import build_described, describe_sim
from aimet_ext.sim.onnx.state import (
    OutsideError,
    deviation,
    differences,
    enabled_quantizers,
    float_tensors,
    outside,
    read_encodings,
    read_qdq,
    rebuild_session,
    restore_sim,
    run,
    run_file,
    sim_state,
    uncalibrated,
)
from aimet_ext.sim.protocol import CalibrationWalks, SimAdaptor

_log = logging.getLogger(__name__)

_SCHEMA = "aimet_ext.onnx_quantizers/1"
# Deviation of outputs relative to their norm: of weights alone, and where activations are rounded,
# of which another order of sums moves some by a step. In any case less than the sim's own
# deviation from the float model.
_TOLERANCE, _ROUNDED = 1e-4, 1e-3

Arrays = dict[str, Any]


class OnnxWriter:
    """Writer of the files of an ONNX sim, beside scales and ledger.

    Each file is compared with the sim before the next one is written. The arguments are those of
    :func:`aimet_ext.export`.

    :raises ValueError: a quantizer of the sim cannot be in an encodings file, or in a QDQ model.
    """

    name_prefix = ""  # of names in the sim that the original model does not have

    def __init__(
        self,
        adaptor: SimAdaptor,
        prefix: str,
        dummy_input: Any,
        tokenizer: Any,
        bias: Literal["float", "int32"],
        qdq: bool | None,
        external_data: bool | None,
    ) -> None:
        self.adaptor, self.sim, self.prefix = adaptor, adaptor.sim, prefix
        self.tokenizer, self.bias, self.external = tokenizer, bias, external_data
        self.qdq, self.needs_qdq = qdq is not False, qdq is True or bias == "int32"
        self.sample = _sample(adaptor, dummy_input)
        if wide := files.unfit_for_encodings(self.sim):
            raise ValueError(
                f"encodings of integers, float16 and float8 can be written, but {some(wide, 3)} "
                f"{'have quantizers' if len(wide) > 1 else 'has a quantizer'} of float32, which "
                "AIMET rounds to float16; set them to float16, or switch them off with "
                "quantizer.enabled = False"
            )
        self.without_range = uncalibrated(self.sim)
        self.wider = files.containers(self.sim)
        if bias == "int32":
            _refuse_shared_biases(adaptor)
        self.unfit = files.unfit_for_qdq(self.sim, self.wider) if self.qdq else []
        if self.unfit and self.needs_qdq and not self.without_range:
            raise ValueError(
                f"a QDQ model cannot hold {some(self.unfit, 5)}; give these tensors a width of 4, "
                "8 or 16 bits in float32, or leave the QDQ model out with qdq=False"
            )

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files and return fields for the manifest."""
        self.folder, self.model_path = folder, folder / f"{self.prefix}.onnx"
        self.described = describe_sim(self.sim)
        self.rounded = dict(files.quantized_constants(self.sim, self.wider)) if self.wider else {}
        rebuild_session(self.sim)  # a technique, or the user, may have written to the weights
        self.outputs = run(self.sim, self.sample)
        with self.adaptor.disabled_quantizers():
            error = _deviation(self.outputs, run(self.sim, self.sample))
        used, constants = enabled_quantizers(self.sim), self._mine()
        alone = all(name in constants for name in used)
        self.limit = max(_TOLERANCE if alone else _ROUNDED, error)
        self.checks: dict[str, Any] = {
            "quantization_error": error,
            "float16_casts_only_in_1.0.0": float_tensors(self.sim),
            "lpbq_as_blocks_in_2.0.0": files.lpbq_as_blocks(self.sim, self.wider),
        }
        step("weights")
        self._write_float()
        step("encodings, read back")
        self._write_encodings()
        step("QDQ model")
        if self.qdq:
            self._try_qdq()
        self._write_state()
        with_tokenizer = self.tokenizer is not None
        if with_tokenizer:
            self.tokenizer.save_pretrained(folder)
        return {
            "framework": "onnx",
            "model": {"loads_in_transformers": False, "tied": {}, "tokenizer": with_tokenizer},
            "bias": self.bias,
            "containers": {name: [used[name].bitwidth, b] for name, b in self.wider.items()},
            "checks": self.checks,
        }

    def _write_float(self) -> None:
        """Write the float model; weights of a width that ONNX lacks lie on their grid."""
        files.save_float_model(self.sim, self.model_path, self.rounded, external=self.external)
        mine, written = self._mine(), stored_values(onnx.load(str(self.model_path)).graph)
        expected = {**mine, **self.rounded}
        faults = [
            name
            for name in mine
            if name not in written or not files.same_value(written[name], expected[name])
        ]
        if faults:
            raise RuntimeError(
                f"{self.model_path.name} must hold the sim's weights, but these differ: "
                f"{some(faults, 5)}"
            )
        self.checks["constants_equal"] = len(mine)

    def _write_encodings(self) -> None:
        """Write encodings of both versions, and load each into a new sim of the float model."""
        int32_biases = self.bias == "int32"
        for version, name in (("1.0.0", ""), ("2.0.0", ".2.0.0")):
            path = self.folder / f"{self.prefix}{name}.encodings"
            files.write_encodings(self.sim, path, version, self.wider, int32_biases=int32_biases)
            encoded = entries(load_encodings(path))
            if int32_biases and (missing := files.missing_int32_biases(self.sim, encoded)):
                raise ValueError(
                    'bias="int32" needs a layer\'s input quantized to integers, as the scale of a '
                    "bias is that of the input times that of the weight; it cannot be had for "
                    f'{some(missing, 5)}: quantize the inputs, or take bias="float"'
                )
            other = build_described(
                onnx.load(str(self.model_path)), self.described, sample=self.sample
            )
            read_encodings(self.sim, path, other)
            self._compare(path.name, other)
            del other  # a second model in memory, before the next one is built
            self.checks[f"encodings_{version}"] = len(encoded)

    def _try_qdq(self) -> None:
        """Write the QDQ model; one that nobody asked for is left out where it cannot be right."""
        path = self.folder / f"{self.prefix}.qdq.onnx"
        fault = f"it cannot hold {some(self.unfit, 5)}" if self.unfit else ""
        if not fault:
            try:
                self._write_qdq(path)
            except (OutsideError, _Deviates) as error:
                if self.needs_qdq:
                    raise
                fault = str(error)
        if fault:
            for file in self.folder.glob(f"{path.name}*"):
                file.unlink()
            self.checks["qdq_left_out"] = fault
            _log.warning("export: no QDQ model was written: %s", fault)

    def _write_qdq(self, path: Path) -> None:
        """Write the QDQ model, run it in onnxruntime as it is, and have AIMET read it.

        What onnxruntime computes counts: AIMET does not read every operator that it writes.
        """
        values = files.quantized_constants(self.sim)
        model = files.load_with(self.model_path, values)
        newer = load_encodings(self.folder / f"{self.prefix}.2.0.0.encodings")
        files.save_qdq_model(model, newer, path, external=bool(self.external))
        del model
        with outside("onnxruntime"):
            outputs = run_file(path, self.sample)
        deviation = self._check_deviation(f"{path.name} in onnxruntime", outputs)
        self.checks["onnxruntime"] = metadata.version("onnxruntime")
        self.checks["onnxruntime_relative_deviation"] = deviation
        try:
            self._read_qdq(path)
        except (OutsideError, _Deviates) as error:
            self.checks["qdq_not_read_by_aimet"] = str(error)
            _log.warning(
                "export: %s computes in onnxruntime what the simulation does, but AIMET does not "
                "read it back so: %s", path.name, error
            )  # fmt: skip

    def _read_qdq(self, path: Path) -> None:
        model = onnx.load(str(path))
        with outside("AIMET's reader"):
            other = build_described(model, self.described, sample=self.sample, qdq=True)
            read_qdq(self.sim, other)
        last_bit = files.integer_scales(self.sim, self.wider)
        # A conversion of the opset moves quantizers to tensors of its own, which AIMET then finds
        # under other names; a grid or a constant that both have must be the same.
        moved = ("has no quantizer", "has a quantizer")
        faults = differences(self.sim, other, last_bit=last_bit)
        if wrong := [fault for fault in faults if not fault.endswith(moved)]:
            raise _WrongGrids(
                f"{path.name}, read back by AIMET, must quantize as the sim does, but "
                f"{some(wrong, 5)}"
            )
        self._compare(path.name, other, last_bit)

    def _write_state(self) -> None:
        """Write quantizers, float weights, sample and settings, for this package alone."""
        ranges, described = sim_state(self.sim)
        tensors = {f"range.{name}": tensor for name, tensor in ranges.items()}
        tensors.update({f"sample.{n}": torch.from_numpy(a) for n, a in self.sample.items()})
        mine = self._mine()
        for name, values in self.rounded.items():
            value = onnx.numpy_helper.to_array(mine[name])
            if not np.array_equal(value, values):
                tensors[f"float.{name}"] = to_torch(value)
        fields = {"quantizers": described, "sim": self.described}
        write_sealed(self.folder / QUANTIZERS, _SCHEMA, tensors, fields)
        write_json(self.folder / SETTINGS, {"create_sim": self.adaptor.settings})

    def _mine(self) -> dict[str, Any]:
        return stored_values(self.sim.model.model.graph)

    def _compare(self, name: str, other: Any, last_bit: Collection[str] = ()) -> None:
        faults = differences(self.sim, other, last_bit=last_bit)
        if faults:
            raise _Deviates(
                f"{name}, read back by AIMET, must quantize as the sim does, but {some(faults, 5)}"
            )
        with outside("AIMET's simulation"):
            outputs = run(other, self.sample)
        deviation = self._check_deviation(f"{name}, read back by AIMET,", outputs)
        self.checks[f"{name}_relative_deviation"] = deviation

    def _check_deviation(self, name: str, outputs: list[Any]) -> float:
        deviation = _deviation(outputs, self.outputs)
        if not deviation <= self.limit:
            raise _Deviates(
                f"{name} must compute what the sim does to {self.limit:.3g} of its outputs' norm, "
                f"but deviates by {deviation:.3g}"
            )
        return deviation


class _Deviates(RuntimeError):
    """An error: another program reads a file, and computes something else than the simulation."""


class _WrongGrids(RuntimeError):
    """A QDQ model quantizes a tensor in another way than the simulation."""


def _refuse_shared_biases(adaptor: Any) -> None:
    """Refuse biases of several layers, whose integers would need several scales.

    :raises ValueError: The biases are named.
    """
    readers: dict[str, list[str]] = {}
    for name, layer in adaptor.layers.items():
        if layer.bias is not None:
            readers.setdefault(layer.bias, []).append(name)
    for bias, layers in readers.items():
        if len(layers) > 1:
            raise ValueError(
                f'bias="int32": a bias for each layer is required, but {bias} is that of '
                f"{some(layers)}; copy it for each before the simulation is built "
                '(aimet_onnx.utils.duplicate_shared_initializers), or export with bias="float"'
            )


class _Fields(BaseModel):
    """Fields of ``quantizers.safetensors``: quantizers by name, and how the sim is built."""

    quantizers: Json[dict[str, dict[str, Any]]]
    sim: Json[dict[str, Any]]


def read_onnx_quantizers(folder: Path) -> tuple[dict[str, Tensor], _Fields]:
    """Read ``quantizers.safetensors`` of an ONNX sim.

    :raises CorruptFileError: the file was changed, cut short, or was not written by aimet_ext, or
        a range in it is none.
    """
    tensors, fields = read_sealed(folder / QUANTIZERS, _SCHEMA, _Fields)
    faults = quantizer_faults(tensors, fields.quantizers, form="{1}.{0}")
    refuse_faults(folder / QUANTIZERS, faults)
    return tensors, fields


def load_onnx(folder: Path, prefix: str, sim: Any = None) -> Any:
    """Rebuild an ONNX sim, see :func:`aimet_ext.load`.

    :param sim: Simulation of the same model, to be made what was exported.
    :raises ValueError: the sim that was given is one of another model.
    """
    tensors, fields = read_onnx_quantizers(folder)
    kinds: dict[str, dict[str, Any]] = {"range": {}, "sample": {}, "float": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        kinds[kind][name] = tensor
    floats = ((name, torch_array(tensor)) for name, tensor in kinds["float"].items())
    model = files.load_with(folder / f"{prefix}.onnx", floats)
    if sim is None:
        sample = {name: tensor.numpy() for name, tensor in kinds["sample"].items()}
        sim = build_described(model, fields.sim, sample=sample)
    else:
        files.copy_constants(model, sim.model.model)
    restore_sim(sim, kinds["range"], fields.quantizers)
    return sim


def _sample(adaptor: CalibrationWalks, dummy_input: Any) -> Arrays:
    """Return a batch as arrays by input name."""
    if dummy_input is None:
        raise TypeError("dummy_input must be a batch of the model's inputs by name, got None")
    (batch,) = adaptor.batches([dummy_input])
    return {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in batch.items()}


def _deviation(outputs: list[Any], expected: list[Any]) -> float:
    """Return the relative deviation of the float outputs."""
    floats = [i for i, two in enumerate(expected) if np.issubdtype(two.dtype, np.floating)]
    return deviation([outputs[i] for i in floats], [expected[i] for i in floats])
