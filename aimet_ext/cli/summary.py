"""Summaries for people: techniques, grids and quality first, files last."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimet_ext.cli.output import table
from aimet_ext.drawing.page import size

if TYPE_CHECKING:
    from aimet_ext.recipes.recipe import Recipe

WIDTH, _INDENT = 100, 14


def summary(found: Mapping[str, Any]) -> str:
    """Return the findings of :func:`aimet_ext.artifact.inspect.inspect_export` as text."""
    rows = _of_verification(found) if found["kind"] == "verified" else _of_export(found)
    made = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    also = [("made by", made), ("unlisted", ", ".join(found.get("unlisted", ())))]
    files = [(f"  {name}", size(each["bytes"])) for name, each in found["files"].items()]
    head = f"{len(files)} files, each of which agrees with its hash:"
    return "\n".join([*laid_out([*rows, *also]), head, *([table(files)] if files else [])])


def laid_out(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> Iterator[str]:
    """Yield rows of a name and a text, each text folded beside its name; empty ones are left out.

    A name that the row before has too is not repeated. A text of several lines stays as it is.
    """
    before = ""
    for name, value in rows:
        if not value:
            continue
        lines = value.splitlines() if "\n" in value else textwrap.wrap(value, WIDTH - _INDENT)
        for number, line in enumerate(lines):
            shown = name if number == 0 and name != before else ""
            yield f"{shown:<{_INDENT - 1}} {line}".rstrip()
        before = name


def _of_export(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    versions = found["versions"]
    made = "onnx" if found.get("framework") == "onnx" else "torch"
    of = f" of a simulation of aimet-{made} {versions.get(f'aimet-{made}', '')}"
    yield "kind", f"{found['kind']}{of if found['kind'] == 'export' else ''}"
    runs = found.get("techniques") or found.get("scales", {}).get("techniques", [])
    names = [run if isinstance(run, str) else run["technique"] for run in runs]
    yield "techniques", ", then ".join(names) or "none: rounding to nearest"
    settings = found.get("settings") or {}
    for name in ("weights", "lm_head", "embedding", "activations"):
        if name in settings:
            spec = _spec(settings[name])
            yield name, spec.partition(",")[0] if name == "activations" else spec
    if overrides := settings.get("overrides"):
        yield "overrides", ", ".join(f"{name}: {_spec(spec)}" for name, spec in overrides.items())
    config = settings.get("config_file")
    of_its_own = "a configuration of its own" if config else ""
    yield "target", config if isinstance(config, str) else of_its_own
    yield from _quantizers(found.get("quantizers", {}))
    yield from _quality(found)
    pairs = found.get("scales", {}).get("pairs", {})
    yield "transforms", ", ".join(f"{n} of {kind}" for kind, n in pairs.items())
    yield from _encodings(found)
    deviation = found.get("checks", {}).get("onnxruntime_relative_deviation")
    if deviation is not None:
        yield "checked", f"ONNX model in onnxruntime: {deviation:.1e} off, relative to the outputs"


def _of_verification(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a folder holds that ``aimet-ext verify --output`` wrote."""
    yield "kind", f"files for {found['target']} that verify built of the export {found['export']}"
    verdict = "passed" if found["passed"] else "FAILED, see verify.json"
    yield "verified", f"{verdict}, on {found['backend']}"
    roles = {
        ".qdq.onnx": "with all quantizers of the target",
        f".{found['target']}.onnx": "the compiled model, for onnxruntime-qnn",
        "_qnn.bin": "context binary: the compiled model itself, for QNN",
    }
    for name in found["files"]:
        for ending, role in roles.items():
            if name.endswith(ending):
                yield "for the target", f"{name}: {role}"
    yield from _encodings(found)


def _quantizers(counts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, of in (("parameters", "of parameters"), ("activations", "of activations")):
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts.get(name, {}).items())
        yield "quantizers", f"{of}: {kinds}" if kinds else ""
    if counts:
        left = counts["without_range"]
        ranges = f"{left} have no range yet" if left else "all have a range"
        yield "quantizers", f"{counts['frozen']} frozen by techniques; {ranges}"


def _encodings(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    words = {
        "encodings": "tensors",
        "param_encodings": "parameters",
        "activation_encodings": "activations",
    }
    for name, entry in found.get("encodings", {}).items():
        counted = ", ".join(f"{entry[key]} {word}" for key, word in words.items() if key in entry)
        yield "encodings", f"{name}: {counted}, format {entry['version']}"


def _spec(spec: Mapping[str, Any] | None) -> str:
    """Return a grid in words: ``int4, per_channel``."""
    if spec is None:
        return "float"
    grid = dict(spec["granularity"])
    more = ", ".join(f"{name}={value}" for name, value in grid.items() if name != "type")
    kind = "int" if spec["symmetric"] else "uint"
    granularity = {"PerChannel": "per_channel", "PerTensor": "per_tensor"}.get(
        grid["type"], grid["type"]
    )
    return f"{kind}{spec['bitwidth']}, {granularity}{f' ({more})' if more else ''}"


def _quality(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, report in found.get("reports", {}).items():
        low, middle = report["lowest_sqnr_db"], report["median_sqnr_db"]
        yield (
            "SQNR",
            (
                f"{name}, of the {report['units']}: median {middle:.1f} dB, lowest "
                f"{low:.1f} dB ({report['lowest']})"
            ),
        )
    if quality := found.get("quality"):
        yield "quality", quality_lines(quality)


def technique_lines(reports: Mapping[str, Any]) -> list[str]:
    """Return the outcome of techniques: a summary, the worst layers, and what was noted."""
    from aimet_ext.reporting.techniques import technique_notes, technique_results
    from aimet_ext.reporting.text import remarks, techniques

    lines = techniques(technique_results(reports))
    said = (technique_notes(reports, kind) for kind in ("notes", "infos"))
    return [*lines, *remarks(*said)]


def quality_lines(quality: Mapping[str, Any]) -> str:
    """Return the perplexities and divergences that ``quantize`` measured, as a table."""
    from aimet_ext.reporting.parts import STATES, Quality, StateQuality
    from aimet_ext.reporting.text import quality_table

    divergence = quality.get("divergence", {})
    states = {
        name: StateQuality(perplexity=quality[name], **divergence.get(name, {}))
        for name in STATES
        if name in quality
    }
    measured = Quality(
        text=quality["text"],
        windows=quality["windows"],
        states=states,
        tokens=quality.get("seq_length", 0),  # of an export of before: not known
    )
    return "\n".join(quality_table(measured))


def next_command(model: Path, output: Path, recipe: Recipe) -> str:
    """Return the command that checks what ``quantize`` wrote, on the text that it scored.

    What no HTP computes, with float activations or sizes that are free, is scored instead.

    :param model: Model that was quantized.
    :param output: Folder that was written.
    """
    from aimet_ext.cli.graphs import ARRAYS, fixed_shape, is_graph
    from aimet_ext.models.cache import model_name
    from aimet_ext.verification.verify import target_of

    name, plan = model_name(model), recipe.calibration
    reference = ["--reference", name if "/" in name else str(model)]
    on_text = not plan.files[0].lower().endswith(ARRAYS)
    size, length = fixed_shape(model) if is_graph(model) else (1, plan.seq_length)
    if recipe.activations == "none" or size != 1 or length is None:
        scored = ["evaluate", str(output), *reference] if on_text else ["inspect", str(output)]
        return shlex.join(["aimet-ext", *scored])
    words = ["aimet-ext", "verify", str(output), "--target", target_of(output).name]
    return shlex.join([*words, *([] if is_graph(model) else reference)])
