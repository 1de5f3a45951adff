"""Olive's ``AimetQuantization`` pass with the techniques of this package.

Importing this module replaces the pass that Olive ships by :class:`AimetQuantization`, for the
workflows of this process. ``olive run --package-config`` does so with the file that
``aimet-ext olive-config`` writes, and so does a data config's ``user_script`` that imports it. A
workflow is written as for Olive's own pass; see :mod:`aimet_ext.integrations.olive_techniques`.

Olive goes on after most failures of a pass, and then ends well without a model. Here each of them
is an error, and mistakes in a workflow are found before any pass runs.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

from aimet_ext.errors import require

require("olive", "olive")

import onnx  # noqa: E402
from olive.common.config_utils import validate_config  # noqa: E402
from olive.common.onnx_io import get_kv_info  # noqa: E402
from olive.common.utils import StrEnumBase  # noqa: E402
from olive.data.config import DataConfig  # noqa: E402
from olive.hardware.accelerator import Device  # noqa: E402
from olive.hardware.constants import ExecutionProvider  # noqa: E402
from olive.model import ONNXModelHandler  # noqa: E402
from olive.model.utils import resolve_onnx_path  # noqa: E402
from olive.package_config import OlivePackageConfig  # noqa: E402
from olive.passes.onnx import aimet_quantization as shipped  # noqa: E402
from olive.passes.onnx.common import (  # noqa: E402
    model_has_adapters,
    model_proto_to_olive_model,
)
from olive.passes.pass_config import PassConfigParam  # noqa: E402
from pydantic import field_validator  # noqa: E402

import aimet_ext  # noqa: E402
from aimet_ext.integrations.olive_config import PASS  # noqa: E402
from aimet_ext.integrations.olive_techniques import (  # noqa: E402
    check_techniques,
    named_reports,
    reports_of,
    steps_of,
    with_defaults,
)
from aimet_ext.integrations.olive_widths import apply_widths, check_widths  # noqa: E402
from aimet_ext.registry import load  # noqa: E402
from aimet_ext.reporting.writing import write_run  # noqa: E402
from aimet_ext.sim.onnx.build import build_with  # noqa: E402
from aimet_ext.sim.onnx.files import name_nodes, qdq_model  # noqa: E402
from aimet_ext.sim.onnx.state import deviation, layer_biases, run, run_file, uncalibrated  # noqa: E402
from aimet_ext.sim.protocol import adapt  # noqa: E402

#: What lies beside the QDQ model and the files of :func:`aimet_ext.export`.
REPORT = "aimet_ext_report.json"

# Name of the QDQ model in Olive's cache. If the folder that Olive was started in has a file of that
# name, Olive takes that one in its place, to evaluate it or for the next pass.
_FILE = "quantized_by_aimet_ext.onnx"

# Deviation of outputs relative to their norm: absolute, and the fraction of the sim's own one.
_TOLERANCE, _FRACTION = 1e-4, 0.5
# Operators whose weights are quantized already.
_PACKED = {"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "QMoE"}
# Check of an order on a simulation, by its home as those of techniques.
_CHECK = "aimet_ext.techniques.order:check_steps"
# What Olive's engine raises again; it swallows all others.
_RAISED = (AssertionError, AttributeError, ImportError, TypeError, ValueError)


class PassFailed(ValueError):
    """The pass failed; a ``ValueError`` because Olive does not swallow these."""


class Bias(StrEnumBase):
    """Form of biases in the QDQ model."""

    AUTO = "auto"
    FLOAT = "float"
    INT32 = "int32"


class AimetQuantization(shipped.AimetQuantization):
    """Quantize an ONNX model in AIMET's simulation, by techniques of this package.

    Takes the configuration of Olive's own pass, and

    :param bias: ``"int32"``, ``"float"``, or ``"auto"``: int32 where the target is Qualcomm's
        runtime, which computes wrong with float biases of quantized layers.
    :param widths: grids of single layers: ``{"budget": 4.5, "choices": ["int4", "int8"]}`` for
        those that :func:`aimet_ext.assign_widths` chooses, with its other settings;
        ``{"overrides": {"*.down_proj": "int8"}}``; or the path of a file that the report of
        :func:`aimet_ext.assign_widths` saved. They are set before the first technique.
    :param save_encodings: write the float model, its encodings in AIMET's formats, learnt scales
        and reports beside the QDQ model; :func:`aimet_ext.load` makes the simulation of the folder
        again.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return {
            **super()._default_config(accelerator_spec),
            "bias": PassConfigParam(
                type_=Bias,
                default_value=Bias.AUTO,
                description="How the QDQ model holds biases: auto, float or int32.",
            ),
            "widths": PassConfigParam(
                type_=Union[str, dict, None],  # noqa: UP007 - Olive reads these
                default_value=None,
                description="Grids of single layers: a budget, overrides or a file.",
            ),
            "save_encodings": PassConfigParam(
                type_=bool,
                default_value=True,
                description="Save encodings, scales and reports beside the QDQ model.",
            ),
            # Part of the key under which Olive caches models: not the one of its own pass.
            "made_by": PassConfigParam(
                type_=str,
                default_value=f"aimet_ext {aimet_ext.__version__}",
                description="The package whose techniques are applied. Leave it as it is.",
            ),
        }

    @classmethod
    def get_config_params(
        cls, accelerator_spec: Any, config: Any = None, disable_search: bool | None = False
    ) -> Any:
        """Make Olive's configuration of the pass from a workflow's.

        :raises ValueError: an unknown parameter, which Olive ignores, or a wrong technique.
        """
        known = cls.default_config(accelerator_spec)
        unknown = sorted(set(config or ()) - set(known))
        if unknown:
            raise ValueError(
                f"{PASS} has no parameter {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(known)}"
            )
        return super().get_config_params(accelerator_spec, config, disable_search)

    @classmethod
    def _validators(cls) -> dict[str, Any]:
        def check(value: Any) -> Any:
            if isinstance(value, list):
                check_techniques(value)
            return value

        def check_own_widths(value: Any) -> Any:
            check_widths(value)
            return value

        # Olive builds the configs of all passes before it runs the first one.
        return {
            **super()._validators(),
            "check_techniques": field_validator("techniques", mode="after")(check),
            "check_widths": field_validator("widths", mode="after")(check_own_widths),
        }

    @classmethod
    def validate_config(cls, config: Any, accelerator_spec: Any) -> bool:
        """Check a configuration.

        :raises ValueError: it is wrong. Olive would prune the model and end without one.
        """
        check_techniques(config.techniques or ())
        check_widths(config.widths, config.techniques or ())
        if not super().validate_config(config, accelerator_spec):
            raise ValueError(
                f"{PASS} needs precision int4, int8 or int16, activation_type uint8, uint16 or "
                f"fp16 and quant_scheme min_max or tf_enhanced, got precision={config.precision}, "
                f"activation_type={config.activation_type}, quant_scheme={config.quant_scheme}, "
                f"tensor_precision_overrides={config.tensor_precision_overrides}"
            )
        return True

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> ONNXModelHandler:
        with _failing_loudly():
            return self._quantize(model, config, output_model_path)

    def _quantize(self, model: Any, config: Any, output_model_path: str) -> ONNXModelHandler:
        settings = config.model_dump()
        path = resolve_onnx_path(output_model_path, _FILE)
        with tempfile.TemporaryDirectory(prefix="olive_tmp") as folder:
            record = aimet_ext.Recorder()
            calibration = _Batches(config.data_config, model)
            with record.phase("make the simulation"):
                sim = _simulation(model, settings, folder, next(iter(calibration)))
            if settings["widths"] is not None:
                with record.phase("assign the widths"):
                    apply_widths(sim, settings["widths"], calibration)
            techniques = with_defaults(settings["techniques"] or ())
            load(_CHECK)(adapt(sim), steps_of(techniques))
            for technique in _with_references(sim, techniques, calibration, model):
                with record.phase(technique["name"].lower()):
                    sim = _apply(sim, technique, calibration, model)
            with record.phase("calibrate"):
                sim.compute_encodings(iter(calibration))
            _check_calibrated(sim)
            biases = self._int32_biases(settings["bias"])
            qdq = qdq_model(sim, export_int32_bias=biases)
            name_nodes(qdq)  # AIMET reads back one node a name
            if biases:
                _check_biases(sim, qdq)
            handler = model_proto_to_olive_model(
                qdq, path, config, force_model_dir=settings["save_encodings"]
            )
            del qdq
            batch = next(iter(calibration))
            _check_outputs(sim, model.model_path, handler.model_path, batch)
            if settings["save_encodings"]:
                bias: Literal["float", "int32"] = "int32" if biases else "float"
                prefix = f"{Path(model.model_path).stem}_float"
                made = Path(path).parent / "aimet_ext"
                with record.phase("export"):
                    aimet_ext.export(sim, made, prefix, batch, bias=bias, qdq=False)
                _write_reports(made, sim, record, model, settings)
                _add_files(made, handler, model)
        return handler

    def _int32_biases(self, bias: Any) -> bool:
        """Return True if biases are to be int32."""
        if bias == Bias.AUTO:
            target = self.accelerator_spec
            return (
                target.execution_provider == ExecutionProvider.QNNExecutionProvider
                or target.accelerator_type == Device.NPU
            )
        return bool(bias == Bias.INT32)


