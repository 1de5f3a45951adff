"""The call that verifies an export: its steps in order, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from aimet_ext.data.feeds import Feed, graph_feeds, random_feeds
from aimet_ext.errors import CorruptFileError, Finding
from aimet_ext.files.folders import check_output, replace_folder
from aimet_ext.files.manifest import CONFIG, check_kind, read_manifest, versions, write_manifest
from aimet_ext.files.reading import read_json
from aimet_ext.files.scratch import temporary
from aimet_ext.integrations.qnn_targets import HtpTarget, find_target
from aimet_ext.integrity.check import check_integrity
from aimet_ext.onnx.values import read_input_specs
from aimet_ext.progress import step, steps
from aimet_ext.verification.report import Status, StepResult, Thresholds, VerifyReport
from aimet_ext.verification.steps import Verification

REPORT = "verify.json"
_DEFAULT = "htp_v79"

_STEPS: tuple[tuple[str, Callable[[Verification], str]], ...] = (
    ("sim rebuilt", Verification.rebuild),
    ("same numbers in ONNX", Verification.same_numbers),
    ("lint", Verification.lint),
    ("QDQ model", Verification.write),
    ("compiled", Verification.compile),
    ("outputs", Verification.outputs),
    ("layer by layer", Verification.compare_layers),
)
# Without these the next steps have nothing to work with.
_NEEDED = ("files", "sim rebuilt", "same numbers in ONNX", "QDQ model")


def verify(
    path: str | Path,
    dataloader: Any = None,
    *,
    target: str | HtpTarget | None = None,
    output: str | Path | None = None,
    reference: Any = None,
    windows: int = 4,
    thresholds: Thresholds | None = None,
    kv_bitwidth: int | None = None,
    text: str = "",
    progress: bool = True,
) -> VerifyReport:
    """Compare an export with the numbers that the target's processor computes.

    The files are compared with each other; the sim is rebuilt from them and turned into an ONNX
    sim, which must compute the same; that is written as a QDQ model, compiled for the target,
    which must take every node, and run in simulation of the processor. Its outputs must be nearer
    to the sim's than those are to the float model's, and every operator is compared with the
    ONNX sim's, to name the first one that diverges and, if it is known, the cause.

    Where onnxruntime-qnn is not installed, the QDQ model runs in onnxruntime on the CPU, and
    the report's ``backend`` says so.

    :param path: Folder that :func:`aimet_ext.export` wrote.
    :param dataloader: Batches of token ids as :func:`aimet_ext.calibration_batches` makes them, or
        of the model's inputs; cut to the length that the model was exported with. All of them
        calibrate the quantizers that only the target has. None: generated inputs, on which
        perplexity has no meaning.
    :param target: Architecture (``"htp_v75"``) or chip (``"sm8650"``); None: the one whose
        placement of quantizers the export has (:func:`target_of`).
    :param output: Folder for the QDQ model, the encodings of all its quantizers, the context
        binary and the report (``verify.json``); None: nothing is kept.
    :param reference: Original model, as it was before any technique, a module that takes the same
        inputs. None: the export with its quantizers off, whose weights are those that the
        techniques left, rounded by some of them; so the loss by rounding is not seen.
    :param windows: Number of batches of the exported shape to compare on.
    :param thresholds: Limits; None: the defaults of :class:`Thresholds`.
    :param kv_bitwidth: Bits of keys and values that are kept between calls; None: as the others.
    :param text: Description of the data, for the report.
    :param progress: Show a progress bar.
    :returns: The report; ``report.passed`` is the verdict.
    :raises FileNotFoundError: there is no export at ``path``.
    :raises CorruptFileError: the folder holds something else than an export.
    :raises FileExistsError: ``output`` is not empty and was not written by aimet_ext.
    :raises ValueError: unknown target, or batches that do not fit.

    >>> report = aimet_ext.verify("llama-w4", batches, target="htp_v79", output="llama-htp")
    >>> assert report.passed, report
    """
    if type(windows) is not int or windows < 1:
        raise ValueError(f"windows must be an integer of at least 1, got {windows!r}")
    folder = Path(path)
    chip = target_of(folder) if target is None else find_target(target)
    if output is not None:
        check_output(output)
    asked = thresholds or Thresholds()
    blank = VerifyReport(
        folder=str(folder),
        target=chip.name,
        reference=reference is not None,
        thresholds=asked,
        versions=_versions(),
    )
    first, findings = _files(folder)
    if findings:
        report = replace(blank, steps=(first, *_not_run(_STEPS)), findings=tuple(findings))
        with _work_folder(output) as work:
            return _finish(work, report) if output is not None else report
    feeds, data = _feeds(folder, dataloader, windows, text)
    with _work_folder(output) as work:
        run = Verification(
            folder,
            work,
            chip,
            feeds,
            count=windows,
            real=dataloader is not None,
            reference=reference,
            thresholds=asked,
            kv_bitwidth=kv_bitwidth,
        )
        try:
            with steps("verify", len(_STEPS), progress):
                results = (first, *_run_all(run))
        finally:
            run.close()
        report = replace(
            blank,
            backend=run.backend,
            data=data,
            steps=results,
            findings=tuple(run.findings),
            hints=tuple(run.hints),
            measures=run.measures,
            layers=tuple(run.layers),
            first_divergence=run.first_divergence,
            cause=run.cause,
            fallbacks=run.fallbacks,
            added=run.hand.added if run.hand is not None else (),
        )
        return _finish(work, report) if output is not None else report


def target_of(folder: str | Path) -> HtpTarget:
    """Return the target that an export was made for, by the placement of its quantizers.

    :param folder: Folder of the export; where it tells of no HTP, the target is that of
        :func:`aimet_ext.create_sim`.
    """
    config = None
    with suppress(CorruptFileError, OSError):  # what is wrong with the manifest is found later
        config = (read_manifest(folder, verify=False).get("settings") or {}).get("config_file")
    with suppress(ValueError):
        return find_target(str(config))
    return find_target(_DEFAULT)


def exported_length(path: Path) -> int:
    """Return the tokens of a window of the language model in an ONNX file.

    :raises ValueError: it takes no ids ``[batch, seq]`` of a fixed length.
    """
    shapes = [spec.sizes for spec in read_input_specs(path).values()]
    length = next((shape[1] for shape in shapes if len(shape) == 2), None)
    if length is None:
        raise ValueError(
            f"{path.name} must take token ids [batch, seq] of a fixed length to be run on text, "
            f"but its inputs have the shapes {shapes}; export it without dynamic axes"
        )
    return length


def _files(folder: Path) -> tuple[StepResult, list[Finding]]:
    """Compare the files with each other."""
    start = time.perf_counter()
    kind = "export"
    with suppress(CorruptFileError):  # what is wrong with the manifest is found next
        kind = read_manifest(folder, verify=False)["kind"]
    check_kind(folder, kind)
    try:
        findings = list(check_integrity(folder))
    except CorruptFileError as error:
        findings = [Finding("files", folder.name, str(error), "export the model again")]
    detail = f"{len(findings)} faults" if findings else "weights, encodings and scales agree"
    return _step("files", start, bool(findings), detail), findings


def _run_all(run: Verification) -> Iterator[StepResult]:
    for number, (name, action) in enumerate(_STEPS):
        step(name)
        start, before = time.perf_counter(), len(run.findings)
        try:
            detail = action(run)
        except (ValueError, RuntimeError) as error:
            detail = "stopped by an error"
            remedy = "export the model again with what the message asks for"
            run.findings.append(Finding(name, run.folder.name, str(error), remedy))
            stop = True
        else:
            stop = name in _NEEDED
        failed = len(run.findings) > before
        yield _step(name, start, failed, detail)
        if failed and stop:
            yield from _not_run(_STEPS[number + 1 :])
            return


def _step(name: str, start: float, failed: bool, detail: str) -> StepResult:
    status: Status = "failed" if failed else "passed"
    return StepResult(name=name, status=status, detail=detail, seconds=time.perf_counter() - start)


def _not_run(steps: Any) -> list[StepResult]:
    return [StepResult(name=name, status="not run") for name, _ in steps]


def _feeds(folder: Path, dataloader: Any, windows: int, text: str) -> tuple[list[Feed], str]:
    """Return inputs of the exported graph, and their description."""
    manifest = read_manifest(folder, verify=False)
    inputs = read_input_specs(folder / f"{manifest['prefix']}.onnx")
    if dataloader is not None:
        feeds = graph_feeds(dataloader, inputs)
        return feeds, _described(feeds, windows, text)
    feeds = random_feeds(inputs, windows, _vocabulary(folder))
    return feeds, f"{windows} batches of made-up inputs; pass data for figures that mean something"


def _described(feeds: list[Feed], windows: int, text: str) -> str:
    """Return what is compared, of which text, and what calibrates."""
    ids = feeds[0].get("input_ids")
    each = 1 if ids is None else len(ids)
    count, of = each * min(windows, len(feeds)), f" of {text}" * bool(text)
    one, many = ("batch", "batches") if ids is None else ("window", "windows")
    kind = (one if count == 1 else many) + ("" if ids is None else f" of {ids.shape[1]} tokens")
    all_of_them = f"{each * len(feeds)} for what only the target quantizes"
    return f"compared on {count} {kind}{of}; calibrated on {all_of_them}"


def _vocabulary(folder: Path) -> int:
    """Return the number of tokens in the model's vocabulary, 2 if there is no config."""
    path = folder / CONFIG
    if not path.is_file():
        return 2
    config = read_json(path)
    text = config.get("text_config") or config
    return int(text.get("vocab_size", 2))


@contextmanager
def _work_folder(output: str | Path | None) -> Iterator[Path]:
    if output is None:
        with temporary() as folder:
            yield folder
    else:
        with replace_folder(output) as folder_path:
            yield folder_path


def _finish(work: Path, report: VerifyReport) -> VerifyReport:
    """Write report and manifest beside the other files."""
    names = sorted(file.relative_to(work).as_posix() for file in work.rglob("*") if file.is_file())
    report = replace(report, files=(*names, REPORT))
    report.save(work / REPORT)
    write_manifest(
        work,
        "verified",
        target=report.target,
        backend=report.backend,
        passed=report.passed,
        export=Path(report.folder).name,
    )
    return report


def _versions() -> dict[str, str]:
    found = versions()
    with suppress(metadata.PackageNotFoundError):
        found["onnxruntime-qnn"] = metadata.version("onnxruntime-qnn")
    return found
