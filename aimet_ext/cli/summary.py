"""Summaries for people: techniques, grids and quality first, files last."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from aimet_ext.cli.output import table
from aimet_ext.drawing.page import size

WIDTH = 100


def summary(found: Mapping[str, Any]) -> str:
    """Return the findings of :func:`aimet_ext.artifact.inspect.inspect_export` as text."""
    width = max(map(len, found["files"]), default=0)
    files = [(f"  {name:<{width}}", size(e["bytes"])) for name, e in found["files"].items()]
    lines = [_lines(name, value) for name, value in _rows(found) if value]
    return "\n".join(
        [*lines, f"{len(files)} files, each of which agrees with its hash:", table(files)]
    )


def _lines(name: str, value: str) -> str:
    """Return a row, folded to :data:`WIDTH` columns."""
    indent = " " * 13
    text = textwrap.fill(value, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return f"{name:<12} {text.strip()}"


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
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
    counts = found.get("quantizers", {})
    for name in ("parameters", "activations"):
        of_name = counts.get(name, {})
        yield f"{name[:5]}. grids", ", ".join(f"{n} of {kind}" for kind, n in of_name.items())
    if counts:
        yield "quantizers", f"{counts['frozen']} frozen, {counts['without_range']} without a range"
    yield from _quality(found)
    pairs = found.get("scales", {}).get("pairs", {})
    yield "transforms", ", ".join(f"{n} of {kind}" for kind, n in pairs.items())
    for name, entry in found.get("encodings", {}).items():
        counted = ", ".join(
            f"{n} {key.replace('_', ' ')}" for key, n in entry.items() if key != "version"
        )
        yield "encodings", f"{name}: version {entry['version']}, {counted}"
    deviation = found.get("checks", {}).get("onnxruntime_relative_deviation")
    if deviation is not None:
        yield "checked", f"ONNX model in onnxruntime: {deviation:.1e} off, relative to the outputs"
    config = settings.get("config_file")
    yield "config", config if isinstance(config, str) else "of its own" if config else ""
    yield "made by", ", ".join(f"{name} {number}" for name, number in versions.items())
    yield "unlisted", ", ".join(found.get("unlisted", ()))


def _spec(spec: Mapping[str, Any] | None) -> str:
    """Return a grid in words: ``int4, PerChannel``."""
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
            "quality",
            (
                f"{name}: SQNR of the {report['units']}' outputs: median {middle:.1f} dB, lowest "
                f"{low:.1f} dB ({report['lowest']})"
            ),
        )
    if quality := found.get("quality"):
        yield "perplexity", " ".join(_perplexities(quality).split())
        yield "divergence", "; ".join(" ".join(line.split()) for line in _divergences(quality))


_STATES = (("rounding", "weights rounded to nearest"), ("quantized", "as exported"))


def quality_lines(quality: Mapping[str, Any]) -> str:
    """Return the perplexities and divergences that ``quantize`` measured, one a line."""
    lines = [_perplexities(quality)]
    if found := list(_divergences(quality)):
        lines += ["KL to the float model, its 99.9th percentile, changed predictions:", *found]
    return "\n".join(lines)


def _perplexities(quality: Mapping[str, Any]) -> str:
    float_ = quality["float"]
    rows = [
        (f"  {name}", f"{quality[key]:.4g}  {quality[key] / float_ - 1:+.1%}")
        for key, name in _STATES
    ]
    head = f"Perplexity on {quality['windows']} windows of {quality['text']}:"
    return f"{head}\n{table([('  float model', f'{float_:.4g}'), *rows])}"


def _divergences(quality: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each state that was measured."""
    for key, name in _STATES:
        if found := quality.get("divergence", {}).get(key):
            numbers = f"{found['kl']:.4g}  {found['kl_high']:.4g}  {found['flips']:.2%}"
            yield f"  {name:<26}  {numbers}"
