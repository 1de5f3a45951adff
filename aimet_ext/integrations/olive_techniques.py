"""Techniques for Olive's ``AimetQuantization`` pass, each a call of the public function.

``lpbq``, ``seqmse`` and ``adaround`` take the arguments of the techniques that Olive ships, with
the same defaults, and take their places; ``omniquant`` and ``gptq`` are new. All of them take the
settings of their parameter class as well, and an argument that is wrong is an error.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from olive.passes.onnx.aimet_quantization import SUPPORTED_TECHNIQUES, _AimetTechnique
from pydantic import ValidationError

import aimet_ext
from aimet_ext.config import (
    AdaRoundParams,
    GPTQParams,
    OmniQuantParams,
    OnIndivisible,
    SeqMSEParams,
)

__all__ = [
    "GPTQ",
    "LPBQ",
    "Adaround",
    "OmniQuant",
    "SeqMSE",
    "check_techniques",
    "reports_of",
    "with_defaults",
]

logger = logging.getLogger(__name__)

_CHOOSING_RANGES = {"seqmse", "omniquant"}

# Attribute of a simulation in which techniques leave their reports, (name, report) each.
_REPORTS = "aimet_ext_reports"


def check_techniques(techniques: Any) -> None:
    """Check the techniques of a pass: names, names of arguments, and values of settings.

    :param techniques: as in a workflow: ``[{"name": "seqmse", "num_candidates": 20}]``.
    :raises ValueError: an unknown technique or argument, or a value that is not allowed.
    """
    for technique in techniques:
        if not isinstance(technique, Mapping) or not isinstance(technique.get("name"), str):
            raise ValueError(  # noqa: TRY004 - one mistake in a file like others
                f'each technique must be an object with a "name", such as '
                f'{{"name": "seqmse"}}, got {technique!r}'
            )
        name = technique["name"].lower()
        if name not in SUPPORTED_TECHNIQUES:
            raise ValueError(
                f"{technique['name']!r} is no technique of AimetQuantization; these are "
                f"{', '.join(sorted(SUPPORTED_TECHNIQUES))}"
            )
        arguments = {key: value for key, value in technique.items() if key != "name"}
        if not SUPPORTED_TECHNIQUES[name].validate_args(**arguments):
            # Of a technique that is not ours, which logs what is wrong.
            raise ValueError(f"technique {name!r} does not take {', '.join(arguments)}")


def with_defaults(techniques: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Techniques as they are applied one after the other.

    Scales of LPBQ that a later technique chooses are not chosen, and thereby frozen, before.
    """
    found = [dict(technique) for technique in techniques]
    for place, technique in enumerate(found):
        later = {other["name"].lower() for other in found[place + 1 :]}
        if technique["name"].lower() == "lpbq" and later & _CHOOSING_RANGES:
            technique.setdefault("search", False)
    return found


def reports_of(sim: Any) -> list[dict[str, Any]]:
    """What techniques reported, in order: plain values, and a summary for people."""
    found = []
    for name, report in getattr(sim, _REPORTS, ()):
        # The report of grids has no numbers, but may hold that of a search.
        numbers = report if hasattr(report, "to_dict") else getattr(report, "search", None)
        values = {} if numbers is None else numbers.to_dict()
        found.append({**values, "technique": name, "summary": str(report)})
    return found


class _Checked:
    """Arguments are those of ``apply``; ``**settings`` are the fields of ``params``."""

    params: ClassVar[Any] = None

    @classmethod
    def validate_args(cls, **arguments: Any) -> bool:
        """Check arguments without a simulation.

        :raises ValueError: one that is unknown, missing, or not allowed.
        """
        name = cls.__name__.lower()
        known = inspect.signature(cls.apply).parameters  # type: ignore[attr-defined]
        named = [key for key, p in known.items() if p.kind is p.KEYWORD_ONLY]
        fields = [field.name for field in dataclasses.fields(cls.params)] if cls.params else []
        unknown = [key for key in arguments if key not in named and key not in fields]
        if unknown:
            raise ValueError(
                f"technique {name!r} has no argument {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(dict.fromkeys([*named, *fields]))}"
            )
        if cls.params is not None:
            given = {key: value for key, value in arguments.items() if key in fields}
            try:
                cls.params(**_plain(given))
            except ValidationError as error:
                wrong = "; ".join(
                    f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}, "
                    f"got {item['input']!r}"
                    for item in error.errors()
                )
                raise ValueError(f"technique {name!r}: {wrong}") from error
        return True


