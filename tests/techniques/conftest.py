"""The techniques under the common contract, and what its tests share."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import LPBQ, QSpec, registry
from aimet_ext.core.hqq import lp_rows

WEIGHTS_ONLY: dict[str, Any] = {"activations": None, "lm_head": None, "embedding": None}
CONTEXT = 64


GRIDS = {
    "per-channel": QSpec(bitwidth=4),
    "asymmetric": QSpec(bitwidth=4, symmetric=False),
    "LPBQ": QSpec(bitwidth=4, granularity=LPBQ(16)),
}


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A row of the registry as the contract sees it.

    :param quick: settings for small models and little time.
    :param changed: one of its settings and another value, which a checkpoint must not mix.
    :param head: whether it decides the output layer too.
    :param grids: the grids to look at the whole sim on.
    :param entries: from a report to what it says of each unit, a block or a layer.
    :param errors: errors of a problem's rows with a quantized weight, by the objective.
    :param freezes: whether it decides ranges; if not, weights are float and all is open afterwards.
    :param wrong: values that its number must not have.
    """

    row: registry.Technique
    quick: dict[str, Any] = field(default_factory=dict)
    changed: tuple[str, Any] = ("asym_strength", 0.25)
    head: bool = True
    grids: Sequence[str] = ("per-channel", "asymmetric", "LPBQ")
    entries: Callable[[Any], Sequence[Any]] = lambda report: report.layers
    errors: Callable[[Any, Tensor], Tensor] = lambda problem, values: problem.errors(values)[0]
    freezes: bool = True
    wrong: Sequence[Any] = (0, -3, 2.5, "10", None, True)

    @property
    def name(self) -> str:
        """Name after ``apply_``."""
        return self.row.name

    @property
    def function(self) -> Callable[..., Any]:
        """``aimet_ext.apply_<name>`` itself."""
        return getattr(aimet_ext, f"apply_{self.name}")

    @property
    def by_blocks(self) -> bool:
        """Whether it works on whole blocks of a language model, else on layers."""
        return self.row.unit == "block"

    @property
    def folds(self) -> bool:
        """Whether it folds scales into the weights of blocks."""
        return self.by_blocks and not self.rounds

    @property
    def rounds(self) -> bool:
        """Whether weights are on their grids afterwards, frozen ranges or not."""
        return self.row.rounds

    @property
    def number(self) -> str | None:
        """The one number that matters, third position; None if there is none."""
        return self.row.number

    @property
    def order(self) -> tuple[str, ...]:
        """Our names of the positional arguments, in AIMET's order."""
        return self.row.order

    @property
    def aimet(self) -> tuple[str, str] | None:
        """Module and name of AIMET's function, whose calls must be understood; None if none."""
        return tuple(self.row.aimet.split(":")) if self.row.aimet else None

    @property
    def from_data(self) -> bool:
        """Whether it decides from calibration data, else from weights alone."""
        return not self.row.data_free

    @property
    def on_moments(self) -> bool:
        """Whether it decides the layers of a sim from second moments of their inputs."""
        return self.from_data and not self.by_blocks and self.name != "lpbq"

    @property
    def checkpoints(self) -> list[int]:
        """Units of each checkpoint of a Llama of two blocks: blocks, or layers of one input.

        Without data every layer is one.
        """
        if self.by_blocks:
            return [1, 1]
        return [3, 1, 2, 1] * 2 if self.from_data else [1] * 14

    @property
    def interrupted(self) -> tuple[int, int]:
        """Checkpoints, and units in them, before the third layer of the second of two blocks."""
        if self.by_blocks:
            return 1, 1
        return (4, 7) if self.from_data else (9, 9)

    def apply(self, sim: Any, dataloader: Any, **settings: Any) -> Any:
        """Apply it quickly, without progress bars."""
        return self.function(sim, dataloader, **{"progress": False, **self.quick, **settings})

    def units(self, report: Any) -> list[tuple[str, float, float]]:
        """From a report to (name, nearest, after) of each unit."""
        return [(e.name, e.loss_nearest, e.loss_after) for e in self.entries(report)]

    def resumed(self, report: Any) -> list[bool]:
        """Which units came from a checkpoint."""
        return [entry.resumed for entry in self.entries(report)]