class _Batches:
    """Batches of a data config, made anew each time they are iterated over."""

    def __init__(self, data_config: Any, model: Any) -> None:
        self.data_config = validate_config(data_config, DataConfig)
        self.model_path, self.io_config = model.model_path, model.io_config

    def __iter__(self) -> Iterator[dict[str, Any]]:
        container = self.data_config.to_data_container()
        batches = iter(
            container.create_calibration_dataloader(
                model_path=self.model_path, io_config=self.io_config
            )
        )
        first = next(batches, None)
        if first is None:
            raise ValueError(
                f"data config {self.data_config.name!r} must give at least one batch, it gives none"
            )
        yield first
        yield from batches


def _simulation(model: Any, settings: dict[str, Any], folder: str, batch: dict[str, Any]) -> Any:
    """Build the simulation that Olive's own pass builds.

    :param batch: Inputs, run where types cannot be inferred, behind onnxruntime's operators.
    """
    if model_has_adapters(model.model_path):
        raise PassFailed(
            f"{model.model_path} holds LoRA adapters, which this pass does not quantize, and with "
            "them Olive's own returns the model as it is; extract the adapters first "
            "with Olive's ExtractAdapters, or merge them with MergeAdapterWeights"
        )
    proto = onnx.load(model.model_path)
    operators = {node.op_type for node in proto.graph.node}
    if "DynamicQuantizeLinear" in operators:
        raise PassFailed(f"{model.model_path}: a float model is required, it quantizes at run time")
    sim = build_with(
        proto,
        batch,
        param_type=shipped.precision_to_qtype(settings["precision"]),
        activation_type=shipped.precision_to_qtype(settings["activation_type"]),
        config_file=settings["config_file"],
        quant_scheme=str(settings["quant_scheme"]),
        providers=settings["calibration_providers"],
        path=folder,
    )
    if (packed := sorted(operators & _PACKED)) and not adapt(sim).weight_quantizers():
        raise PassFailed(
            f"{model.model_path}: float weights are required, but all are integers in its "
            f"{', '.join(packed)} already, which AIMET does not see; build the model in float, "
            "with ModelBuilder at precision fp32"
        )
    shipped._apply_precision_overrides(sim, settings["tensor_precision_overrides"] or {})
    if settings["op_types_to_exclude"]:
        shipped._exclude_op_types(sim, settings["op_types_to_exclude"])
    cache = get_kv_info(model.io_config)
    if settings["tie_kv_cache_io"] and cache and cache["present_to_past"]:
        shipped._tie_quantizers(sim, cache["present_to_past"])
    return sim


