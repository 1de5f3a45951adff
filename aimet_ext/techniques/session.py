"""The frame of a run that all techniques share: options, undo, checkpoints, ledger, weights."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.core.affine import fake_quantize
from aimet_ext.data.batches import ForwardFn
from aimet_ext.files.folders import writable_folder
from aimet_ext.files.journal import Checkpoints, UndoJournal, environment, hash_tensors
from aimet_ext.files.ledger import Ledger
from aimet_ext.sim.protocol import SimAdaptor, WeightQuantizer

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "OnGrids",
    "RunOptions",
    "on_grid",
    "open_checkpoints",
    "open_ledger",
    "original_names",
    "peak_memory",
    "undo_on_failure",
    "weights_hash",
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The arguments of a run that are not its data."""

    forward_fn: ForwardFn | None = None
    checkpoint_dir: str | Path | None = None
    cache_dir: str | Path | None = None
    device: torch.device | str | None = None
    progress: bool = True


def original_names(model: nn.Module) -> Callable[[str], str]:
    """Return a function from names in a simulation's model to names in the original checkpoint."""
    try:
        from aimet_ext.models.huggingface import original_name
    except ModuleNotFoundError:  # no transformers, so no Hugging Face model
        return lambda name: name
    return lambda name: original_name(name, model)


def weights_hash(adaptor: SimAdaptor) -> str:
    """Hash all float parameters under their original names, in the order of these (SHA-256)."""
    rename = original_names(adaptor.model)
    state = adaptor.float_state()
    return hash_tensors((rename(name), state[name]) for name in sorted(state))


@contextmanager
def undo_on_failure(
    adaptor: SimAdaptor, cache_dir: str | Path | None, *, weights: bool = True
) -> Iterator[Callable[[str], None]]:
    """Return a context that leaves the simulation as it was if its body raises.

    :param cache_dir: Folder for the originals of weights; None keeps them in RAM.
    :param weights: True if weights are going to change, false for quantizers alone.
    :returns: a function to call with a module's name before the module is changed.
    """
    if cache_dir is not None:
        cache_dir = writable_folder(cache_dir, "cache_dir")
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="undo_") as folder:
        journal = UndoJournal(None if cache_dir is None else folder)
        ledger = adaptor.ledger

        def keep(module: str) -> None:
            if module not in journal:
                journal.save(module, *adaptor.snapshot(module, weights=weights))

        try:
            with adaptor.preserved_state():
                adaptor.model.eval()
                adaptor.model.zero_grad(set_to_none=True)
                yield keep
        except BaseException:
            adaptor.ledger = ledger
            with adaptor.preserved_state():
                for module in tuple(journal.keys()):
                    adaptor.restore(module, *journal.restore(module))
            raise
        finally:
            journal.clear()


def open_ledger(adaptor: SimAdaptor, technique: str, modules: Sequence[str]) -> Ledger:
    """Return the simulation's ledger, a new one if needed, once the technique may be applied.

    :raises ValueError: the technique was applied before, or the weights are rounded.
    """
    ledger = adaptor.ledger or Ledger(origin=weights_hash(adaptor))
    ledger.check_can_apply(technique, modules)
    return ledger


def open_checkpoints(
    adaptor: SimAdaptor,
    options: RunOptions,
    *,
    technique: str,
    settings: Mapping[str, Any],
    quantizers: Mapping[str, WeightQuantizer],
    data: Iterable[tuple[str, Tensor]],
    device: torch.device | str,
    **more: Any,
) -> Checkpoints | None:
    """Open the folder of checkpoints of a run, None if there is to be none.

    :param quantizers: Quantizers of the layers to decide, by name.
    :param data: Tensors of the calibration data, by name.
    :param device: Device on which the run computes.
    :param more: Further parts of the run's fingerprint.
    :raises ValueError: the folder belongs to another run.
    """
    if options.checkpoint_dir is None:
        return None
    fingerprint = {
        **environment(device),
        "technique": technique,
        "settings": dict(settings),
        "layers": {name: q.spec().to_dict() for name, q in quantizers.items()},
        "weights": weights_hash(adaptor),
        **more,
        "data": hash_tensors(data),
    }
    return Checkpoints(options.checkpoint_dir, fingerprint)


def on_grid(quantizer: WeightQuantizer, *, free_blocks: bool = False) -> Tensor:
    """Return a weight as its quantizer rounds it.

    :param free_blocks: True for LPBQ's blocks as if each had its own float scale.
    """
    weight = quantizer.weight.detach()
    grid = quantizer.free_grid() if free_blocks else quantizer.grid()
    return fake_quantize(weight, grid)


class OnGrids(Mapping[str, Tensor]):
    """Weights of layers that are not decided, on their grids, computed when they are asked for.

    The grids are read at once: later on the quantizers are out of the model.

    :param quantizers: Quantizers of the layers, by name.
    :param free_blocks: True for LPBQ's blocks as if each had its own float scale.
    """

    def __init__(
        self, quantizers: Mapping[str, WeightQuantizer], *, free_blocks: bool = False
    ) -> None:
        self.layers = {
            name: (quantizer, quantizer.free_grid() if free_blocks else quantizer.grid())
            for name, quantizer in quantizers.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        quantizer, grid = self.layers[name]
        return fake_quantize(quantizer.weight.detach(), grid)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that the GPU held since the last reset, or the process ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
