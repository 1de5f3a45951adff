"""What HTP computes right: small graphs, compiled and run in its simulation, against the sim.

python benchmarks/htp_patterns.py            # writes the results and the page of the documents
python benchmarks/htp_patterns.py --render   # writes the page from the results that are there
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from htp_graphs import BUILDERS, Pattern, build_sim, feeds, qdq_model
from report import HERE, machine

from aimet_ext.core.objective import sqnr_db
from aimet_ext.integrations.qnn import HtpRejected, compile_htp

TARGETS = ("htp_v68", "htp_v69", "htp_v73", "htp_v75", "htp_v79", "htp_v81")
RESULTS = HERE / "results" / "htp_patterns.json"
PAGE = HERE.parent / "docs" / "htp_patterns.rst"
GOOD = {16: 50.0, 8: 30.0}  # dB, by bits of the activations
WRONG = 25.0
NOTABLE = 10.0
REFUSED = "refused"

BIASES = {
    None: "no bias",
    "float": "float bias",
    "int32": "int32 bias",
    "add": "Add of its own",
}
LAYERS = ("MatMul", "Gemm", "Conv")


def patterns() -> Iterator[Pattern]:
    """Every pattern of the table, in its order."""
    for weight, group in (
        ("8", "Weights of 8 bits, per channel"),
        ("4", "Weights of 4 bits, per channel"),
        ("LPBQ 32", "Weights in LPBQ, 4 bits, blocks of 32"),
        ("4 block 32", "Weights of 4 bits in blocks of 32, float scales"),
    ):
        for kind in LAYERS:
            for bias, text in BIASES.items():
                if bias == "add" and kind != "MatMul":
                    continue
                name = f"{'Conv 1×1' if kind == 'Conv' else kind}, {text}"
                yield Pattern(group=group, name=name, kind=kind, weight=weight, bias=bias)
    group = "LPBQ, other blocks and widths"
    for block in (16, 64, 128):
        for bias in (None, "add"):
            name = f"MatMul, blocks of {block}, {BIASES[bias]}"
            yield Pattern(group=group, name=name, kind="MatMul", weight=f"LPBQ {block}", bias=bias)
    lpbq = {"group": group, "weight": "LPBQ 32"}
    wide = {"bits": (8, 16)}
    yield Pattern(name="MatMul, 8 bits, scales of 8", kind="MatMul", settings=wide, **lpbq)
    yield Pattern(name="MatMul, constants left float", kind="MatMul", float_constants=True, **lpbq)
    relu = {"relu": True}
    yield Pattern(name="Gemm, then Relu", kind="Gemm", bias="float", settings=relu, **lpbq)
    yield Pattern(name="MatMul, activations of 8 bits", kind="MatMul", activation=8, **lpbq)
    group = "Other layers with weights"
    for kernel, groups, name in ((3, 1, "Conv 3×3"), (3, 256, "Conv 3×3, depthwise")):
        for weight in ("8", "4"):
            yield Pattern(
                group=group,
                name=f"{name}, {weight} bits, int32 bias",
                kind="Conv",
                weight=weight,
                bias="int32",
                settings={"kernel": kernel, "groups": groups},
            )
    for weight, text in (("8 tensor", "8 bits"), ("4 tensor", "4 bits"), ("16 tensor", "16 bits")):
        yield Pattern(group=group, name=f"MatMul, {text}, one range", kind="MatMul", weight=weight)
    yield Pattern(group=group, name="Gather, table of 16 bits", kind="Gather", bits={"table": 16})
    yield Pattern(group=group, name="Gather, table of 8 bits", kind="Gather", bits={"table": 8})
    yield from _activations()


def _activations() -> Iterator[Pattern]:
    group = "Activations of 8 bits"
    for kind in LAYERS:
        for bias in (None, "int32"):
            yield Pattern(
                group=group,
                name=f"{kind}, 8 bits, {BIASES[bias]}",
                kind=kind,
                bias=bias,
                activation=8,
            )
    group = "Products of two activations"
    pair = {"group": group, "kind": "two inputs"}
    turned = {"transposed": True}
    yield Pattern(name="16 by 16 bits", **pair)
    yield Pattern(name="16 by 16 bits, second one transposed", settings=turned, **pair)
    yield Pattern(name="16 by 8 bits", bits={"b": 8}, **pair)
    yield Pattern(name="8 by 8 bits", activation=8, **pair)
    yield Pattern(group=group, name="Attention, 16 bits", kind="attention")
    group = "Operators without weights"
    for kind in (
        *("Add", "Sub", "Mul", "Concat", "Softmax", "Sigmoid", "SiLU", "Gelu", "Tanh", "Relu"),
        *("Neg", "RMSNorm", "LayerNorm"),
    ):
        yield Pattern(group=group, name=kind, kind=kind)


def measure(pattern: Pattern) -> dict[str, Any]:
    """Build, compile and run one pattern on every target."""
    row: dict[str, Any] = {"group": pattern.group, "name": pattern.name, "bits": pattern.activation}
    for key, fitted in (("written", False), ("fitted", True)):
        model = BUILDERS[pattern.kind](pattern)
        feed = feeds(model, 2)
        try:
            sim = build_sim(pattern, model, fitted=fitted)
            expected = sim.session.run(None, feed)[0]
            forms = {t: qdq_model(pattern, sim, target=t, fitted=fitted) for t in TARGETS}
        except (AssertionError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            row[f"no_{key}"] = f"{type(error).__name__}: {error}"[:200]
            continue
        row[key] = {target: _run(form, target, feed, expected) for target, form in forms.items()}
    return row


def _run(model: Any, target: str, feed: Any, expected: Any) -> float | str:
    """dB of HTP against the simulation, or that HTP refuses the graph."""
    try:
        with compile_htp(model, target) as session:
            found = session.run(feed)[0]
    except HtpRejected:
        return REFUSED
    wide = expected.astype(np.float64)
    noise = float(((found - wide) ** 2).sum())
    return round(min(sqnr_db(float((wide**2).sum()), noise), 150.0), 1)


def verdict(values: dict[str, float | str], bits: int) -> str:
    """What most targets say, or the newer ones where as many say so; then what the others say."""
    words: dict[str, list[str]] = {}
    for target in sorted(values, reverse=True):
        words.setdefault(_word(values[target], bits), []).insert(0, target.removeprefix("htp_"))
    main = max(words, key=lambda word: len(words[word]))
    others = [f"{word} on {', '.join(on)}" for word, on in words.items() if word != main]
    return "; ".join([main, *others])


def _word(value: float | str, bits: int) -> str:
    if isinstance(value, str):
        return value
    return "wrong" if value < WRONG else "right" if value >= GOOD[bits] else "coarse"


HEAD = f"""\
.. This page is written by benchmarks/htp_patterns.py; change it there.