def _with_references(
    sim: Any, techniques: list[dict[str, Any]], calibration: _Batches, model: Any
) -> list[dict[str, Any]]:
    """Give techniques that need them the float model's outputs, while there is a float model."""
    found = []
    for technique in techniques:
        chosen = shipped.SUPPORTED_TECHNIQUES[technique["name"].lower()]
        if getattr(chosen, "requires_reference", False):
            data = _data(technique, calibration, model)
            top_k = technique.get("top_k", 256)
            technique = {**technique, "reference": aimet_ext.float_logits(sim, data, top_k=top_k)}
        found.append(technique)
    return found


def _data(technique: dict[str, Any], calibration: _Batches, model: Any) -> _Batches:
    """Return a technique's own data if it names some, else that of the pass."""
    own = technique.get("data_config")
    return calibration if own is None else _Batches(own, model)


def _apply(sim: Any, technique: dict[str, Any], calibration: _Batches, model: Any) -> Any:
    """Apply one technique, with its own data if it names some."""
    arguments = {key: value for key, value in technique.items() if key != "name"}
    chosen = shipped.SUPPORTED_TECHNIQUES[technique["name"].lower()]
    if chosen._requires_data():
        arguments["data_config"] = _data(technique, calibration, model)
    return chosen.apply(sim, **arguments)


