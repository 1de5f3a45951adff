"""Options that name techniques and their settings, read into parameters in order."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import typer

from aimet_ext.cli.errors import message_of
from aimet_ext.config import AdaRoundParams, GPTQParams, OmniQuantParams, SeqMSEParams

__all__ = ["Params", "Technique", "chosen"]

Params: TypeAlias = OmniQuantParams | SeqMSEParams | GPTQParams | AdaRoundParams


class Technique(str, enum.Enum):
    """How weights and ranges are chosen; the value is the name after ``apply_``."""

    OMNIQUANT = "omniquant"
    SEQ_MSE = "seq_mse"
    GPTQ = "gptq"
    ADAROUND = "adaround"
    NEAREST = "nearest"


# What each technique decides, by when it has to, and its settings; plain rounding has none.
_SCALES, _RANGES, _INTEGERS = range(3)
_TECHNIQUES: Mapping[str, tuple[int, type[Params]]] = {
    Technique.OMNIQUANT.value: (_SCALES, OmniQuantParams),
    Technique.SEQ_MSE.value: (_RANGES, SeqMSEParams),
    Technique.GPTQ.value: (_INTEGERS, GPTQParams),
    Technique.ADAROUND.value: (_INTEGERS, AdaRoundParams),
}


def chosen(
    techniques: Sequence[Technique],
    settings: Sequence[str],
    *,
    num_iterations: int | None,
    seed: int,
) -> dict[str, Params]:
    """The techniques to apply, in order, each with its parameters; none for plain rounding.

    :param settings: texts such as ``gptq.beams=4``.
    :param num_iterations: of OmniQuant, if given.
    :param seed: of every technique that has one, unless ``settings`` say otherwise.
    :raises typer.BadParameter: an order that the library refuses, or a wrong setting.
    """
    names = [technique.value for technique in techniques]
    _check_order(names)
    values: dict[str, dict[str, Any]] = {name: {} for name in names if name in _TECHNIQUES}
    given = [("--set", *_parsed(text)) for text in settings]
    if num_iterations is not None:
        given.append(
            ("--num-iterations", Technique.OMNIQUANT.value, "num_iterations", num_iterations)
        )
    for option, name, field, value in given:
        if name not in values:
            raise typer.BadParameter(
                f"{field} is a setting of {name}, which is not among the techniques "
                f"({', '.join(names)}); add --technique {name} or leave it out",
                param_hint=option,
            )
        if field in values[name]:
            raise typer.BadParameter(f"{name}.{field} is given twice", param_hint=option)
        values[name][field] = value
    return {name: _params(name, fields, seed) for name, fields in values.items()}


def _check_order(names: Sequence[str]) -> None:
    """Refuse what would fail in the middle of the work.

    :raises typer.BadParameter: plain rounding with a technique, or one technique after another
        that leaves it nothing to decide.
    """
    if len(names) > 1 and Technique.NEAREST.value in names:
        raise typer.BadParameter(
            "nearest is plain rounding, without a technique: give it alone",
            param_hint="--technique",
        )
    for earlier, later in itertools.pairwise(names):
        if _TECHNIQUES[earlier][0] >= _TECHNIQUES[later][0]:
            raise typer.BadParameter(
                f"{later} cannot follow {earlier}; the order is omniquant, seq_mse, then gptq or "
                "adaround, each at most once",
                param_hint="--technique",
            )


def _parsed(text: str) -> tuple[str, str, Any]:
    """Technique, field and value of ``gptq.beams=4``; a word that is no JSON is itself.

    :raises typer.BadParameter: another form, or an unknown technique or field.
    """
    place, equals, word = text.partition("=")
    name, dot, field = place.partition(".")
    if not (equals and dot):
        raise typer.BadParameter(
            f"a setting such as gptq.beams=4 is required, got {text!r}", param_hint="--set"
        )
    if name not in _TECHNIQUES:
        raise typer.BadParameter(
            f"{name!r} is no technique with settings; these are {', '.join(_TECHNIQUES)}",
            param_hint="--set",
        )
    fields = _fields(name)
    if field not in fields:
        raise typer.BadParameter(
            f"{name} has no setting {field!r}; it has {', '.join(fields)}", param_hint="--set"
        )
    try:
        value = json.loads(word)
    except ValueError:
        value = word
    return name, field, tuple(value) if isinstance(value, list) else value


def _params(name: str, values: Mapping[str, Any], seed: int) -> Params:
    """Parameters of a technique, checked.

    :raises typer.BadParameter: a value that is not allowed.
    """
    seeded = {"seed": seed} if "seed" in _fields(name) else {}
    try:
        return _TECHNIQUES[name][1](**{**seeded, **values})
    except ValueError as error:
        raise typer.BadParameter(f"{name}: {message_of(error)}", param_hint="--set") from error


def _fields(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(_TECHNIQUES[name][1])]