#: What tests need to know beyond a row; a technique without an entry is tested with its defaults.
EXTRAS: dict[str, dict[str, Any]] = {
    "smoothquant": {
        "changed": ("alpha", 0.75),
        "head": False,
        "entries": lambda report: report.blocks,
        "freezes": False,
        "wrong": (-0.5, 2.5, "10", None, True),
    },
    "awq": {
        "quick": {"num_grid": 8},
        "changed": ("duo_scaling", False),
        "head": False,
        "entries": lambda report: report.blocks,
    },
    "omniquant": {
        "quick": {"num_iterations": 2, "search_sweeps": 1},
        "changed": ("let_lr", 1e-2),
        "head": False,
        "entries": lambda report: report.blocks,
    },
    "seq_mse": {"quick": {"num_candidates": 4, "sweeps": 2}, "changed": ("sweeps", 3)},
    "gptq": {
        "quick": {"scale_candidates": 2, "refine_sweeps": 1},
        "changed": ("damping", 0.1),
    },
    "adaround": {
        "quick": {"num_iterations": 10, "refine_sweeps": 1, "search_ranges": False},
        "changed": ("refine_sweeps", 2),
        "grids": ("asymmetric", "LPBQ"),
    },
    "autoround": {
        "quick": {"num_iterations": 2, "evaluations": 1},
        "changed": ("scale_lr", 1e-2),
        "head": False,
        "grids": ("asymmetric", "LPBQ"),
        "entries": lambda report: report.blocks,
    },
    "rtn": {"changed": ("max_bitwidth", 7), "grids": ("asymmetric", "LPBQ")},
    "hqq": {
        "quick": {"num_iterations": 4},
        "changed": ("lp_norm", 0.5),
        "errors": lambda problem, values: lp_rows(values.to(problem.weight) - problem.weight, 0.7),
        "grids": ("asymmetric", "LPBQ"),
    },
    "lpbq": {
        "quick": {"block_size": 16, "num_candidates": 4, "sweeps": 2},
        "changed": ("sweeps", 3),
        "head": False,
        "grids": ("per-channel",),  # which becomes another one
        "entries": lambda report: report.search.layers,
    },
}

