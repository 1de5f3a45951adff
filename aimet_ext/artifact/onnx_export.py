"""An ONNX sim written to a folder, each file read back and compared, and rebuilt from it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import write_manifest
from aimet_ext.files.names import LEDGER, LEDGER_SCHEMA, ONNX_SCHEMA, QUANTIZERS, SETTINGS
from aimet_ext.files.scales import write_scales
from aimet_ext.files.sealed import read_sealed, write_sealed
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.integrity.fingerprints import write_fingerprints
from aimet_ext.onnx.index import stored_values
from aimet_ext.onnx.values import to_torch, torch_array
from aimet_ext.sim.onnx import files
from aimet_ext.sim.onnx.build import build_described, describe_sim
from aimet_ext.sim.onnx.readback import (
    deviation,
    differences,
    read_encodings,
    read_qdq,
    refresh,
    run,
    run_file,
)
from aimet_ext.sim.onnx.state import enabled_quantizers, restore_sim, sim_state, uncalibrated
from aimet_ext.sim.protocol import CalibrationWalks, FloatWeights, SimAdaptor, adapt

__all__ = ["export_onnx", "load_onnx"]

# Deviation of outputs relative to their norm: of weights alone, and where activations are rounded,
# of which another order of sums moves some by a step. In any case less than the sim's own
# deviation from the float model.
_TOLERANCE, _ROUNDED = 1e-4, 1e-3

Arrays = dict[str, Any]


def export_onnx(
    adaptor: SimAdaptor,
    path: str | Path,
    prefix: str,
    dummy_input: Any,
    *,
    tokenizer: Any,
    aimet_keys: bool,
    bias: Literal["float", "int32"],
    qdq: bool,
    external_data: bool | None,
) -> dict[str, Any]:
    """Write an ONNX sim to a folder, see :func:`aimet_ext.export`."""
    sim = adaptor.sim
    sample = _sample(adaptor, dummy_input)
    empty = uncalibrated(sim)
    if empty:
        raise ValueError(
            f"every quantizer needs a range before export, but {_some(empty)} "
            f"{'have' if len(empty) > 1 else 'has'} none; run sim.compute_encodings first"
        )
    wider = files.containers(sim)
    unfit = files.unfit_for_qdq(sim, wider) if qdq else []
    if unfit:
        raise ValueError(
            f"a QDQ model cannot hold {_some(unfit)}; give these tensors a width of 4, 8 or 16 "
            "bits in float32, or leave the QDQ model out with qdq=False"
        )
    ledger = adaptor.ledger or Ledger(_hash(adaptor))
    with adaptor.preserved_state(), replace_folder(path) as folder:
        writer = _Writer(adaptor, folder, prefix, sample, wider)
        writer.write_float(external_data)
        writer.write_encodings(bias == "int32")
        if qdq:
            writer.write_qdq(bool(external_data))
        write_scales(folder, ledger, aimet_keys=aimet_keys)
        writer.write_state(ledger)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return write_manifest(
            folder,
            "export",
            framework="onnx",
            prefix=prefix,
            model={"loads_in_transformers": False, "tied": {}, "tokenizer": tokenizer is not None},
            settings=adaptor.settings,
            techniques=[{**vars(run), "modules": list(run.modules)} for run in ledger.runs],
            origin=ledger.origin,
            seeds={"torch": torch.initial_seed()},
            bias=bias,
            containers={n: [enabled_quantizers(sim)[n].bitwidth, b] for n, b in wider.items()},
            checks=writer.checks,
            **write_fingerprints(folder, prefix, {}),
        )


def load_onnx(folder: Path, prefix: str, settings: dict[str, Any] | None, sim: Any = None) -> Any:
    """Rebuild an ONNX sim, see :func:`aimet_ext.load`.

    :param settings: Settings that the sim carries.
    :param sim: Simulation of the same model, to be made what was exported.
    :raises ValueError: the sim that was given is one of another model.
    """
    tensors, fields = read_sealed(folder / QUANTIZERS, ONNX_SCHEMA)
    kinds: dict[str, dict[str, Any]] = {"range": {}, "sample": {}, "float": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        kinds[kind][name] = tensor
    floats = ((name, torch_array(tensor)) for name, tensor in kinds["float"].items())
    model = files.load_with(folder / f"{prefix}.onnx", floats)
    if sim is None:
        sample = {name: tensor.numpy() for name, tensor in kinds["sample"].items()}
        sim = build_described(model, json.loads(fields["sim"]), sample=sample)
    else:
        files.copy_constants(model, sim.model.model)
    restore_sim(sim, kinds["range"], json.loads(fields["quantizers"]))
    tensors, fields = read_sealed(folder / LEDGER, LEDGER_SCHEMA)
    adaptor = adapt(sim)
    adaptor.ledger = Ledger.from_tensors(tensors, json.loads(fields["ledger"]))
    adaptor.settings = settings
    return sim


class _Writer:
    """Writer of the files of one export, each compared with the sim before the next one."""

    def __init__(
        self,
        adaptor: SimAdaptor,
        folder: Path,
        prefix: str,
        sample: Arrays,
        wider: Mapping[str, int],
    ) -> None:
        self.adaptor, self.sim = adaptor, adaptor.sim
        self.folder, self.prefix, self.sample, self.wider = folder, prefix, sample, wider
        self.model_path = folder / f"{prefix}.onnx"
        self.newer = folder / f"{prefix}.2.0.0.encodings"
        self.described = describe_sim(self.sim)
        self.rounded = dict(files.quantized_constants(self.sim, wider)) if wider else {}
        refresh(self.sim)  # a technique, or the user, may have written to the weights
        self.outputs = run(self.sim, sample)
        with adaptor.disabled_quantizers():
            error = _deviation(self.outputs, run(self.sim, sample))
        used, constants = enabled_quantizers(self.sim), self._mine()
        alone = all(name in constants for name in used)
        self.limit = max(_TOLERANCE if alone else _ROUNDED, error)
        self.checks: dict[str, Any] = {
            "quantization_error": error,
            "float16_casts_only_in_1.0.0": files.float_tensors(self.sim),
            "lpbq_as_blocks_in_2.0.0": files.lpbq_as_blocks(self.sim, wider),
        }

    def write_float(self, external: bool | None) -> None:
        """Write the float model; weights of a width that ONNX lacks lie on their grid."""
        files.save_float_model(self.sim, self.model_path, self.rounded, external=external)
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
                f"{_some(faults)}"
            )
        self.checks["constants_equal"] = len(mine)

    def write_encodings(self, int32_biases: bool) -> None:
        """Write encodings of both versions, and load each into a new sim of the float model."""
        for version, name in (("1.0.0", ""), ("2.0.0", ".2.0.0")):
            path = self.folder / f"{self.prefix}{name}.encodings"
            files.write_encodings(self.sim, path, version, self.wider, int32_biases=int32_biases)
            encoded = entries(load_encodings(path))
            if int32_biases and (missing := files.missing_int32_biases(self.sim, encoded)):
                raise ValueError(
                    'bias="int32" needs a layer\'s input quantized to integers, as the scale of a '
                    "bias is that of the input times that of the weight; it cannot be had for "
                    f'{_some(missing)}: quantize the inputs, or take bias="float"'
                )
            other = build_described(
                onnx.load(str(self.model_path)), self.described, sample=self.sample
            )
            read_encodings(self.sim, path, other)
            self._compare(path.name, other)
            del other  # a second model in memory, before the next one is built
            self.checks[f"encodings_{version}"] = len(encoded)

    def write_qdq(self, external: bool) -> None:
        """Write the QDQ model, load it into a new sim, and run it in onnxruntime as it is."""
        path = self.folder / f"{self.prefix}.qdq.onnx"
        values = files.quantized_constants(self.sim)
        model = files.load_with(self.model_path, values)
        files.save_qdq_model(model, load_encodings(self.newer), path, external=external)
        del model
        other = build_described(onnx.load(str(path)), self.described, sample=self.sample, qdq=True)
        read_qdq(self.sim, other)
        self._compare(path.name, other, files.integer_scales(self.sim, self.wider))
        del other
        deviation = self._check_deviation(
            f"{path.name} in onnxruntime", run_file(path, self.sample)
        )
        self.checks["onnxruntime"] = metadata.version("onnxruntime")
        self.checks["onnxruntime_relative_deviation"] = deviation

    def write_state(self, ledger: Ledger) -> None:
        """Write quantizers, float weights, sample, ledger and settings, for this package alone."""
        ranges, described = sim_state(self.sim)
        tensors = {f"range.{name}": tensor for name, tensor in ranges.items()}
        tensors.update({f"sample.{n}": torch.from_numpy(a) for n, a in self.sample.items()})
        mine = self._mine()
        for name, values in self.rounded.items():
            value = onnx.numpy_helper.to_array(mine[name])
            if not np.array_equal(value, values):
                tensors[f"float.{name}"] = to_torch(value)
        fields = {"quantizers": described, "sim": self.described}
        write_sealed(self.folder / QUANTIZERS, ONNX_SCHEMA, tensors, fields)
        tensors, fields = ledger.to_tensors()
        write_sealed(self.folder / LEDGER, LEDGER_SCHEMA, tensors, {"ledger": fields})
        text = json.dumps({"create_sim": self.adaptor.settings}, indent=2)
        (self.folder / SETTINGS).write_text(text + "\n", encoding="utf-8")

    def _mine(self) -> dict[str, Any]:
        return stored_values(self.sim.model.model.graph)

    def _compare(self, name: str, other: Any, last_bit: Collection[str] = ()) -> None:
        faults = differences(self.sim, other, last_bit=last_bit)
        if faults:
            raise RuntimeError(
                f"{name}, read back by AIMET, must quantize as the sim does, but {_some(faults)}"
            )
        deviation = self._check_deviation(f"{name}, read back by AIMET,", run(other, self.sample))
        self.checks[f"{name}_relative_deviation"] = deviation

    def _check_deviation(self, name: str, outputs: list[Any]) -> float:
        deviation = _deviation(outputs, self.outputs)
        if not deviation <= self.limit:
            raise RuntimeError(
                f"{name} must compute what the sim does to {self.limit:.3g} of its outputs' norm, "
                f"but deviates by {deviation:.3g}"
            )
        return deviation


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


def _hash(adaptor: FloatWeights) -> str:
    """Return a hash of the weights of a sim that no technique has changed."""
    state = adaptor.float_state()
    return hash_tensors((name, state[name]) for name in sorted(state))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
