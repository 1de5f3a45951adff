"""Orders of techniques, looked at on a simulation before the first of them works."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from aimet_ext.errors import some
from aimet_ext.registry import Step
from aimet_ext.sim.protocol import SimAdaptor
from aimet_ext.techniques.session import choose_layers, layers_to_quantize


def check_steps(adaptor: SimAdaptor, steps: Sequence[Step]) -> None:
    """Refuse steps that would fail on a simulation after others have worked on it.

    :raises ValueError: A step has nothing to decide, or needs what the model does not have.
    """
    frozen: dict[str, str] = {}
    rounded: set[str] = set()
    for step in steps:
        if step.row.decides == "grids":
            continue  # nothing comes before it
        try:
            names = _decided(adaptor, step)
        except ValueError as error:
            raise ValueError(f"technique {step.name!r}: {error}") from error
        if step.row.decides == "polish":
            if not rounded.intersection(names):
                raise ValueError(
                    f"technique {step.name!r} finds nothing to decide: no technique before it "
                    f"rounds weights of {some(list(names))}; put one such as gptq before it"
                )
            continue
        left = names if step.row.rounds else [name for name in names if name not in frozen]
        if not left:
            by = frozen[next(iter(names))]
            raise ValueError(
                f"technique {step.name!r} finds nothing to decide: {by} freezes the ranges of "
                f"{some(list(names))} before; leave one of them out"
            )
        if step.row.rounds:
            rounded.update(left)
        if step.freezes:
            frozen.update(dict.fromkeys(left, step.name))


def _decided(adaptor: SimAdaptor, step: Step) -> Sequence[str]:
    """Return the layers, or the activations, that a step decides on a simulation as it is now.

    :raises ValueError: There are none, or the model is not as the step needs it.
    """
    row = step.row
    if row.decides == "activations":
        found = [point.name for point in adaptor.points().values() if point.kind != "weight"]
        if not found:
            raise ValueError("quantizers of activations are required, the simulation has none")
        return found
    if row.unit == "layer":
        most = step.settings.get("max_bitwidth", 8)
        with nullcontext() if row.decides == "polish" else adaptor.recurrent_as_linear():
            choice = choose_layers(
                adaptor,
                step.exclude,
                technique=row.name,
                max_bitwidth=most,
                rounds=row.rounds or row.decides == "polish",
            )
        return [quantizer.name for quantizer in choice.decided.values()]
    blocks = adaptor.find_blocks(None)
    if row.decides != "rotation":
        quantizers = layers_to_quantize(
            adaptor, blocks, step.exclude, technique=row.name, rounds=row.rounds
        )
        return [quantizer.name for quantizer in quantizers.values()]
    if step.settings.get("r3"):
        adaptor.check_rotary()
    return [f"{block.name}.{layer}" for block in blocks for layer in block.linears]
