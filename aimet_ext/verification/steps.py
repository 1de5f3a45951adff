"""The steps of a verification, each of which notes faults and leaves results for the next one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from aimet_ext.artifact.export import load
from aimet_ext.artifact.hand_off import HandOff, hand_off, write_qdq
from aimet_ext.data.feeds import Feed, run_feeds
from aimet_ext.errors import CorruptFileError, Finding
from aimet_ext.evaluation.perplexity import prepared_module
from aimet_ext.files.manifest import read_manifest
from aimet_ext.integrations.qnn import HtpRejected, is_available
from aimet_ext.integrations.qnn_process import HtpCrashed, HtpProcess
from aimet_ext.integrations.qnn_targets import HtpTarget
from aimet_ext.linting.lint import lint
from aimet_ext.onnx.reading import read_model
from aimet_ext.onnx.rewrite.compilable import with_outputs
from aimet_ext.onnx.session import open_session
from aimet_ext.sim.onnx import files as onnx_files
from aimet_ext.sim.onnx.state import tensor_values
from aimet_ext.sim.protocol import adapt
from aimet_ext.verification.layers import (
    Cause,
    LayerFacts,
    compared_layers,
    culprit,
    known_cause,
    pattern_cause,
)
from aimet_ext.verification.report import (
    LayerCheck,
    Measures,
    Thresholds,
    TopOne,
    array_sqnr,
    perplexity,
    top_one,
)

Array: TypeAlias = np.ndarray[Any, Any]

HTP, MIXED, CPU = "HTP simulation", "HTP simulation and the CPU", "onnxruntime CPU"

_ASK_AGAIN = (
    "mend the first operator that diverges, else the weakest ones that this report lists, and "
    "export again"
)
_NODES_NAMED = 12
_WIDE_PRODUCTS = 73


class CpuSession:
    """A QDQ model in onnxruntime on the CPU, its operators as they are.

    :param model: ONNX file.
    :param extra_outputs: tensors that come out too, after the graph's own outputs.
    """

    def __init__(self, model: Path, extra_outputs: Sequence[str] = ()) -> None:
        source = with_outputs(model, extra_outputs) if extra_outputs else model
        self._session = open_session(source, optimize="none", folder=model.resolve().parent)
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """Return the outputs of one call."""
        return list(self._session.run(None, dict(feed)))

    def close(self) -> None:
        """Release the session."""
        self._session = None


Session: TypeAlias = CpuSession | HtpProcess


def float_outputs(sim: Any, reference: Any, feeds: Sequence[Feed]) -> list[Array]:
    """Return the first output of the float model, for each feed.

    :param reference: Module that takes the same inputs; None: the sim with its quantizers off.
    """
    if reference is None:
        with adapt(sim).disabled_quantizers():
            return run_feeds(adapt(sim).runner, feeds)
    model = prepared_module(reference)
    if not isinstance(model, nn.Module):
        raise TypeError(
            "reference must be a torch module that takes the inputs of the exported model, got "
            f"{type(reference).__name__}"
        )
    return run_feeds(model, feeds)


@dataclass(eq=False)
class Verification:
    """State of a verification, and its steps as methods.

    :param folder: Folder of the export.
    :param work: Folder for the files that are built.
    :param target: Chip to compile for.
    :param feeds: Inputs of the exported graph, to calibrate with.
    :param count: Number of these to compare on.
    :param real: True if they are data, false if they are generated.
    :param reference: Float module, or None.
    :param thresholds: Limits.
    :param kv_bitwidth: See :func:`aimet_ext.artifact.hand_off.hand_off`.
    """

    folder: Path
    work: Path
    target: HtpTarget
    feeds: Sequence[Feed]
    _: KW_ONLY
    count: int
    real: bool
    reference: Any
    thresholds: Thresholds
    kv_bitwidth: int | None

    def __post_init__(self) -> None:
        self.manifest = read_manifest(self.folder)
        self.prefix = str(self.manifest["prefix"])
        self.windows = list(self.feeds[: self.count])
        self.findings: list[Finding] = []
        self.hints: list[Finding] = []
        self.measures = Measures()
        self.layers: list[LayerCheck] = []
        self.first_divergence: str | None = None
        self.cause: str | None = None
        self.fallbacks: tuple[str, ...] = ()
        self.backend = "none"
        self.sim: Any = None
        self.hand: HandOff | None = None
        self.session: Session | None = None
        self.qdq = self.work / f"{self.prefix}.qdq.onnx"
        self.context = self.work / f"{self.prefix}.{self.target.name}.onnx"
        self.facts: list[LayerFacts] = []
        self.expected: list[Array] = []

    def rebuild(self) -> str:
        """Rebuild the sim from its files alone, and run it and the float model."""
        self.sim = load(self.folder)
        self.expected = run_feeds(adapt(self.sim).runner, self.windows)
        floats = float_outputs(self.sim, self.reference, self.windows)
        ratio = array_sqnr(self.expected, floats)
        self._measure(sim_float_db=ratio)
        if self.real:
            self._measure(
                perplexity_sim=perplexity(self.expected, self.windows),
                perplexity_float=perplexity(floats, self.windows),
            )
        own = "itself with its quantizers off"
        with_it = own if self.reference is None else "the original model"
        return f"{ratio:.1f} dB against {with_it}"

    def same_numbers(self) -> str:
        """Build the ONNX sim, which must compute the same as the sim before more is quantized."""
        # Older chips have products of activations with 8 bits on one side, and so other quantizers.
        config = self.target.config if self.target.arch < _WIDE_PRODUCTS else None
        self.hand = hand_off(
            self.folder,
            self.feeds,
            sim=self.sim,
            config_file=config,
            kv_bitwidth=self.kv_bitwidth,
        )
        ratio, required = self.hand.same_numbers, self._ask("hand_off_db")
        self._measure(same_numbers_db=ratio)
        if not ratio >= required:
            self._fault(
                "same numbers",
                f"{self.prefix}.onnx",
                f"the ONNX model with the exported encodings must compute what the exported sim "
                f"does, to {required:.1f} dB of signal to noise or more, and has {ratio:.1f} dB",
                "export the model again; encodings and weights may be of two different sims",
            )
        return f"{ratio:.1f} dB; {len(self.hand.added)} more quantizers for the target"

    def lint(self) -> str:
        """Check the quantizers for known faults of the target."""
        found = lint(self._hand().sim, target=self.target.config)
        (self.hints if is_available() else self.findings).extend(found)
        return f"{len(found)} to look at" if found else "nothing known to go wrong"

    def write(self) -> str:
        """Write the QDQ model and encodings of all its quantizers."""
        sim = self._hand().sim
        write_qdq(self.hand, self.qdq)
        wider = onnx_files.containers(sim)
        for version, name in (("1.0.0", ""), ("2.0.0", ".2.0.0")):
            path = self.work / f"{self.prefix}{name}.encodings"
            onnx_files.write_encodings(sim, path, version, wider, int32_biases=False)
        model = read_model(self.qdq, external=False)
        names = self.manifest.get("onnx_names", {}).items()
        self.facts = compared_layers(model, {t: n.removesuffix(".weight") for n, t in names})
        return f"{len(model.graph.node)} nodes, {len(self.facts)} operators to compare"

    def compile(self) -> str:
        """Compile the target's own model, of which every node must run there."""
        if not is_available():
            self.backend, self.session = CPU, CpuSession(self.qdq)
            return f"onnxruntime-qnn is not there: nothing is known about {self.target.name}"
        try:
            session = HtpProcess(self.qdq, self.target, context=self.context)
        except HtpRejected as error:
            self._rejected(error)
            return f"rejected; compared on {self.backend}"
        except HtpCrashed as error:
            self._crashed(error)
            return f"crashed; compared on {self.backend}"
        self.backend, self.session = HTP, session
        try:
            first = session.run(self.windows[0])
        except HtpCrashed as error:
            self._crashed(error)
            return f"compiled, and crashed when run; compared on {self.backend}"
        self._check_context(first)
        size = self.context.with_name(f"{self.context.stem}_qnn.bin").stat().st_size
        return f"all {session.nodes} nodes in {session.seconds:.1f} s, {size / 1e6:.1f} MB"

    def _check_context(self, expected: list[Array]) -> None:
        """Compare the context binary, opened as a device opens it, with the compiled model."""
        try:
            with HtpProcess(self.context, self.target, load=True) as opened:
                found = opened.run(self.windows[0])
        except HtpCrashed as error:
            # A defect of the simulation: what it computes before it writes the file is right.
            message = f"it was written, but could not be run here: {error}"
            remedy = "run it on the device before you rely on it"
            self.hints.append(Finding("context binary", self.context.name, message, remedy))
            return
        if not all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True)):
            ratio = array_sqnr(found, expected)
            self._fault(
                "context binary",
                self.context.name,
                "it must give the outputs of the model as compiled, bit by bit, and differs from "
                f"them: {ratio:.1f} dB of signal to noise",
                "compile it again, with another version of onnxruntime-qnn if that does not help",
            )

    def outputs(self) -> str:
        """Compare the device's outputs with those of the sim and of the ONNX sim."""
        assert self.session is not None
        found = [self.session.run(feed)[0] for feed in self.windows]
        onnx_sim = run_feeds(adapt(self._hand().sim).runner, self.windows)
        ratio = array_sqnr(found, self.expected)
        places = top_one(found, self.expected, self.windows)
        self._measure(
            device_sim_db=ratio,
            device_onnx_db=array_sqnr(found, onnx_sim),
            top1=None if places is None else places.agreement,
        )
        if self.real:
            self._measure(perplexity_device=perplexity(found, self.windows))
        required, name = self._ask("output_db"), self.session.outputs[0]
        if not ratio >= required:
            message = (
                f"outputs on {self.backend} must have {required:.1f} dB of signal to noise or more "
                f"against the sim's, and have {ratio:.1f} dB"
            )
            self._fault("output", name, message, _ASK_AGAIN)
        if places is not None:
            self._check_top1(name, places, required)
        self._check_perplexity(name)
        return f"{ratio:.1f} dB against the sim, {required:.1f} required"

    def compare_layers(self) -> str:
        """Compare each operator on the device with the ONNX sim, on the first window."""
        self.close()
        if not self.facts:
            return "no operator has a quantized output"
        tensors = [layer.tensor for layer in self.facts]
        targets = tensor_values(self._hand().sim, self.windows[0], tensors)
        session = self._showing([name for name in tensors if name in targets])
        if session is None:
            return "the target does not take the model with these outputs; not compared"
        values = session.run(self.windows[0])
        session.close()
        shown = [layer for layer in self.facts if layer.tensor in targets]
        found = dict(zip([each.tensor for each in shown], values[-len(shown) :], strict=True))
        self.layers = [_check(each, found[each.tensor], targets[each.tensor]) for each in shown]
        wrong = [
            index
            for index, check in enumerate(self.layers)
            if not self.thresholds.near_enough(check.sqnr_db, check.error_steps)
        ]
        lowest = min(self.layers, key=lambda check: check.sqnr_db)
        if wrong:
            most = culprit(shown, [check.sqnr_db for check in self.layers], wrong[0])
            causes = {}
            for place in (most, wrong[0]):
                layer, tensor = shown[place], shown[place].tensor
                causes[place] = known_cause(layer, found[tensor], targets[tensor], self.fallbacks)
            # Where the largest loss has no known cause, that of the first that is wrong counts.
            place = next((each for each, cause in causes.items() if cause), most)
            self._diverges(place, wrong, causes[place])
        return f"{len(self.layers)} operators, the lowest {lowest.sqnr_db:.1f} dB ({lowest.name})"

    def close(self) -> None:
        """Release the compiled model; closing twice is allowed."""
        if self.session is not None:
            self.session.close()

    def _showing(self, tensors: list[str]) -> Session | None:
        if self.backend == CPU:
            return CpuSession(self.qdq, tensors)
        try:
            return HtpProcess(
                self.qdq, self.target, extra_outputs=tensors, allow_fallback=self.backend == MIXED
            )
        except (HtpCrashed, HtpRejected) as error:
            message = f"HTP takes the model, but not with its inner tensors as outputs: {error}"
            remedy = "compare fewer operators with aimet_ext.integrations.qnn.compile_htp"
            self.hints.append(Finding("layers", self.qdq.name, message, remedy))
            return None

    def _diverges(self, place: int, wrong: list[int], cause: Cause | None) -> None:
        """Note the layer that causes the first one to be too far from the sim."""
        check, first = self.layers[place], self.layers[wrong[0]]
        self.first_divergence = check.name
        self.cause = None if cause is None else cause.message
        off = "" if first.error_steps is None else f", {first.error_steps:.1f} steps off"
        message = (
            f"every operator must have {self.thresholds.layer_db:.1f} dB of signal to noise or "
            "more against the ONNX sim, or be less than a step of its output's grid off, and "
            f"{len(wrong)} of {len(self.layers)} are not: the first is {first.name} with "
            f"{first.sqnr_db:.1f} dB{off}"
        )
        if first is not check:
            message += f"; most is lost before it, in {check.name} with {check.sqnr_db:.1f} dB"
        message += f"; cause: {self.cause}" if self.cause else "; the cause is not known"
        unknown = f"compare the inputs and the weight of {check.name} with those of the sim"
        remedy = unknown if cause is None else cause.remedy
        self._fault("layer", check.name, message, remedy)

    def _crashed(self, error: HtpCrashed) -> None:
        """Name the operator that may have crashed QNN, and run the model on the CPU."""
        causes = ((layer, pattern_cause(layer)) for layer in self.facts)
        suspects = [(layer, cause) for layer, cause in causes if cause is not None]
        name, message = self.qdq.name, f"the compiled model must run; {error}"
        remedy = "try another version of onnxruntime-qnn"
        if suspects:
            layer, cause = suspects[0]
            name, remedy = layer.name, cause.remedy
            message = (
                f"{message}; the first operator that HTP is known not to take: {cause.message}"
            )
        self._fault("crash", name, message, remedy)
        self.backend, self.session = CPU, CpuSession(self.qdq)

    def _rejected(self, error: HtpRejected) -> None:
        """Name the operators that HTP refuses, and choose another backend."""
        by_node = {node: layer for layer in self.facts for node in layer.nodes}
        for node, op_type in error.nodes[:_NODES_NAMED]:
            layer = by_node.get(node)
            cause = None if layer is None else pattern_cause(layer)
            self._fault(
                "assignment",
                node if layer is None else layer.name,
                f"every node must run on HTP {self.target.name}, which does not take this {op_type}"
                + (f": {cause.message}" if cause else ""),
                cause.remedy if cause else "quantize its inputs and output, or replace it",
            )
        if not error.nodes or len(error.nodes) > _NODES_NAMED:
            count = f"{len(error.nodes)} of its nodes" if error.nodes else "it"
            message = (
                f"every node must run on HTP {self.target.name}, which does not take {count}: "
                f"{error.reason}"
            )
            remedy = "change what aimet_ext.lint(sim, target) names, or verify for another target"
            self._fault("assignment", self.qdq.name, message, remedy)
        self.backend, self.session = CPU, None
        if error.nodes:
            try:
                session = HtpProcess(self.qdq, self.target, allow_fallback=True)
            except (HtpCrashed, HtpRejected) as second:
                self.hints.append(
                    Finding("assignment", self.qdq.name, str(second), "the CPU alone was used")
                )
            else:
                self.backend, self.session, self.fallbacks = MIXED, session, session.fallbacks
        if self.session is None:
            self.session = CpuSession(self.qdq)

    def _check_top1(self, name: str, places: TopOne, noise_db: float) -> None:
        beyond, allowed = places.beyond(noise_db), self.thresholds.flips_allowed(places.tokens)
        if len(beyond) <= allowed:
            return
        message = (
            f"the largest logit must be the sim's for all but {allowed} of {places.tokens} tokens, "
            f"near-ties aside, and is another for {len(beyond)}, by up to {max(beyond):.3g} times "
            "the root mean square of the logits"
        )
        self._fault("top-1", name, message, _ASK_AGAIN)

    def _check_perplexity(self, name: str) -> None:
        device, sim = self.measures.perplexity_device, self.measures.perplexity_sim
        limit = self.thresholds.perplexity
        if device is None or sim is None or abs(device / sim - 1) <= limit:
            return
        message = (
            f"perplexity on {self.backend} must be within {limit:.2%} of the sim's {sim:.4f}, "
            f"and is {device:.4f}, {device / sim - 1:+.2%}"
        )
        self._fault("perplexity", name, message, _ASK_AGAIN)

    def _ask(self, rule: str) -> float:
        """Return the limit of a rule of the thresholds, given the ratio of sim to float."""
        ratio = self.measures.sim_float_db
        assert ratio is not None
        return float(getattr(self.thresholds, rule)(ratio))

    def _hand(self) -> HandOff:
        if self.hand is None:
            raise CorruptFileError(f"{self.folder} was not handed off")
        return self.hand

    def _measure(self, **values: float | None) -> None:
        self.measures = replace(self.measures, **values)

    def _fault(self, check: str, name: str, message: str, remedy: str) -> None:
        self.findings.append(Finding(check, name, message, remedy))


def _check(layer: LayerFacts, device: Array, sim: Array) -> LayerCheck:
    difference = device.astype(np.float64) - sim
    steps = None
    if layer.step:
        steps = math.sqrt(float(np.square(difference).mean())) / layer.step
    return LayerCheck(
        name=layer.name,
        node=layer.nodes[-1],
        op_type=layer.op_type,
        sqnr_db=array_sqnr(device, sim),
        error_steps=steps,
    )
