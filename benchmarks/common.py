"""What the benchmarks share: models with their text, the methods, runs that are made once, tables.

Perplexity by one protocol: documents joined, each after BOS; windows of 256 tokens that do not
overlap; the first 64 of the calibration text calibrate, the first 200 of the evaluation text
score, all of it for a headline.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext import QSpec, examples

LENGTH, CALIBRATION, SCORED = 256, 64, 200
SIMPLE = "plain rounding"
SEQ_MSE, AIMET = "AIMET SeqMSE", "AIMET OmniQuant"
OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    assets: Path
    seeds: int = 3
    steps: int = 800
    aimet_steps: int = 800
    candidates: int = 20
    batch_size: int = 4
    quick: bool = False
    changes: dict[str, Any] = field(default_factory=dict)  # settings of ours


@dataclass(frozen=True)
class Subject:
    """A model with the text that calibrates and scores it, ``[windows, 256]`` each."""

    name: str
    model: nn.Module
    calibration: Tensor
    scored: Tensor
    everything: Tensor
    overrides: Mapping[str, QSpec | None] = field(default_factory=dict)  # as create_sim takes them


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method on one model."""

    method: str
    seed: int
    perplexity: float
    headline: float  # on all windows
    seconds: float
    extra: dict[str, Any]


def load(folder: Path) -> tuple[nn.Module, Any]:
    """A causal LM in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def multi_head_twin(model: nn.Module) -> nn.Module:
    """The same function with as many key-value heads as query heads, each one repeated."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    groups = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    state = model.state_dict()
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = value.unflatten(0, (-1, config.head_dim))  # [kv_heads, head_dim, …]
            state[name] = heads.repeat_interleave(groups, 0).flatten(0, 1)
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    twin.load_state_dict(state)
    return twin.eval()


@contextlib.contextmanager
def quiet_warnings() -> Iterator[None]:
    """Without warnings: of torch.jit and of AIMET's own deprecated properties."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the other side's progress bars, log lines and warnings."""
    with quiet_warnings(), contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


class Bench:
    """Runs of all methods; what two sections need is made once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._runs: dict[tuple[Any, ...], Run] = {}
        self._warm: set[tuple[str, QSpec, str]] = set()

    @functools.cache  # noqa: B019 - one object for the whole process
    def subject(self, name: str) -> Subject:
        """``"stories260K"``, its multi-head ``"twin"``, or the model in the ``"box"``.

        ``"stories260K 0-1"`` is the first with all blocks but the first two left float.
        """
        if name == "box":
            model, tokenizer = load(examples.model_dir())
            texts = [examples.documents(split) for split in ("calibration", "evaluation")]
        else:
            model, tokenizer = load(self.options.assets / "stories260K-hf")
            stories = self.options.assets / "tinystories"
            texts = [stories / "calib.jsonl", stories / "eval.jsonl"]
        if name == "twin":
            model = multi_head_twin(model)
        calibration, everything = (
            torch.cat(aimet_ext.calibration_batches(tokenizer, text, LENGTH, None, 20))
            for text in texts
        )
        if self.options.quick:
            calibration, everything = calibration[:8], everything[:12]
        rest = {"model.layers.[!01].*": None} if name.endswith(" 0-1") else {}
        return Subject(
            name, model, calibration[:CALIBRATION], everything[:SCORED], everything, rest
        )

    @functools.cache  # noqa: B019
    def float_perplexity(self, name: str) -> tuple[float, float]:
        """On the scored windows and on all of them."""
        return self._score(self.subject(name).model, self.subject(name))

    def run(
        self,
        name: str,
        spec: QSpec,
        method: str,
        *,
        seed: int = 0,
        steps: int = 0,
        **changes: Any,
    ) -> Run:
        """One method, once; the same arguments again cost nothing."""
        key = (name, spec, method, seed, steps, *sorted(changes.items()))
        if key not in self._runs:
            subject = self.subject(name)
            self._runs[key] = self._run(subject, spec, method, seed, steps, changes)
            done = self._runs[key]
            print(
                f"  {name} {label(spec)} {method} seed {seed}: perplexity {done.perplexity:.4f}, "
                f"{done.seconds:.1f} s",
                flush=True,
            )
        return self._runs[key]

    def seeds(self, name: str, spec: QSpec, *, steps: int = 0, **changes: Any) -> list[Run]:
        """Ours with every seed."""
        seeds = range(self.options.seeds)
        return [self.run(name, spec, OURS, seed=seed, steps=steps, **changes) for seed in seeds]

    def compare(self, name: str, spec: QSpec, others: Sequence[str]) -> dict[str, list[Run]]:
        """Ours and AIMET's in turn, so that neither has the quiet hours to itself."""
        first = self.run(name, spec, OURS)
        runs = {method: [self.run(name, spec, method)] for method in others}
        rest = [self.run(name, spec, OURS, seed=seed) for seed in range(1, self.options.seeds)]
        return {**runs, OURS: [first, *rest]}

    def sim(self, subject: Subject, spec: QSpec) -> Any:
        """Weights of the block linears alone; an MLP that a block does not divide is padded."""
        weights = QSpec.from_dict({**spec.to_dict(), "on_indivisible": "pad"})
        with quiet():
            return aimet_ext.create_sim(
                subject.model,
                subject.calibration[:1],
                weights=weights,
                lm_head=None,
                embedding=None,
                activations=None,
                overrides=subject.overrides,
            )

    def default_steps(self, method: str) -> int:
        """What the command line says."""
        return self.options.aimet_steps if method == AIMET else self.options.steps

    def _run(
        self,
        subject: Subject,
        spec: QSpec,
        method: str,
        seed: int,
        steps: int,
        changes: dict[str, Any],
    ) -> Run:
        cold = (subject.name, spec, method) not in self._warm
        if cold and not self.options.quick:  # neither side is timed cold
            self._warm.add((subject.name, spec, method))
            small = replace(subject, calibration=subject.calibration[:2])
            self._apply(self.sim(subject, spec), small, method, 0, 1, 1, {})
        sim = self.sim(subject, spec)
        before = grids(sim, spec)
        started = time.perf_counter()
        extra = self._apply(
            sim,
            subject,
            method,
            seed,
            steps or self.default_steps(method),
            self.options.candidates,
            changes,
        )
        seconds = time.perf_counter() - started
        if metadata := extra.pop("metadata", None):
            extra["float_change"] = self._change_by_aimet(subject, metadata)
        extra.update(linears=before["linears"], on_grid=before["on_grid"])
        if method != AIMET:  # which puts classes of its own in the quantizers' place
            extra["grid_kept"] = grids(sim, spec) == before
        perplexity, headline = self._score(sim, subject)
        return Run(
            method=method,
            seed=seed,
            perplexity=perplexity,
            headline=headline,
            seconds=seconds,
            extra=extra,
        )

    def _apply(
        self,
        sim: Any,
        subject: Subject,
        method: str,
        seed: int,
        steps: int,
        candidates: int,
        changes: dict[str, Any],
    ) -> dict[str, Any]:
        if method == SIMPLE:
            return {}
        if method == SEQ_MSE:
            return apply_seq_mse(sim, subject.calibration.split(4), candidates)
        if method == AIMET:
            return apply_aimet_omniquant(sim, subject.calibration, steps)
        settings = {"seed": seed, **self.options.changes, **changes}
        batches = list(subject.calibration.split(self.options.batch_size))
        report = aimet_ext.apply_omniquant(sim, batches, steps, progress=False, **settings)
        return {"kept": [block.kept for block in report.blocks], "settings": report.settings}

    def _score(self, model_or_sim: Any, subject: Subject) -> tuple[float, float]:
        def perplexity(windows: Tensor) -> float:
            return aimet_ext.evaluate_perplexity(model_or_sim, list(windows.split(20)))

        scored = perplexity(subject.scored)
        same = len(subject.scored) == len(subject.everything)
        return scored, scored if same else perplexity(subject.everything)

    def _change_by_aimet(self, subject: Subject, metadata: bytes) -> float:
        """max|Δ|/max of the float logits once AIMET's own scales are folded by AIMET's function."""
        from aimet_torch.experimental.omniquant import omniquant_optimizer

        plain = aimet_ext.prepare_model(copy.deepcopy(subject.model))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), quiet():
            path = Path(folder) / "scales.safetensor"
            path.write_bytes(metadata)
            ids = subject.scored[:2]
            before = plain(ids)
            for parameter in plain.parameters():
                parameter.requires_grad_(False)
            omniquant_optimizer.update_base_model_with_omniquant_metadata(plain, path)
            return float((plain(ids) - before).abs().max() / before.abs().max())