def _check_calibrated(sim: Any) -> None:
    """Refuse quantizers that would silently be missing in the QDQ model.

    :raises PassFailed: one has no range.
    """
    empty = uncalibrated(sim)
    if empty:
        raise PassFailed(
            f"every quantizer needs a range after calibration, but {', '.join(empty[:3])} of "
            f"{len(empty)} such tensors has none; its node was never run by the calibration data"
        )


def _check_biases(sim: Any, qdq: onnx.ModelProto) -> None:
    """Compare int32 biases with what was asked.

    :raises PassFailed: a bias of a quantized layer stays float.
    """
    stored = {proto.name: proto.data_type for proto in qdq.graph.initializer}
    int32 = onnx.TensorProto.INT32
    left = [name for name, _ in layer_biases(sim) if stored.get(name, int32) != int32]
    if left:
        raise PassFailed(
            f"int32 biases were asked for, but {', '.join(left[:3])} of {len(left)} stay float: "
            "their layers' inputs are not quantized to integers; quantize activations, or set "
            '"bias": "float"'
        )


def _check_outputs(sim: Any, source: str, written: str, batch: dict[str, Any]) -> None:
    """Compare the QDQ model with the simulation on one batch.

    :raises PassFailed: they differ by more than values that are rounded the other way explain.
    """
    expected = run(sim, batch)
    error = deviation(run_file(source, batch), expected)
    found = deviation(run_file(written, batch), expected)
    if not found <= max(_TOLERANCE, _FRACTION * error):
        raise PassFailed(
            f"the QDQ model must compute what the simulation does, which deviates from the float "
            f"model by {error:.3g} of its outputs' norm, but deviates from it by {found:.3g}"
        )


def _write_reports(
    folder: Path, sim: Any, record: aimet_ext.Recorder, model: Any, settings: dict[str, Any]
) -> None:
    """Write the reports of the techniques, and that of the run."""
    (folder / REPORT).write_text(json.dumps(reports_of(sim), indent=2) + "\n", encoding="utf-8")
    reports = named_reports(sim)
    widths = reports.pop("assign_widths", None)
    kept = {name: str(settings[name]) for name in ("precision", "activation_type", "quant_scheme")}
    facts = {"model": Path(model.model_path).name, "recorder": record, "widths": widths}
    write_run(folder, sim, reports, {}, settings=kept, **facts)


def _add_files(export: Path, handler: ONNXModelHandler, source: Any) -> None:
    """Tell Olive which files belong to the model.

    Olive hands them on to later passes by their names alone, without folders: those of the export
    go beside the model too, where all of them together are an export again.
    """
    files = [file.rename(export.parent / file.name) for file in export.iterdir()]
    export.rmdir()
    attributes = dict(source.model_attributes or {})
    others = attributes.get("additional_files") or []
    attributes["additional_files"] = sorted({*others, *map(str, files)})
    handler.model_attributes = attributes


@contextlib.contextmanager
def _failing_loudly() -> Iterator[None]:
    """Turn errors that Olive would swallow into one that it raises."""
    try:
        yield
    except _RAISED:
        raise
    except Exception as error:
        raise PassFailed(f"{PASS} failed: {type(error).__name__}: {error}") from error


# The pass of this process from now on, also where Olive's own was imported before.
OlivePackageConfig._pass_modules[PASS.lower()] = AimetQuantization
_default = OlivePackageConfig.load_default_config().get_pass_module_config(PASS)
_default.set_class_variables(AimetQuantization)
