"""The frame of a run that all techniques share: options, undo, checkpoints, layers to decide."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.core.affine import fake_quantize, to_blocks
from aimet_ext.core.interrupts import uninterrupted
from aimet_ext.data.batches import ForwardFn
from aimet_ext.data.geometry import Geometry
from aimet_ext.files.folders import writable_folder
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.scratch import remove_abandoned, scratch
from aimet_ext.files.tensors import Checkpoints, UndoJournal, environment, hash_tensors
from aimet_ext.models.topology import BlockTopology
from aimet_ext.sim.protocol import SimAdaptor, SimHandle, WeightQuantizer
from aimet_ext.techniques.excluded import LAYERS, excluded_names
from aimet_ext.techniques.report import TIED

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The arguments of a run that are not its data."""

    forward_fn: ForwardFn | None = None
    checkpoint_dir: str | Path | None = None
    cache_dir: str | Path | None = None
    device: torch.device | str | None = None
    progress: bool = True


def _weights_hash(adaptor: SimAdaptor) -> str:
    """Hash all float parameters under their original names, in the order of these (SHA-256)."""
    rename = adaptor.original_names()
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
        remove_abandoned(cache_dir, "aimet_ext-*.scratch")  # caches that a resumed run needs not
    with nullcontext() if cache_dir is None else scratch(cache_dir, "aimet_ext-undo") as folder:
        journal = UndoJournal(folder)
        ledger, put_back = adaptor.ledger, adaptor.remembered()

        def keep(module: str) -> None:
            if module not in journal:
                journal.save(module, *adaptor.snapshot(module, weights=weights))

        try:
            with adaptor.preserved_state():
                adaptor.model.eval()
                adaptor.model.zero_grad(set_to_none=True)
                yield keep
        except BaseException:
            with uninterrupted():
                adaptor.ledger = ledger
                put_back()
                with adaptor.preserved_state():
                    for module in reversed(journal.keys()):  # later ones share weights
                        adaptor.restore(module, *journal.restore(module))
            raise
        finally:
            journal.clear()


def open_ledger(
    adaptor: SimAdaptor, technique: str, modules: Sequence[str], *, rounded: bool = False
) -> Ledger:
    """Return the simulation's ledger, a new one if needed, once the technique may be applied.

    :param rounded: True if the technique works on rounded weights.
    :raises ValueError: the technique was applied before, the weights are rounded, or a parameter
        holds NaN.
    """
    rename = adaptor.original_names()
    state = adaptor.float_state()
    _refuse(
        [rename(name) for name in state if bool(state[name].isnan().any())],
        "must be finite, it holds NaN; repair the checkpoint",
    )
    ledger = adaptor.ledger or Ledger(origin=_weights_hash(adaptor))
    ledger.check_can_apply(technique, modules, rounded=rounded)
    return ledger


@contextmanager
def open_checkpoints(
    adaptor: SimAdaptor,
    options: RunOptions,
    *,
    technique: str,
    settings: Mapping[str, Any],
    quantizers: Mapping[str, WeightQuantizer],
    data: Iterable[tuple[str, Tensor]],
    device: torch.device | str,
    activations: bool = False,
) -> Iterator[Checkpoints | None]:
    """Open the folder of checkpoints of a run for the time of a context; None: there is to be none.

    :param quantizers: Quantizers of the layers to decide, by name.
    :param data: Tensors of the calibration data, by name.
    :param device: Device on which the run computes.
    :param activations: True if the run depends on how activations are quantized.
    :raises ValueError: the folder belongs to another run.
    """
    if options.checkpoint_dir is None:
        yield None
        return
    every = {**adaptor.weight_quantizers(), **adaptor.other_quantizers()}
    others = {name: quantizer for name, quantizer in every.items() if name not in quantizers}
    fixed = {**others, **{name: q for name, q in quantizers.items() if q.frozen}}
    fingerprint = {
        **environment(device),
        "technique": technique,
        "settings": dict(settings),
        "layers": {name: q.spec().to_dict() for name, q in quantizers.items()},
        "others": {name: q.spec().to_dict() for name, q in others.items()},
        "ranges": _ranges_hash({name: q for name, q in fixed.items() if q.initialized}),
        "weights": _weights_hash(adaptor),
        "data": hash_tensors(data),
        **({"activations": _activation_specs(adaptor)} if activations else {}),
    }
    with closing(Checkpoints(options.checkpoint_dir, fingerprint)) as checkpoints:
        yield checkpoints


