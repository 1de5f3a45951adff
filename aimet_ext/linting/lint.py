"""What a chip will refuse, or compute otherwise, found before anything is exported."""

from __future__ import annotations

from typing import Any

from aimet_ext.findings import Finding
from aimet_ext.integrations.qnn_targets import HtpTarget, find_target
from aimet_ext.linting.facts import SimFacts
from aimet_ext.linting.limits import LIMITS
from aimet_ext.linting.rules import RULES
from aimet_ext.sim.protocol import adapt

__all__ = ["lint"]


def lint(sim: Any, target: str | HtpTarget = "htp_v79") -> list[Finding]:
    """What of a simulation a chip's HTP does not compute as the simulation does.

    Nothing is run, compiled or changed: looked at are widths of weights and activations, grids,
    block sizes, biases beside LPBQ, lookup tables, ranges that are fixed, absent or ruined by a
    mask, layers left float, and caches whose input and output differ. A simulation without findings
    can still fail; ``aimet_ext.verify`` compiles and runs it.

    :param sim: ``aimet_torch.QuantizationSimModel`` or ``aimet_onnx.QuantizationSimModel``, best
        after ``sim.compute_encodings``.
    :param target: architecture (``"htp_v75"``) or chip (``"sm8650"``).
    :returns: the findings, each with what to do about it; none if there is nothing.
    :raises ValueError: the target is not known.
    :raises TypeError: ``sim`` is no simulation.

    >>> for finding in lint(sim, target="htp_v75"):
    ...     print(finding)
    """
    limits = LIMITS[find_target(target).arch]
    facts = _facts(sim)
    return [finding for rule in RULES for finding in rule(facts, limits)]


def _facts(sim: Any) -> SimFacts:
    adaptor = adapt(sim)
    if hasattr(adaptor, "graph"):
        from aimet_ext.linting.onnx import onnx_facts

        return onnx_facts(adaptor)
    from aimet_ext.linting.torch import torch_facts

    return torch_facts(adaptor)
