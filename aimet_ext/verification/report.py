"""The measures of a verification, and its report as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from aimet_ext.core.objective import outputs_sqnr
from aimet_ext.data.batches import token_ids, token_mask
from aimet_ext.data.feeds import Feed
from aimet_ext.errors import Finding
from aimet_ext.evaluation.perplexity import perplexity_of
from aimet_ext.files.folders import in_words, replace_file

Status: TypeAlias = Literal["passed", "failed", "not run"]
_LAYERS_SHOWN = 8
_NO_REFERENCE = """\
  (quantizers off: the export with float activations and the weights that the techniques left; not
  the original model: --reference MODEL, in Python reference=model, compares with that)"""
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits of a verification; ratios in dB are signal to noise, of sums of squares.

    :param margin_db: Margin by which the device must be nearer to the sim than the sim to float …
    :param enough_db: … or the ratio of the device to the sim that is enough in any case.
    :param same_db: Ratio of the ONNX sim, with the quantizers of the exported sim, to that sim;
        30 dB above sim against float is enough too.
    :param layer_db: Ratio of every layer on the device to the same layer of the ONNX sim; a
        difference of less than a step of the output's grid is accepted in any case.
    :param top1: Share of tokens whose largest logit is the sim's. Near-ties do not count against
        it: tokens where the sim's two logits are nearer than an error of ``output_db`` tells apart.
    :param perplexity: Largest relative difference from the sim's perplexity.
    """

    margin_db: float = 15.0
    enough_db: float = 40.0
    same_db: float = 60.0
    layer_db: float = 25.0
    top1: float = 0.99
    perplexity: float = 0.005

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if math.isnan(value):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.top1 <= 1:
            raise ValueError(f"top1 must be a share from 0 to 1, got {self.top1!r}")

    def near_enough(self, sqnr_db: float, error_steps: float | None) -> bool:
        """Return whether a layer on the device is near enough to the sim's."""
        return sqnr_db >= self.layer_db or (error_steps is not None and error_steps < 1)

    def output_db(self, sim_float_db: float) -> float:
        """Return the ratio that the device's outputs must reach against the sim's."""
        return min(self.enough_db, sim_float_db + self.margin_db)

    def flips_allowed(self, tokens: int) -> int:
        """Return the number of tokens whose largest logit may be another than the sim's."""
        allowed = math.floor((1 - self.top1) * tokens + 1e-9)
        return max(1, allowed) if self.top1 < 1 else 0

    def hand_off_db(self, sim_float_db: float) -> float:
        """Return the ratio that the ONNX sim's outputs must reach against the exported sim's."""
        return min(self.same_db, sim_float_db + 30.0)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of one step of a verification.

    :param name: Name of the step.
    :param status: Result; ``"not run"`` if an earlier step left nothing to work with.
    :param detail: Finding in a few words.
    :param seconds: Duration.
    """

    name: str
    status: Status
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LayerCheck:
    """One layer on the device against the same one of the ONNX sim, on the first window.

    :param name: Name of the module, or else of the operator.
    :param node: Name of the operator in the QDQ model.
    :param op_type: Type of the operator.
    :param sqnr_db: Signal to noise ratio of its quantized output.
    :param error_steps: Root of the mean squared difference, in steps of that output's grid.
    """

    name: str
    node: str
    op_type: str
    sqnr_db: float
    error_steps: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measurements over all windows; None where there is nothing to measure.

    :param device_sim_db: Ratio of the device's outputs to those of the exported sim.
    :param device_onnx_db: Ratio to the ONNX sim, which has the device's quantizers too.
    :param sim_float_db: Ratio of the sim to the float model: the original where it was given, else
        the export with its quantizers off.
    :param same_numbers_db: Ratio of the ONNX sim with exactly the sim's quantizers to the sim.
    :param top1: Share of tokens whose largest logit on the device is the sim's.
    :param perplexity_device: Perplexity on the windows, computed by the device.
    :param perplexity_sim: Perplexity of the sim.
    :param perplexity_float: Perplexity of that float model.
    """

    device_sim_db: float | None = None
    device_onnx_db: float | None = None
    sim_float_db: float | None = None
    same_numbers_db: float | None = None
    top1: float | None = None
    perplexity_device: float | None = None
    perplexity_sim: float | None = None
    perplexity_float: float | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Result of :func:`aimet_ext.verify`; ``print`` shows a table.

    :param folder: Folder of the export.
    :param target: Name of the target, for example ``"htp_v75"``.
    :param reference: True if the original model was given; false if the float model of the measures
        is the export itself with its quantizers off.
    :param backend: Backend of the comparison: ``"HTP simulation"``, or ``"onnxruntime CPU"``, which
        says nothing about the target.
    :param data: Description of the inputs.
    :param steps: Results of the steps, in order.
    :param findings: Faults, each with its remedy.
    :param hints: Observations that are not faults.
    :param measures: Measurements at the output.
    :param layers: Comparisons of the layers, in the order of computation.
    :param first_divergence: Name of the layer that loses most on the way to the first one below the
        threshold: that layer or one upstream of it; None if no layer is below.
    :param cause: Cause of the divergence, None if unknown.
    :param fallbacks: Operators that the target did not take.
    :param added: Quantizers that only the device needs, calibrated on the data.
    :param files: Files that were written to the output folder.
    :param thresholds: Limits of this verification.
    :param versions: Versions of the packages that computed.
    """

    folder: str
    target: str
    reference: bool = False
    backend: str = "none"
    data: str = ""
    steps: tuple[StepResult, ...] = ()
    findings: tuple[Finding, ...] = ()
    hints: tuple[Finding, ...] = ()
    measures: Measures = field(default_factory=Measures)
    layers: tuple[LayerCheck, ...] = ()
    first_divergence: str | None = None
    cause: str | None = None
    fallbacks: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if every step passed and there is no finding."""
        return not self.findings and all(step.status == "passed" for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values, with ``passed``; infinite ratios are ``"Infinity"``."""
        found: dict[str, Any] = in_words(self.to_dict())
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, with ``passed``."""
        return {"passed": self.passed, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file, atomically."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False)
        replace_file(path, (text + "\n").encode())

    def __str__(self) -> str:
        lines = [f"{self.folder} for {self.target}, on {self.backend}"]
        if self.data:
            lines.append(self.data)
        width = max((len(step.name) for step in self.steps), default=0)
        lines += [
            f"  {s.name:<{width}}  {s.status:<7} {s.seconds:7.1f} s  {s.detail}".rstrip()
            for s in self.steps
        ]
        lines += self._numbers()
        if self.measures.sim_float_db is not None and not self.reference:
            lines.append(_NO_REFERENCE)
        lines += self._weakest()
        if self.first_divergence is not None:
            why = self.cause or "no known cause"
            lines.append(f"first layer that diverges: {self.first_divergence}: {why}")
        lines += [f"hint: {finding}" for finding in self.hints]
        lines += [f"FAULT {finding}" for finding in self.findings]
        lines.append(self.verdict)
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """Verdict in one sentence."""
        if not self.passed:
            count = len(self.findings)
            return f"FAILED: {count} {'fault' if count == 1 else 'faults'}"
        if self.backend.startswith("onnxruntime CPU"):
            return f"passed on the CPU; nothing was run for {self.target}"
        return f"passed for {self.target}"

    def _numbers(self) -> list[str]:
        found, decibels, number = self.measures, "{:.1f} dB", "{:.4f}"
        float_model = "the original model" if self.reference else "quantizers off"
        with_it = "of the original model" if self.reference else "with quantizers off"
        rows = {
            "device against sim": (found.device_sim_db, decibels),
            "device against ONNX sim": (found.device_onnx_db, decibels),
            f"sim against {float_model}": (found.sim_float_db, decibels),
            "ONNX sim against sim": (found.same_numbers_db, decibels),
            "top-1 agreement": (found.top1, "{:.2%}"),
            "perplexity on the device": (found.perplexity_device, number),
            "perplexity of the sim": (found.perplexity_sim, number),
            f"perplexity {with_it}": (found.perplexity_float, number),
        }
        shown = {
            name: form.format(value) for name, (value, form) in rows.items() if value is not None
        }
        width = max([30, *(len(name) + 2 for name in shown)])
        return [f"  {name:<{width}}{value:>10}" for name, value in shown.items()]

    def _weakest(self) -> list[str]:
        if not self.layers:
            return []
        shown = sorted(self.layers, key=lambda layer: layer.sqnr_db)[:_LAYERS_SHOWN]
        head = (
            f"weakest {len(shown)} of {len(self.layers)} operators, on the first window, against "
            "the ONNX sim:"
        )
        return [head, *(f"  {layer.sqnr_db:7.1f} dB  {layer.name}" for layer in shown)]


def array_sqnr(value: Any, target: Any) -> float:
    """Return the signal to noise ratio in dB of an array or a list of arrays against a target."""
    values, targets = ([a] if isinstance(a, np.ndarray) else list(a) for a in (value, target))
    return outputs_sqnr(map(torch.from_numpy, values), map(torch.from_numpy, targets))


@dataclass(frozen=True, kw_only=True)
class TopOne:
    """Comparison of the largest logits of all tokens that are no padding.

    :param tokens: Tokens compared.
    :param margins: Of each token whose largest logit is another: the difference of the target's
        two logits, in root mean squares of all the target's logits.
    """

    tokens: int
    margins: tuple[float, ...]

    @property
    def agreement(self) -> float:
        """Share of tokens whose largest logit is at the same place."""
        return 1 - len(self.margins) / self.tokens

    def beyond(self, noise_db: float) -> list[float]:
        """Return the margins that noise of a ratio does not account for.

        Two logits, each with that noise, differ by more than three standard deviations.
        """
        return [m for m in self.margins if not m <= 3 * math.sqrt(2) * 10 ** (-noise_db / 20)]


def top_one(
    outputs: Sequence[Array], targets: Sequence[Array], feeds: Sequence[Feed]
) -> TopOne | None:
    """Compare the places of the largest logits, masked tokens left out.

    None where the outputs are no logits ``[batch, seq, vocab]`` or ``[batch, classes]``, or no
    token counts.
    """
    tokens, squares, numbers = 0, 0.0, 0
    margins: list[Array] = []
    for output, target, feed in zip(outputs, targets, feeds, strict=True):
        if output.ndim not in (2, 3):
            return None
        real = token_mask(feed) if output.ndim == 3 else None
        keep = np.ones(output.shape[:-1], bool) if real is None else real.cpu().numpy()
        want = target[keep].astype(np.float64)  # [tokens, vocab]
        chosen = output[keep].argmax(-1)[:, None]
        margin = want.max(-1) - np.take_along_axis(want, chosen, -1)[:, 0]
        margins.append(margin[chosen[:, 0] != want.argmax(-1)])
        tokens, squares, numbers = (
            tokens + len(want),
            squares + float(np.square(want).sum()),
            numbers + want.size,
        )
    if not tokens:
        return None
    size = math.sqrt(squares / numbers) or 1.0
    return TopOne(tokens=tokens, margins=tuple((np.concatenate(margins) / size).tolist()))


def perplexity(outputs: Sequence[Array], feeds: Sequence[Feed]) -> float | None:
    """Return ``exp`` of the mean negative log-likelihood of all tokens but each window's first.

    None where the inputs are no token ids or the outputs no logits ``[batch, seq, vocab]``.
    """
    scored = []
    for output, feed in zip(outputs, feeds, strict=True):
        ids = token_ids(feed)
        if ids is None or output.ndim != 3 or ids.shape != output.shape[:2]:
            return None
        scored.append((torch.from_numpy(output), ids, token_mask(feed)))
    return perplexity_of((logits.double(), ids, mask) for logits, ids, mask in scored)