def _activation_specs(adaptor: SimAdaptor) -> dict[str, dict[str, Any]]:
    """Return the integers of activations, and the ranges of those that a run leaves alone."""
    return {
        point.place: {
            "integers": f"{point.qmin} to {point.qmax}",
            "symmetric": point.symmetric,
            "range": f"{point.low!r} to {point.high!r}" if point.frozen else "free",
        }
        for point in adaptor.points().values()
        if point.kind != "weight"
    }


def _ranges_hash(quantizers: Mapping[str, WeightQuantizer]) -> str:
    """Hash the ranges that a run takes as they are (SHA-256)."""
    grids = ((name, quantizers[name].grid()) for name in sorted(quantizers))
    return hash_tensors(
        (f"{name}.{field}", getattr(grid, field))
        for name, grid in grids
        for field in ("scale", "offset")
    )


class OnGrids(Mapping[str, Tensor]):
    """Weights of layers on their grids, computed when they are asked for.

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
        return quantizer.stored(fake_quantize(quantizer.weight.detach(), grid))

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


# ---- the layers to decide ------------------------------------------------------------------------


def layers_to_quantize(
    adaptor: SimAdaptor,
    blocks: Sequence[BlockTopology],
    exclude: Sequence[str | nn.Module],
    *,
    technique: str,
    rounds: bool,
) -> dict[str, WeightQuantizer]:
    """Return the weight quantizers of the layers to decide, by their full names, checked.

    :param exclude: Layers to leave alone.
    :param technique: Name of the technique.
    :param rounds: True if the technique rounds weights, on frozen ranges too.
    :raises ValueError: An excluded layer does not exist; a layer has no weight quantizer, a frozen
        one, one of too many bits; a weight is not finite or rounded already.
    """
    names = [f"{block.name}.{layer}" for block in blocks for layer in block.linears]
    excluded = excluded_names(adaptor, exclude, blocks)
    found = {name: adaptor.weight_quantizer(name) for name in names if name not in excluded}
    _refuse(
        [name for name, quantizer in found.items() if quantizer is None],
        "must have a weight quantizer and has none; give it one, or list it in modules_to_exclude",
    )
    quantizers = {name: quantizer for name, quantizer in found.items() if quantizer is not None}
    quantizers = _once_each(adaptor, blocks, quantizers)
    frozen = [name for name, quantizer in quantizers.items() if quantizer.frozen and not rounds]
    by = {name: _frozen_by(adaptor, quantizers[name].name) for name in frozen}
    for former in sorted(set(by.values())):
        _refuse(
            [name for name in frozen if by[name] == former],
            f"must have a weight quantizer that may change, but {former} froze its range, which "
            "rescaling would make wrong; start from a new sim, or list it in modules_to_exclude",
        )
    _refuse(
        [
            f"{block.name}.{name}"
            for block in blocks
            for name, parameter in adaptor.float_parameters(block.name).items()
            if not bool(torch.isfinite(parameter).all())
        ],
        "must be finite, it holds NaN or infinity; repair the checkpoint",
    )
    if rounds and adaptor.ledger is not None:  # it knows the reason for what the weights show
        adaptor.ledger.check_can_apply(technique, [q.name for q in quantizers.values()])
    _refuse_rounded(quantizers)
    if not quantizers:
        raise ValueError("at least one layer must remain, modules_to_exclude names all of them")
    return quantizers


def _once_each(
    adaptor: SimAdaptor, blocks: Sequence[BlockTopology], found: Mapping[str, WeightQuantizer]
) -> dict[str, WeightQuantizer]:
    """Return the layers without those of later blocks that hold the weight of an earlier one.

    :raises ValueError: Two of one block share a weight, or two with grids of their own do.
    """
    shared, kept = adaptor.shared_weights(), dict[str, WeightQuantizer]()
    block_of = {f"{block.name}.{layer}": block.name for block in blocks for layer in block.linears}
    for name, quantizer in found.items():
        twins = {*shared.get(quantizer.name, ())} - {quantizer.name}
        first = next((n for n, q in kept.items() if q.name in twins), None) if twins else None
        if first is None:
            kept[name] = quantizer
        elif block_of[first] == block_of[name] or not quantizer.is_of(kept[first]):
            raise ValueError(
                f"{first} and {name} share one weight, which cannot be decided twice; "
                "list all but one in modules_to_exclude"
            )
    return kept


def layers_to_turn(
    adaptor: SimAdaptor, layers: Sequence[str], parts: Sequence[str]
) -> dict[str, WeightQuantizer]:
    """Return the weight quantizers, as far as there are any, of layers whose weights will change.

    :param layers: Full names.
    :param parts: Names of the blocks and of all else whose parameters are looked at.
    :raises ValueError: A weight is rounded or its range frozen, or a parameter is not finite.
    """
    every = ((name, adaptor.weight_quantizer(name)) for name in layers)
    quantizers = {name: quantizer for name, quantizer in every if quantizer is not None}
    frozen = [name for name, quantizer in quantizers.items() if quantizer.frozen]
    by = {_frozen_by(adaptor, quantizers[name].name) for name in frozen}
    _refuse(
        frozen,
        f"must have a weight quantizer that may change, but {' or '.join(sorted(by))} froze its "
        "range, which a rotation would make wrong; start from a new sim, and rotate first",
    )
    _refuse(
        [
            f"{part}.{name}"
            for part in parts
            for name, parameter in adaptor.float_parameters(part).items()
            if not bool(torch.isfinite(parameter).all())
        ],
        "must be finite, it holds NaN or infinity; repair the checkpoint",
    )
    _refuse_rounded(quantizers)
    return quantizers


def _frozen_by(adaptor: SimHandle, layer: str) -> str:
    """Return the technique that froze the range of a layer, as far as the ledger knows."""
    runs = adaptor.ledger.runs if adaptor.ledger is not None else ()
    return next((r.technique for r in reversed(runs) if layer in r.modules), "an earlier technique")


def _refuse(names: Sequence[str], problem: str) -> None:
    """Raise an error that names some layers and the problem of each, if there are any.

    :raises ValueError: There are.
    """
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise ValueError(f"{shown}: each {problem}")


def _refuse_rounded(quantizers: Mapping[str, WeightQuantizer]) -> None:
    _refuse(
        [name for name, quantizer in quantizers.items() if _is_rounded(quantizer)],
        "must have a float weight, but it is rounded to a grid already; load the original weights",
    )


@torch.no_grad()
def _is_rounded(quantizer: WeightQuantizer) -> bool:
    """Return true if a weight has no more distinct values than its grid, in each cell tried."""
    weight = quantizer.weight.detach()
    if not bool(weight.any()):
        return False  # zeros are on every grid
    if quantizer.initialized:
        return bool(torch.equal(fake_quantize(weight, quantizer.grid()), weight))
    layout = quantizer.layout
    levels = layout.qmax - layout.qmin + 1
    blocks = (
        to_blocks(weight.flatten(1), layout.shape).transpose(1, 2).flatten(2).flatten(0, 1)
    )  # [cells, elements]
    if blocks.shape[1] < 4 * levels:
        return False
    return all(row.unique().numel() <= levels for row in blocks[:8])


@dataclass(frozen=True)
class LayerChoice:
    """The quantized layers of a simulation, by full name.

    :param decided: Layers to decide.
    :param others: Quantized layers that are left as they are, and weights that no layer has; they
        compute on their grids.
    :param skipped: Those of ``others`` that a user may expect to be decided, with the reason.
    :param together: Further layers that hold the weight of one to decide, by that one.
    """

    decided: Mapping[str, WeightQuantizer]
    others: Mapping[str, WeightQuantizer]
    skipped: dict[str, str]
    together: dict[str, list[str]]


def choose_layers(
    adaptor: SimAdaptor,
    exclude: Sequence[str | nn.Module],
    *,
    technique: str,
    max_bitwidth: int,
    rounds: bool,
    only: Collection[str] | None = None,
    rounded: bool = False,
) -> LayerChoice:
    """Sort the quantized layers of a simulation.

    :param exclude: Layers left float meanwhile, as in AIMET.
    :param technique: Name of the technique.
    :param max_bitwidth: Bits above which a layer is left alone.
    :param rounds: True if the technique rounds weights, on frozen ranges too; one that does not
        leaves frozen ranges alone.
    :param only: Layers to decide at most; None for all.
    :param rounded: True if the technique works on rounded weights; layers with others are left
        alone.
    :raises ValueError: An excluded module does not exist; nothing remains; the technique was
        applied before; a weight is not finite, is rounded already, or is shared by two layers
        with grids of their own.
    """
    excluded = excluded_names(adaptor, exclude)
    every = {n: q for n, q in adaptor.weight_quantizers().items() if n not in excluded}
    shared = adaptor.shared_weights()
    decided: dict[str, WeightQuantizer] = {}
    together: dict[str, list[str]] = {}
    known: set[str] = set()  # by their own names or by those of layers with the same weight
    skipped = dict(adaptor.unsupported_layers())
    for name, quantizer in every.items():
        module = adaptor.model.get_submodule(name)
        unasked = only is not None and name not in only
        if not isinstance(module, LAYERS) or unasked or name in known:
            continue
        twins = [twin for twin in shared.get(name, ()) if twin != name and twin in every]
        if quantizer.bitwidth > max_bitwidth:
            skipped[name] = f"{quantizer.bitwidth} bits, max_bitwidth is {max_bitwidth}"
        elif any(isinstance(adaptor.model.get_submodule(t), nn.Embedding) for t in twins):
            skipped[name] = f"{TIED} {twins[0]}"
        elif rounded and not (quantizer.initialized and _is_rounded(quantizer)):
            skipped[name] = "not rounded yet by a technique such as apply_gptq"
        elif quantizer.frozen and not rounds:
            skipped[name] = f"{_frozen_by(adaptor, name)} froze its range"
        elif twins and not _are_alike(adaptor, name, twins):
            raise ValueError(
                f"{name} and {', '.join(twins)} share one weight, which cannot be decided twice; "
                "list all but one in modules_to_exclude"
            )
        elif not _row_wise_or_whole(quantizer):
            skipped[name] = f"its grid {quantizer.shape} has cells of several output rows"
        else:
            decided[name] = quantizer
            together |= {name: twins} if twins else {}
            known |= {name, *twins}
    if adaptor.ledger is not None:  # it knows the reason for what the weights show
        adaptor.ledger.check_can_apply(technique, decided or skipped, rounded=rounded)
    _check(decided, skipped)
    if not rounded:
        _refuse_rounded(decided)
    others = {name: quantizer for name, quantizer in every.items() if name not in known}
    others.update(adaptor.other_quantizers())
    return LayerChoice(decided, others, skipped, together)


def _are_alike(adaptor: SimAdaptor, name: str, twins: Sequence[str]) -> bool:
    """Return True if layers that share a weight apply it in the same way, on the same grid."""
    own, model = adaptor.weight_quantizer(name), adaptor.model
    found = [adaptor.weight_quantizer(twin) for twin in twins]
    return (
        all(each is not None and own is not None and each.is_of(own) for each in found)
        and len({Geometry.of(model.get_submodule(n)) for n in (name, *twins)}) == 1
    )


def _check(decided: Mapping[str, WeightQuantizer], skipped: Mapping[str, str]) -> None:
    if not decided:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:4])
        raise ValueError(
            "at least one linear layer or convolution with a weight quantizer must remain to be "
            f"decided, none does ({reasons or 'there is none, or all are excluded'})"
        )
    _refuse(
        [n for n, q in decided.items() if not bool(torch.isfinite(q.weight).all())],
        "must have a finite weight, it holds NaN or infinity; repair the checkpoint",
    )


def _row_wise_or_whole(quantizer: WeightQuantizer) -> bool:
    shape, weight = quantizer.shape, quantizer.weight
    cells = (1,) * (weight.dim() - len(shape)) + tuple(shape)
    across = cells[1] == 1 or quantizer.layout.block_size is not None
    return cells[0] in (1, weight.shape[0]) and across and all(n == 1 for n in cells[2:])
