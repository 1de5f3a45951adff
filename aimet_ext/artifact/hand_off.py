"""From a simulation's export to the model that an NPU's compiler takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from aimet_ext.artifact.export import load
from aimet_ext.core.objective import outputs_sqnr
from aimet_ext.data.feeds import Feed, graph_feeds, run_feeds
from aimet_ext.files.encodings import entries, load_encodings
from aimet_ext.files.folders import atomic_path
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import SETTINGS, read_export
from aimet_ext.files.reading import read_json
from aimet_ext.onnx.index import GraphIndex
from aimet_ext.onnx.reading import read_model
from aimet_ext.onnx.rewrite.compilable import bound_masks, drop_casts, float_weights, make_static
from aimet_ext.onnx.rewrite.htp import fuse_rms_norms, set_apart, sign_second_operands
from aimet_ext.onnx.rewrite.kv import keep_keys_and_values
from aimet_ext.onnx.rewrite.rotate import is_rotated, rotate_queries_and_keys, turned_tensors
from aimet_ext.onnx.values import input_specs
from aimet_ext.sim.onnx import files
from aimet_ext.sim.onnx.build import build_target, multiplies_16_by_16
from aimet_ext.sim.onnx.ranges import (
    calibrate_added,
    put_encodings,
    put_rotations,
    quantize_activations,
)
from aimet_ext.sim.onnx.scores import clip_scores
from aimet_ext.sim.onnx.state import enabled_quantizers, only_these, run
from aimet_ext.sim.protocol import adapt

_CONFIG = "htp_v79"


@dataclass(frozen=True, eq=False)
class HandOff:
    """An export as a simulation of what an NPU computes.

    :param sim: ``aimet_onnx.QuantizationSimModel``; every quantizer has a range.
    :param folder: the export.
    :param prefix: name of its ONNX and encodings files.
    :param loaded: tensors whose range is that of the export.
    :param moved: encoded tensors that hold the values of one of those, moved.
    :param added: tensors that the export leaves float and the NPU does not; calibrated.
    :param tables: lookup tables with a scale for each row, on their grid, at 16 bits.
    :param kept: keys and values that have a width of their own.
    :param same_numbers: dB, outputs of the simulation with the exported ranges alone against the
        outputs of the simulation that was exported.
    :param sample: one batch, inputs by name.
    """

    sim: Any
    folder: Path
    prefix: str
    loaded: tuple[str, ...]
    moved: tuple[str, ...]
    added: tuple[str, ...]
    tables: tuple[str, ...]
    kept: tuple[str, ...]
    same_numbers: float
    sample: Mapping[str, np.ndarray[Any, Any]]


def hand_off(
    path: str | Path,
    dataloader: Any,
    *,
    sim: Any = None,
    config_file: str | Mapping[str, Any] | None = None,
    kv_bitwidth: int | None = None,
) -> HandOff:
    """Rebuild an export as an ``aimet_onnx`` simulation with all quantizers that an NPU needs.

    A torch simulation quantizes what modules take and return. An NPU computes nothing in float: it
    needs ranges of scores, rotary embeddings and residual sums too. Those are calibrated here, on
    top of the exported ranges, which stay as they are. Ranges of scores are shortened where their
    steps are wide and the Softmax gains by it.

    :param path: folder that :func:`aimet_ext.export` wrote, of a torch or an ONNX simulation.
    :param dataloader: batches of ids ``[batch, seq]`` or of inputs by name, of the shape that the
        ONNX file was exported with; the first one is the sample.
    :param sim: the simulation that was exported, if at hand; else it is loaded from the folder.
    :param config_file: AIMET's alias or content of the configuration that says which tensors are
        quantized; None: the one of the exported simulation.
    :param kv_bitwidth: bits of keys and values that are kept between calls; None: as the others.
    :raises ValueError: an encoding's tensor is not in the model, or batches do not fit it.
    :raises CorruptFileError: ``path`` is no export, or a file was changed.
    """
    folder = Path(path)
    manifest = read_export(folder)
    prefix = manifest["prefix"]
    encoded = entries(load_encodings(folder / f"{prefix}.encodings"))
    model = read_model(folder / f"{prefix}.onnx")
    batches = _batches(model, dataloader)
    source = sim if sim is not None else load(folder)
    (reference,) = run_feeds(adapt(source).runner, batches[:1])
    settings = read_json(folder / SETTINGS)["create_sim"] or {}
    ledger = Ledger.load(folder)
    model, kept = _prepared(model, encoded, batches[0], ledger, kv_bitwidth is not None)
    turned = turned_tensors(model)
    encoded = {name: entry for name, entry in encoded.items() if name not in turned}
    built = build_target(
        model,
        config_file or settings.get("config_file") or _CONFIG,
        activation_bits=_activation_bits(encoded),
        sample=batches[0],
    )
    loaded = put_encodings(built, encoded)
    with only_these(built, loaded.quantizers):
        output = run(built, batches[0])[0]
    if kv_bitwidth is not None:
        quantize_activations(built, dict.fromkeys(kept, kv_bitwidth))
    turns = put_rotations(built)
    added = [name for name in loaded.others(built) if name not in turns]
    calibrate_added(built, added, batches)
    clip_scores(built, added, batches)
    return HandOff(
        sim=built,
        folder=folder,
        prefix=prefix,
        loaded=loaded.quantizers,
        moved=loaded.moved,
        added=tuple(added),
        tables=loaded.tables,
        kept=tuple(kept),
        same_numbers=outputs_sqnr([torch.from_numpy(output)], [torch.from_numpy(reference)]),
        sample=batches[0],
    )


def write_qdq(source: Any, path: str | Path) -> Path:
    """Write the QDQ model that a compiler takes, in forms that HTP computes as the simulation does.

    Weights are integers, norms one operator each, second operands of MatMuls between activations
    signed; nodes have names of their own.

    :param source: a :class:`HandOff`, or an ``aimet_onnx`` simulation with all ranges.
    :param path: ONNX file; weights of more than 2 GiB go to ``{name}.data`` beside it. If
        writing fails, what was there before stays.
    :returns: the path.
    :raises RuntimeError: a weight with a quantizer is still float.
    """
    path = Path(path)
    sim = source.sim if isinstance(source, HandOff) else source
    model = files.qdq_model(sim)
    drop_casts(model)
    fuse_rms_norms(model)
    if multiplies_16_by_16(sim):
        sign_second_operands(model)
    files.name_nodes(model)
    used = enabled_quantizers(sim)
    left = [name for name in float_weights(model) if name.removesuffix("_qdq") in used]
    if left:
        raise RuntimeError(
            f"{path.name}: weights with a quantizer must be integers, but these are float: "
            f"{', '.join(left[:5])}"
        )
    with atomic_path(path) as temporary:
        files.save_model(model, temporary, external=False)
        weights = temporary.with_name(f"{path.name}.data")
        if weights.exists():  # which an older model must not be left with
            path.unlink(missing_ok=True)
            weights.replace(path.with_name(weights.name))
    return path


def _batches(model: onnx.ModelProto, dataloader: Any) -> list[Feed]:
    """Return batches of the graph's shape, all of one shape."""
    found = graph_feeds(dataloader, input_specs(GraphIndex(model.graph).inputs))
    shapes = {tuple(array.shape for array in batch.values()) for batch in found}
    if len(shapes) > 1:
        raise ValueError(
            "batches of one shape are required, as an NPU's graph has one, got "
            f"{', '.join(map(str, sorted(shapes)[:3]))}; cut the text into windows of one length"
        )
    return found


def _prepared(
    model: Any,
    encoded: Mapping[str, Mapping[str, Any]],
    sample: Mapping[str, np.ndarray[Any, Any]],
    ledger: Ledger,
    keep: bool,
) -> tuple[Any, list[str]]:
    """Return the float model in forms that an NPU computes right, and its keys and values."""
    model = make_static(model, {name: array.shape for name, array in sample.items()}, encoded)
    bound_masks(model)
    set_apart(model, {name: entry["enc_type"] for name, entry in encoded.items()})
    if ledger.rotates_keys and not is_rotated(model):  # the graph of an ONNX sim is its own
        rotate_queries_and_keys(model, ledger.key_maps)
    return model, keep_keys_and_values(model) if keep else []


def _activation_bits(encoded: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the most frequent width of the tensors that have one range."""
    bits = [entry["bw"] for entry in encoded.values() if entry["enc_type"] == "PER_TENSOR"]
    return max(set(bits), key=bits.count) if bits else 16
