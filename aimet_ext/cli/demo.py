"""The ``demo`` command: all techniques on the packaged model, and the use of the exported files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import aimet_ext
from aimet_ext.cli.options import Output, Seed
from aimet_ext.cli.output import Result, table
from aimet_ext.files.folders import check_output, replace_folder
from aimet_ext.files.manifest import relist_files

if TYPE_CHECKING:
    from torch import Tensor

EPILOG = """\b
Example:
  aimet-ext demo --output demo_output --num-iterations 400
"""

BITWIDTHS = (4, 3)
WINDOWS = {"calibration": 8, "evaluation": 24}  # of 256 tokens
# Less work than with the defaults: all runs together take about a minute of one core.
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"scale_candidates": 3, "refine_sweeps": 2},
    "adaround": {"start": "weight", "num_iterations": 40, "refine_sweeps": 2},
    "omniquant": {"search_sweeps": 1, "evaluations": 1},
}
_LABELS = {
    "nearest": "rounding",
    "seq_mse": "SeqMSE",
    "gptq": "GPTQ",
    "adaround": "AdaRound",
    "omniquant": "OmniQuant",
}

WHERE = (
    ("model.onnx, model.encodings", "the target's converter, which takes both"),
    ("the whole folder", "aimet-ext verify: QDQ graph and context binary, compared on the target"),
    ("scales.safetensors", "aimet-ext lora fold: adapters trained for the float model"),
    ("model.safetensors, config.json", "transformers: the float model with the rescaled weights"),
    ("quantizers.safetensors, quantsim.json", "aimet_ext.load: the simulation, to go on with"),
)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Measurements of the demo.

    :param float_perplexity: Perplexity of the float model.
    :param perplexity: Perplexities by technique, one for each of :data:`BITWIDTHS`.
    :param seconds: Processor seconds of each technique at all widths.
    :param files: Exported files with their sizes.
    """

    float_perplexity: float
    perplexity: dict[str, tuple[float, ...]]
    seconds: dict[str, float]
    files: list[tuple[str, str]]

    def __str__(self) -> str:
        head = "".join(f"{f'{bits} bits':>18}" for bits in BITWIDTHS)
        lines = [
            "Perplexity on held-out text, weights of the decoder blocks quantized per channel",
            f"{'':<12}{head}{'processor':>14}",
            f"{'float':<12}" + f"{self.float_perplexity:>9.3f}{'':9}" * len(BITWIDTHS),
        ]
        for name, values in self.perplexity.items():
            cells = (f"{v:>9.3f} {v / self.float_perplexity - 1:>+7.1%} " for v in values)
            lines.append(f"{_LABELS[name]:<12}{''.join(cells)}{self.seconds[name]:>12.1f} s")
        lines += ["", *(self._gained(number, bits) for number, bits in enumerate(BITWIDTHS))]
        return "\n".join(lines)

    def _gained(self, number: int, bits: int) -> str:
        """Say what the best technique gains back of rounding's loss at one width."""
        losses = {name: v[number] - self.float_perplexity for name, v in self.perplexity.items()}
        best = min(losses, key=losses.__getitem__)
        share = 1 - losses[best] / losses["nearest"]
        return (
            f"At {bits} bits plain rounding adds {losses['nearest']:.3f} to the perplexity; "
            f"{_LABELS[best]} gains {share:.0%} of that back."
        )


def demo(
    output: Output = Path("demo_output"),
    num_iterations: Annotated[
        int, typer.Option(min=1, help="OmniQuant's optimizer steps for each block.")
    ] = 10,
    seed: Seed = 0,
) -> Result:
    """Compare the techniques on the packaged model: no download, a minute of computing."""
    result = run(output, num_iterations=num_iterations, seed=seed)
    text = f"{result}\n\n{output}, of OmniQuant at {BITWIDTHS[0]} bits:\n{table(result.files)}"
    plain = {**dataclasses.asdict(result), "bitwidths": BITWIDTHS, "output": str(output)}
    return Result(f"{text}\n\nWhere the files go:\n{table(WHERE)}", plain)


def run(output: Path, *, num_iterations: int, seed: int) -> Demo:
    """Quantize the packaged model with each technique at each width, and export one of the results.

    Only weights are quantized, so that the figures show what happens to the weights.
    """
    from aimet_ext.cli import jobs
    from aimet_ext.reporting.writing import write_run

    check_output(output)
    record = aimet_ext.Recorder()
    model, tokenizer = jobs.load_model(aimet_ext.examples.model_dir())
    documents = aimet_ext.examples.documents
    batches = aimet_ext.calibration_batches(
        tokenizer, documents("calibration"), 256, WINDOWS["calibration"] // 2, batch_size=2
    )
    held_out = aimet_ext.calibration_batches(
        tokenizer, documents("evaluation"), 256, WINDOWS["evaluation"] // 8, batch_size=8
    )
    given = {
        "adaround": {"seed": seed},
        "omniquant": {"seed": seed, "num_iterations": num_iterations},
    }
    float_perplexity = aimet_ext.evaluate_perplexity(model, held_out)
    kept: tuple[Any, dict[str, Any]] = (None, {})
    perplexity: dict[str, tuple[float, ...]] = {}
    seconds: dict[str, float] = {}
    for name in _LABELS:
        start, found = time.process_time(), []
        for bits in BITWIDTHS:
            settings = SETTINGS.get(name, {}) | given.get(name, {})
            with record.phase(f"{_LABELS[name]} at {bits} bits"):
                sim, report = _quantized(model, batches, name, bits, settings)
                found.append(aimet_ext.evaluate_perplexity(sim, held_out))
            if (name, bits) == ("omniquant", BITWIDTHS[0]):
                kept = sim, {name: report}
        perplexity[name], seconds[name] = tuple(found), time.process_time() - start
    quality = {
        "float": float_perplexity,
        "rounding": perplexity["nearest"][0],
        "quantized": perplexity["omniquant"][0],
        "windows": sum(map(len, held_out)),
        "seq_length": held_out[0].shape[1],
        "text": "text that was not calibrated on",
    }
    with replace_folder(output) as folder:
        with record.phase("export"):
            aimet_ext.export(kept[0], folder, jobs.PREFIX, batches[0][:1])
        write_run(folder, *kept, quality, model="the packaged model", recorder=record)
        relist_files(folder)
    return Demo(float_perplexity, perplexity, seconds, jobs.list_files(output))


def _quantized(
    model: Any, batches: Sequence[Tensor], name: str, bits: int, settings: dict[str, Any]
) -> tuple[Any, Any]:
    """Return a simulation of the model with a technique applied, ready to evaluate; its report."""
    sim = aimet_ext.create_sim(
        model, batches[0], weights=aimet_ext.QSpec(bitwidth=bits), activations=None
    )
    report = None
    if name != "nearest":
        report = getattr(aimet_ext, f"apply_{name}")(sim, batches, **settings)
    sim.compute_encodings(lambda quantized: quantized(batches[0]))
    return sim, report
