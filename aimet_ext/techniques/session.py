"""What every technique that works block by block shares: nothing half-done, resumable, in order."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from aimet_ext.files.journal import UndoJournal, hash_tensors
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.tensors import writable_folder
from aimet_ext.sim.protocol import SimAdaptor

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "on_device",
    "open_ledger",
    "original_names",
    "peak_memory",
    "undo_on_failure",
    "weights_hash",
]


def original_names(model: nn.Module) -> Callable[[str], str]:
    """From a name in the model of a simulation to its name in the original checkpoint."""
    try:
        from aimet_ext.models.huggingface import original_name
    except ModuleNotFoundError:  # no transformers, so no Hugging Face model
        return lambda name: name
    return lambda name: original_name(name, model)


def weights_hash(adaptor: SimAdaptor) -> str:
    """SHA-256 of all float parameters under their original names, in the order of these."""
    rename = original_names(adaptor.model)
    state = adaptor.float_state()
    return hash_tensors((rename(name), state[name]) for name in sorted(state))


@contextmanager
def undo_on_failure(
    adaptor: SimAdaptor, cache_dir: str | Path | None, *, weights: bool = True
) -> Iterator[Callable[[str], None]]:
    """Context that leaves the simulation as it was if its body raises or is interrupted.

    :param cache_dir: folder for the originals of weights; None keeps them in RAM.
    :param weights: whether weights are going to change, or quantizers alone.
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
    """The simulation's ledger, begun if need be, after a check that the technique may be applied.

    :raises ValueError: the technique was applied before, or the weights are rounded.
    """
    ledger = adaptor.ledger or Ledger(origin=weights_hash(adaptor))
    ledger.check_can_apply(technique, modules)
    return ledger


@contextmanager
def on_device(module: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Context in which a module is on a device; it goes back to where it was."""
    home = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device is None or torch.device(device) == home:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def peak_memory(device: torch.device) -> int:
    """Most bytes that the GPU held since the last reset, or the process ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