def apply_seq_mse(sim: Any, batches: Iterable[Any], candidates: int) -> dict[str, Any]:
    """AIMET's sequential MSE search of ranges."""
    from aimet_torch import seq_mse

    with quiet():
        seq_mse.apply_seq_mse(sim, list(batches), num_candidates=candidates, forward_fn=call)
    return {}


def apply_aimet_omniquant(sim: Any, windows: Tensor, steps: int) -> dict[str, Any]:
    """AIMET's OmniQuant. Windows go in one by one, for it trains on the first of a batch only."""
    from aimet_torch.experimental.omniquant import omniquant_optimizer

    # It reads `device` and `config` from the model that was given to the simulation.
    sim.model.device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, quiet():
        omniquant_optimizer.apply_omniquant(
            sim, list(windows.split(1)), call, num_iterations=steps, output_path=folder
        )
        name = omniquant_optimizer.OMNIQUANT_METADATA_SAFETENSOR_NAME
        return {"metadata": (Path(folder) / name).read_bytes()}


def call(model: nn.Module, batch: Any) -> Any:
    """``forward_fn`` of AIMET's functions."""
    return model(batch)


def grids(sim: Any, spec: QSpec) -> dict[str, Any]:
    """How many linear layers have the grid that was asked for, and what each has."""
    from aimet_ext.sim.protocol import adapt

    adaptor = adapt(sim)
    quantizers = adaptor.weight_quantizers()
    kinds = {}
    for name, view in quantizers.items():
        actual = adaptor.model.get_submodule(name).param_quantizers["weight"]
        width = getattr(actual, "decompressed_bw", None)
        kinds[name] = (type(actual).__name__, view.bitwidth, width, str(view.granularity))
    wanted = [name for name, view in quantizers.items() if view.granularity == spec.granularity]
    return {"linears": len(quantizers), "on_grid": len(wanted), "kinds": kinds}


def label(spec: QSpec) -> str:
    """``"W4 LPBQ 32"``."""
    kind = type(spec.granularity).__name__
    return f"W{spec.bitwidth} {kind} {spec.block_size or ''}".strip()


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return statistics.fmean(values)
