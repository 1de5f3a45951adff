"""SeqMSE: ranges of weights by a search that minimises each layer's output error in sequence."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimet_ext.config import SeqMSEParams
from aimet_ext.core.range_search import best_ranges, compatible_ranges
from aimet_ext.data.batches import ForwardFn
from aimet_ext.techniques.aliases import accepts_aimet_arguments
from aimet_ext.techniques.call import run_layerwise
from aimet_ext.techniques.checks import merge_params
from aimet_ext.techniques.layerwise.deploy import Decision, Problem
from aimet_ext.techniques.layerwise.report import LayerwiseReport
from aimet_ext.techniques.layerwise.samples import SampleSum
from aimet_ext.techniques.session import RunOptions
from aimet_ext.walk.protocol import Activation

__all__ = ["SeqMSE", "apply_seq_mse"]

_COMPATIBLE_BITS = 4  # AIMET leaves wider weights alone


@dataclass(frozen=True)
class SeqMSE:
    """See :class:`aimet_ext.techniques.layerwise.loop.Solver`."""

    params: SeqMSEParams
    technique: str = "seq_mse"
    rounds: bool = False

    @property
    def aimet_stream(self) -> bool:
        """What AIMET takes depends on what it sees."""
        return self.params.mode == "compatible"

    def samples(self, activation: Activation) -> SampleSum | None:
        """Second moments are enough."""
        return None

    def decide(self, problem: Problem) -> Decision:
        """Ranges alone."""
        second, pull, params = problem.moment.second, problem.pull, self.params
        if params.mode == "compatible":
            chosen = compatible_ranges(
                problem.weight,
                problem.layout,
                second,
                problem.moment.cross,
                params.num_candidates,
            )
            return Decision(range=chosen, compare=False)
        scale, offset = best_ranges(
            problem.weight,
            problem.layout,
            second,
            pull,
            num_candidates=params.num_candidates,
            sweeps=params.sweeps,
        )
        return Decision(scale=scale, offset=offset)


@accepts_aimet_arguments(
    order=(
        "sim",
        "dataloader",
        "num_candidates",
        "forward_fn",
        "modules_to_exclude",
        "checkpoints_config",
        "cache_dir",
    )
)
def apply_seq_mse(
    sim: Any,
    dataloader: Iterable[Any],
    num_candidates: int = 20,
    *,
    forward_fn: ForwardFn | None = None,
    modules_to_exclude: Sequence[str | nn.Module] | None = None,
    output_path: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    params: SeqMSEParams | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    checkpoints_config: str | None = None,
    **settings: Any,
) -> LayerwiseReport:
    r"""Choose the range of every weight that minimises its layer's output error.

    For each cell of a weight's grid, layer after layer,

    .. math::
        \min_{\text{range}} \; \mathrm{tr}\, E H E^{\top}, \quad E = Q(W) - W,
        \quad H = \textstyle\sum \hat x \hat x^{\top}

    over all tokens, on what reaches the layer in the model quantized so far (``inp_symmetry``).
    The second moments ``H`` are gathered once for all layers that read one input, in one streamed
    pass; candidates cost no tokens. In mode ``"best"`` cells are judged together on the whole
    ``H`` by coordinate descent, asymmetric ranges on either side by themselves, and LPBQ on the
    grid that is deployed. Mode ``"compatible"`` takes the ranges that AIMET's own SeqMSE takes.

    The ranges are frozen; ``sim.compute_encodings`` fills in the rest. If anything fails or is
    interrupted, the simulation is left as it was.

    :param sim: ``aimet_torch.QuantizationSimModel`` of any model with linear layers or
        convolutions. Mutated.
    :param dataloader: batches: a tensor, a tuple of positional arguments, or a mapping of keyword
        arguments. Tokens with attention mask 0 count nowhere.
    :param num_candidates: shares of the full range to try, 20 if not given.
    :param forward_fn: called as ``forward_fn(model, batch)`` in place of ``model(batch)``.
    :param modules_to_exclude: layers to leave alone, by name or as modules of ``sim.model``; they
        compute in float meanwhile.
    :param output_path: folder for the report. A folder of ours is replaced, another one refused.
    :param checkpoint_dir: folder for a checkpoint of each finished stage. The same call goes on
        from there after a crash.
    :param cache_dir: folder for memory-mapped caches; None keeps them in RAM.
    :param params: settings, see :class:`SeqMSEParams`.
    :param device: where the block being worked on goes; None leaves it where it is.
    :param progress: show a progress bar.
    :param checkpoints_config: AIMET's file that tells where to cut a model. Not needed: ignored,
        with a warning.
    :param settings: fields of :class:`SeqMSEParams`, in place of ``params``; AIMET's names of
        arguments (``data_loader``, …) and its order are understood as well.
    :returns: objective of every layer, of plain rounding too; layers left alone with the reason.
    :raises TypeError: a wrong type of simulation, batch or argument, or one argument twice.
    :raises ValueError: unusable data, a layer that no data reached, weights that hold NaN or are
        rounded already, the same technique twice.
    :raises FileExistsError: ``output_path`` holds files that are not ours.
    :raises RuntimeError: ``forward_fn`` failed.

    >>> report = apply_seq_mse(sim, batches)
    >>> sim.compute_encodings(run_calibration)
    """
    if checkpoints_config is not None:
        warnings.warn(
            "checkpoints_config is not needed and ignored: blocks are found in the model",
            stacklevel=3,
        )
    merged = merge_params(
        SeqMSEParams, "apply_seq_mse", params, settings, num_candidates=num_candidates
    )
    wide = merged.max_bitwidth
    return run_layerwise(
        sim,
        dataloader,
        SeqMSE(merged),
        RunOptions(
            forward_fn=forward_fn,
            checkpoint_dir=checkpoint_dir,
            cache_dir=cache_dir,
            device=device,
            progress=progress,
        ),
        modules_to_exclude=modules_to_exclude,
        output_path=output_path,
        max_bitwidth=min(wide, _COMPATIBLE_BITS) if merged.mode == "compatible" else wide,
    )
