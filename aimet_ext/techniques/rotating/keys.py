"""Maps of a model's keys, fitted to what an error of each costs the outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aimet_ext.analysis.divergence import Reference
from aimet_ext.config import RotationParams
from aimet_ext.core.hadamard import hadamard
from aimet_ext.core.key_maps import KeyMap, fit_key_map
from aimet_ext.data.batches import token_mask
from aimet_ext.errors import TransformRefused
from aimet_ext.progress import bar as progress_bar
from aimet_ext.techniques.call import Call
from aimet_ext.techniques.rotating.run import Plan, allowed_change

_DRAWS = 4  # of outcomes for each batch


@dataclass(eq=False)
class _Keys:
    """The keys of one attention, and what an error of each costs.

    :param parts: ``[key heads, tokens, width]`` of each batch, in float32.
    :param fisher: Sum over tokens of the gradients' products, ``[key heads, width, width]``.
    """

    parts: list[Tensor] = field(default_factory=list)
    fisher: Tensor = field(default_factory=lambda: torch.zeros(()))


def fit_keys(plan: Plan, call: Call[RotationParams]) -> tuple[tuple[KeyMap, ...], dict[str, float]]:
    """Return a map of the keys of each attention, and what keys of 8 bits cost.

    :raises TransformRefused: A softmax of the model sees shifts of its keys.
    :raises ValueError: The model's keys are not found, or its outputs are no logits.
    """
    forward_fn, progress = call.options.forward_fn, call.options.progress
    with plan.adaptor.running((), forward_fn) as run:
        torch_model = plan.adaptor.framework == "torch" and forward_fn is None
        model = plan.adaptor.model if torch_model else None
        reference = Reference(run, plan.batches, model)
    _prove_shifts(plan, call, reference)
    every = _gather(plan, call, reference)
    maps: list[KeyMap] = []
    losses: dict[str, float] = {}
    for number in progress_bar(sorted(every), desc="maps of keys", shown=progress):
        keys, fisher = torch.cat(every[number].parts, 1), every[number].fisher
        fisher = fisher / reference.count  # for a row of the outputs
        maps.append(fit_key_map(keys, fisher, steps=call.params.r3_steps))
        width = keys.shape[-1]
        alike = {"plain": torch.eye(width), "hadamard": hadamard(width)}
        tried = {n: KeyMap.alike(m, len(keys)) for n, m in alike.items() if m is not None}
        for name, own in {**tried, "fitted": maps[-1]}.items():
            losses[name] = losses.get(name, 0.0) + own.noise(keys, fisher)
    return tuple(maps), losses


def _gather(plan: Plan, call: Call[RotationParams], reference: Reference) -> dict[int, _Keys]:
    """Return keys and Fisher information of each attention."""
    generator = torch.Generator().manual_seed(call.params.seed)
    every: dict[int, _Keys] = {}
    seen: dict[int, Tensor] = {}

    def see(number: int, keys: Tensor) -> Tensor:
        seen[number] = keys if keys.requires_grad else keys.detach().requires_grad_()
        return seen[number]

    seeing = plan.adaptor.seeing_keys(see, call.options.forward_fn)
    bar = progress_bar(plan.batches, desc="gradients of keys", shown=call.options.progress)
    with seeing as run, torch.enable_grad():
        for place, batch in enumerate(bar):
            seen.clear()
            rows = reference.rows(place, run(batch)).log_softmax(-1)
            chances = reference.log_probabilities(place).exp().cpu()
            real = _real(plan, call, batch)
            for number, keys in seen.items():
                every.setdefault(number, _Keys()).parts.append(_flat(keys.detach(), real).float())
            for _ in range(_DRAWS):
                chosen = torch.multinomial(chances, 1, generator=generator).to(rows.device)
                found = torch.autograd.grad(
                    rows.gather(1, chosen).sum(), list(seen.values()), retain_graph=True
                )
                for number, gradient in zip(seen, found, strict=True):
                    flat = _flat(gradient, None).double()
                    every[number].fisher = every[number].fisher + flat.mT @ flat / _DRAWS
    return every


def _real(plan: Plan, call: Call[RotationParams], batch: object) -> Tensor | None:
    model = plan.adaptor.model if plan.adaptor.framework == "torch" else None
    return token_mask(batch, None if call.options.forward_fn else model)


def _flat(keys: Tensor, real: Tensor | None) -> Tensor:
    """Return keys ``[key heads, tokens, width]`` of real tokens, on the processor."""
    keys = keys.as_subclass(Tensor).movedim(1, 0).cpu()  # [key heads, batch, tokens, width]
    if real is None or real.shape != keys.shape[1:3]:
        return keys.flatten(1, 2)
    return keys[:, real.cpu()]


def _prove_shifts(plan: Plan, call: Call[RotationParams], reference: Reference) -> None:
    """Refuse a model whose outputs change when all keys of a head are shifted alike.

    :raises TransformRefused: They do.
    """
    generator = torch.Generator().manual_seed(call.params.seed)

    def shifted(_: int, keys: Tensor) -> Tensor:
        size = (keys.shape[1], 1, keys.shape[3])
        return keys + keys.std() * torch.randn(size, generator=generator).to(keys)

    seeing = plan.adaptor.seeing_keys(shifted, call.options.forward_fn)
    with seeing as run, torch.no_grad():
        rows = reference.rows(0, run(plan.batches[0])).log_softmax(-1)
    expected = reference.log_probabilities(0)
    deviation = float((rows - expected).abs().max() / expected.abs().max())
    bound = allowed_change(next(plan.adaptor.model.parameters(), rows).dtype)
    if not deviation <= bound:  # NaN fails
        raise TransformRefused(
            'r3="fitted": a softmax that does not see when all keys are shifted alike is required, '
            f"but max|change| / max|output| of log-probabilities is {deviation:.1e} (at most "
            f"{bound:.0e} is allowed); pass r3=True"
        )