class LPBQ(_Checked, _AimetTechnique):
    """Low-power blockwise quantization of weights."""

    @staticmethod
    def apply(
        sim: Any,
        *,
        data_config: Any = None,
        op_types: Iterable[str] = ("Conv", "Gemm", "MatMul"),
        bitwidth: int = 4,
        decompressed_bw: int = 8,
        block_size: int = 64,
        nodes_to_exclude: Sequence[str] | None = None,
        on_indivisible: OnIndivisible = "error",
        search: bool = True,
    ) -> Any:
        """Give weights blocks with integer scales; see :func:`aimet_ext.apply_lpbq`.

        :param on_indivisible: what to do with a layer whose width ``block_size`` does not divide:
            ``"error"``, or ``"per_channel"``. AIMET leaves such a layer as it is.
        :param search: choose scales by the layers' output error, as does SeqMSE, instead of by the
            largest weights as AIMET does. The pass leaves this to a later technique that does it.
        """
        report = aimet_ext.apply_lpbq(
            sim,
            data_config if search else None,
            block_size,
            bitwidth=bitwidth,
            scale_bits=decompressed_bw - bitwidth,
            layers=tuple(op_types),
            modules_to_exclude=tuple(nodes_to_exclude or ()),
            on_indivisible=on_indivisible,
            progress=False,
        )
        return _reported(sim, "lpbq", report)


class SeqMSE(_Checked, _AimetTechnique):
    """Ranges of weights by a search, layer after layer."""

    params = SeqMSEParams

    @staticmethod
    def apply(
        sim: Any,
        *,
        data_config: Any = None,
        num_candidates: int = 20,
        nodes_to_exclude: Sequence[str] | None = None,
        **settings: Any,
    ) -> Any:
        """See :func:`aimet_ext.apply_seq_mse`."""
        report = aimet_ext.apply_seq_mse(
            sim,
            data_config,
            num_candidates,
            modules_to_exclude=nodes_to_exclude,
            progress=False,
            **_plain(settings),
        )
        return _reported(sim, "seqmse", report)


class Adaround(_Checked, _AimetTechnique):
    """Learnt rounding of weights."""

    params = AdaRoundParams

    @staticmethod
    def apply(
        sim: Any,
        *,
        data_config: Any = None,
        num_iterations: int = 10000,
        nodes_to_exclude: Sequence[str] | None = None,
        **settings: Any,
    ) -> Any:
        """See :func:`aimet_ext.apply_adaround`."""
        report = aimet_ext.apply_adaround(
            sim,
            data_config,
            num_iterations,
            modules_to_exclude=nodes_to_exclude,
            progress=False,
            **_plain(settings),
        )
        return _reported(sim, "adaround", report)


class OmniQuant(_Checked, _AimetTechnique):
    """Learnt clipping and equivalent scales, decoder block after decoder block."""

    params = OmniQuantParams

    @staticmethod
    def apply(
        sim: Any,
        *,
        data_config: Any = None,
        num_iterations: int = 800,
        nodes_to_exclude: Sequence[str] | None = None,
        **settings: Any,
    ) -> Any:
        """See :func:`aimet_ext.apply_omniquant`."""
        report = aimet_ext.apply_omniquant(
            sim,
            data_config,
            num_iterations,
            modules_to_exclude=tuple(nodes_to_exclude or ()),
            progress=False,
            **_plain(settings),
        )
        return _reported(sim, "omniquant", report)


class GPTQ(_Checked, _AimetTechnique):
    """Rounding of weights, column after column, each making up for the errors before."""

    params = GPTQParams

    @staticmethod
    def apply(
        sim: Any,
        *,
        data_config: Any = None,
        nodes_to_exclude: Sequence[str] | None = None,
        **settings: Any,
    ) -> Any:
        """See :func:`aimet_ext.apply_gptq`."""
        report = aimet_ext.apply_gptq(
            sim,
            data_config,
            modules_to_exclude=nodes_to_exclude,
            progress=False,
            **_plain(settings),
        )
        return _reported(sim, "gptq", report)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from JSON, in which tuples are lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def _reported(sim: Any, name: str, report: Any) -> Any:
    """Leave the report at the simulation, for the pass to write."""
    logger.info("%s:\n%s", name, report)
    setattr(sim, _REPORTS, [*getattr(sim, _REPORTS, ()), (name, report)])
    return sim