.. _htp-patterns:

#################
Graphs on the HTP
#################

A graph that HTP accepts may still be computed incorrectly. So small graphs were quantized with
``aimet_onnx``, written as QDQ graphs with AIMET's ``to_onnx_qdq``, compiled, and run in HTP's
simulation. Figures are the signal to noise ratio in dB of HTP against the quantization simulation,
on the same inputs.

Activations have 16 bits unless a row says otherwise. *right*: at least {GOOD[16]:.0f} dB, with
activations of 8 bits {GOOD[8]:.0f} dB. *coarse*: less. *wrong*: less than {WRONG:.0f} dB, most
often because a bias is lost. *refused*: HTP does not take every node.

Rows marked **fitted** are the same layer in the form that aimet_ext writes for HTP: layers
whose weights have blocks are a MatMul and an Add, a norm is one operator, and the second operand of
a product of two activations is signed, which architectures before v73 do not take. Without
such a row, the form makes no difference of {NOTABLE:.0f} dB.
"""


def render(content: dict[str, Any]) -> str:
    """The page of the documents."""
    head = ["Pattern", *(name.removeprefix("htp_") for name in TARGETS), "Verdict"]
    lines = [HEAD]
    group = None
    for row in content["rows"]:
        if row["group"] != group:
            group = row["group"]
            lines += ["", group, "=" * len(group), "", ".. csv-table::"]
            lines += [f"    :header: {', '.join(head)}"]
            lines += ["    :widths: 40 8 8 8 8 8 8 22", "    :class: figures", ""]
        if "written" not in row:
            cells = ["–"] * len(TARGETS)
            lines.append(_line(row["name"], cells, "AIMET does not write it"))
        for key, mark in (("written", ""), ("fitted", " **fitted**")):
            if key in row and (not mark or _differ(row)):
                values = row[key]
                name = f"…{mark}" if mark else row["name"]
                lines.append(
                    _line(name, [values[t] for t in TARGETS], verdict(values, row["bits"]))
                )
    versions = ", ".join(
        f"{name} {content['machine'][name]}" for name in PACKAGES if name in content["machine"]
    )
    lines += ["", f"Measured with {versions}.", ""]
    return "\n".join(lines)


def _differ(row: dict[str, Any]) -> bool:
    """Whether the fitted form does something for a pattern: HTP takes it or not, or 10 dB."""
    before, after = row.get("written", {}), row["fitted"]
    for target, value in after.items():
        old = before.get(target)
        if isinstance(value, str) or not isinstance(old, float | int):
            if value != old:
                return True
        elif abs(value - old) > NOTABLE:
            return True
    return False


PACKAGES = ("aimet-onnx", "onnxruntime", "onnxruntime-qnn")


def _line(name: str, cells: list[float | str], word: str) -> str:
    shown = [f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells]
    shown = ["–" if cell == REFUSED else cell for cell in shown]
    return "    " + ", ".join(f'"{cell}"' for cell in (name, *shown, word))


def main() -> int:
    """Measure, or render what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--only", default="", help="measure patterns with this in them anew")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.render:
        PAGE.write_text(render(json.loads(RESULTS.read_text("utf-8"))), "utf-8")
        return 0
    rows = []
    for pattern in patterns():
        if arguments.only and arguments.only not in f"{pattern.group} {pattern.name}":
            continue
        rows.append(measure(pattern))
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    if arguments.only:
        before = json.loads(arguments.results.read_text("utf-8"))["rows"]
        fresh = {(row["group"], row["name"]): row for row in rows}
        rows = [fresh.get((row["group"], row["name"]), row) for row in before]
    content = {"machine": machine(*PACKAGES), "rows": rows}
    arguments.results.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if arguments.results == RESULTS:
        PAGE.write_text(render(content), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
