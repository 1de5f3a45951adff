"""The techniques under the common contract, and what its tests share."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import QSpec

WEIGHTS_ONLY: dict[str, Any] = {"activations": None, "lm_head": None, "embedding": None}
CONTEXT = 64


@dataclass(frozen=True, kw_only=True)
class Technique:
    """One ``apply_<name>`` as the contract sees it.

    :param aimet: module and name of AIMET's function, whose calls must be understood.
    :param order: our names of AIMET's arguments, in AIMET's order.
    :param number: the one number that matters, third position.
    :param quick: settings for small models and little time.
    :param changed: one of its settings and another value, which a checkpoint must not mix.
    :param units: from a report to (name, nearest, after) of each unit.
    """

    name: str
    aimet: tuple[str, str]
    order: tuple[str, ...]
    number: str
    quick: dict[str, Any] = field(default_factory=dict)
    changed: tuple[str, Any]
    units: Callable[[Any], list[tuple[str, float, float]]]

    @property
    def function(self) -> Callable[..., Any]:
        """``aimet_ext.apply_<name>`` itself."""
        return getattr(aimet_ext, f"apply_{self.name}")

    def apply(self, sim: Any, dataloader: Any, **settings: Any) -> Any:
        """Apply it quickly, without progress bars."""
        return self.function(sim, dataloader, **{"progress": False, **self.quick, **settings})


#: A new technique is one more entry: every test of the contract runs on it.
TECHNIQUES = (
    Technique(
        name="omniquant",
        aimet=("aimet_torch.experimental.omniquant", "apply_omniquant"),
        order=("sim", "dataloader", "forward_fn", "num_iterations", "output_path"),
        number="num_iterations",
        quick={"num_iterations": 2, "search_sweeps": 1},
        changed=("let_lr", 1e-2),
        units=lambda report: [(b.name, b.loss_nearest, b.loss_after) for b in report.blocks],
    ),
)


@pytest.fixture(params=TECHNIQUES, ids=lambda technique: technique.name)
def technique(request: pytest.FixtureRequest) -> Technique:
    """Each technique in turn."""
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
                found[key] = _digest(side.multiplier)
        return found

    return read


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