#: A new technique is one row of the registry: every test of the contract runs on it. These tests
#: are about what is decided of weights; test_rotation.py, test_dwq.py and test_activation_ranges.py
#: have those of techniques that decide nothing of float weights.
TECHNIQUES = [
    Technique(row=row, **EXTRAS.get(row.name, {}))
    for row in registry.TECHNIQUES.values()
    if row.decides not in ("rotation", "polish", "activations")
]


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        "techniques(where, grids): run for techniques of which where(technique) is true, on these "
        "names of grids",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each technique in turn, on each of its grids; see the marker ``techniques``."""
    if "technique" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("techniques")
    wanted = {} if marker is None else marker.kwargs
    chosen = [t for t in TECHNIQUES if wanted.get("where", bool)(t)]
    if "grid" not in metafunc.fixturenames:
        metafunc.parametrize("technique", chosen, ids=lambda t: t.name, indirect=True)
        return
    pairs = [(t, grid) for t in chosen for grid in t.grids if grid in wanted.get("grids", GRIDS)]
    names = [f"{t.name}-{grid}" for t, grid in pairs]
    metafunc.parametrize(("technique", "grid"), pairs, ids=names, indirect=True)


@pytest.fixture
def grid(request: pytest.FixtureRequest) -> QSpec:
    """One grid, see :func:`pytest_generate_tests`."""
    return GRIDS[request.param]


@pytest.fixture
def technique(request: pytest.FixtureRequest) -> Technique:
    """One technique, see :func:`pytest_generate_tests`."""
    pytest.importorskip("aimet_torch")
    return request.param


@pytest.fixture(scope="session")
def ids() -> Callable[..., Tensor]:
    """Random ids ``[batch, seq]`` of the tiny models' vocabulary, the same for a seed."""

    def draw(batch: int = 2, seq: int = 16, seed: int = 0) -> Tensor:
        return torch.randint(3, 128, (batch, seq), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def batches(ids: Callable[..., Tensor]) -> list[Tensor]:
    """Three batches, of different sizes and lengths."""
    return [ids(2, 16, 1), ids(3, 24, 2), ids(1, 12, 3)]


@pytest.fixture(scope="session")
def pair(ids: Callable[..., Tensor]) -> list[Tensor]:
    """Two batches of one size, which any form of data can hold."""
    return [ids(2, 16, 1), ids(2, 16, 2)]


@pytest.fixture(scope="session")
def make_sim(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """``make_sim(family, spec, **settings of create_sim)``: a sim of its own, weights only."""
    pytest.importorskip("aimet_torch")

    @functools.cache
    def build(family: str, layers: int, spec: QSpec, dtype: torch.dtype, settings: tuple) -> Any:
        model = tiny_model(family, num_hidden_layers=layers, max_position_embeddings=CONTEXT)
        sample = torch.arange(16).reshape(2, 8) + 3
        return aimet_ext.create_sim(
            model.to(dtype), sample, weights=spec, **{**WEIGHTS_ONLY, **dict(settings)}
        )

    def make(
        family: str = "llama",
        spec: QSpec | None = None,
        *,
        layers: int = 2,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> Any:
        spec = spec or QSpec(bitwidth=4)
        return copy.deepcopy(build(family, layers, spec, dtype, tuple(sorted(settings.items()))))

    return make


@pytest.fixture
def sim(make_sim: Callable[..., Any]) -> Any:
    """A Llama of two blocks, 4-bit weights in them, all else float."""
    return make_sim()


def _digest(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _module_state(module: Any) -> dict[str, Any]:
    state = {
        "training": module.training,
        "hooks": [len(h) for n, h in sorted(vars(module).items()) if n.endswith("_hooks")],
        "forward": "forward" in vars(module),
    }
    if hasattr(module, "is_initialized"):
        state["initialized"] = module.is_initialized()
        state["overwrite"] = module.is_overwrite_allowed()
        state["type"] = type(module).__name__
    if hasattr(module, "config"):
        state["use_cache"] = getattr(module.config, "use_cache", None)
    return state


@pytest.fixture(scope="session")
def state_of() -> Callable[[Any], dict[str, Any]]:
    """Everything of a sim that a failed call must leave as it was, to the bit, to compare."""

    def read(sim: Any) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, module in sim.model.named_modules(remove_duplicate=False):
            state[f"module {name}"] = _module_state(module)
        for name, parameter in sim.model.named_parameters(remove_duplicate=False):
            state[f"parameter {name}"] = (
                _digest(parameter),
                parameter.requires_grad,
                _digest(parameter.grad),
                str(parameter.device),
            )
        for name, buffer in sim.model.named_buffers():
            state[f"buffer {name}"] = _digest(buffer)
        ledger = getattr(sim, "aimet_ext_ledger", None)
        state["ledger"] = ledger and (len(ledger.entries), len(ledger.runs), id(ledger))
        return state

    return read


@pytest.fixture(scope="session")
def result_of() -> Callable[[Any], dict[str, str]]:
    """The outcome of a technique, to the bit: parameters, quantizers, scales in the ledger."""

    def read(sim: Any) -> dict[str, str]:
        found = {name: _digest(p) for name, p in sim.model.named_parameters()}
        for number, entry in enumerate(sim.aimet_ext_ledger.entries):
            for side in entry.sides:
                key = f"ledger {number} {entry.pair} {side.module} {side.axis}"
                found[key] = _digest(side.factor)
        return found

    return read


@pytest.fixture(scope="session")
def outcome(
    make_sim: Callable[..., Any], result_of: Callable[[Any], dict[str, str]]
) -> Callable[..., tuple[dict[str, str], Any]]:
    """``outcome(technique, batches, layers)``: result and report of a plain call, made once."""
    kept: dict[tuple[Any, ...], tuple[dict[str, str], Any]] = {}

    def find(
        technique: Technique, batches: Sequence[Tensor], layers: int = 2
    ) -> tuple[dict[str, str], Any]:
        key = technique.name, layers, *(_digest(batch) for batch in batches)
        if key not in kept:
            sim = make_sim(layers=layers)
            report = technique.apply(sim, batches)
            kept[key] = result_of(sim), report
        return kept[key]

    return find


@pytest.fixture(scope="session")
def block_outputs() -> Callable[..., list[Tensor]]:
    """Outputs of block ``number`` of a module for each batch of ids, all of the model in place."""

    @torch.no_grad()
    def run(model: Any, number: int, batches: list[Tensor]) -> list[Tensor]:
        block = next(
            module for name, module in model.named_modules() if name.endswith(f"layers.{number}")
        )
        seen: list[Tensor] = []

        def keep(_: Any, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hook = block.register_forward_hook(keep)
        try:
            for batch in batches:
                model(batch)
        finally:
            hook.remove()
        return seen

    return run


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Each layer's problem, as it was given to the technique."""
    from aimet_ext.techniques.layerwise import loop as layerwise

    seen: dict[str, Any] = {}
    deploy = layerwise.deploy

    def spy(problem: Any, *args: Any) -> Any:
        seen[problem.name] = dataclasses.replace(
            problem, stored=problem.stored.clone(), weight=problem.weight.clone()
        )
        return deploy(problem, *args)

    monkeypatch.setattr(layerwise, "deploy", spy)
    return seen


class Refused:
    """A call that must end in one error and leave the sim alone."""

    def __init__(self, technique: Any, sim: Any, state_of: Any) -> None:
        self.technique, self.sim, self.state_of = technique, sim, state_of

    def __call__(self, error: type[BaseException], text: str, data: Any, **settings: Any) -> Any:
        before = self.state_of(self.sim)
        with pytest.raises(error, match=text) as caught:
            self.technique.apply(self.sim, data, **settings)
        assert self.state_of(self.sim) == before
        return caught.value


@pytest.fixture
def refused(technique: Any, sim: Any, state_of: Any) -> Refused:
    return Refused(technique, sim, state_of)
