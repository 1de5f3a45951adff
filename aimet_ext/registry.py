"""The techniques of the package, one row each.

A row holds names alone, so that reading it imports nothing. The public names, the command line,
Olive's techniques and the contract tests follow from the rows.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

#: What a technique decides, in the order in which techniques follow one another: "rotation" and
#: "smoothing" rescale weights alone, "scales" chooses ranges with them; "polish" changes the scales
#: of integers that were decided.
Decides = Literal[
    "grids",
    "rotation",
    "smoothing",
    "scales",
    "ranges",
    "integers",
    "polish",
    "activations",
]


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A row of the table.

    :param name: Name in the ledger, in reports and on the command line.
    :param function: Home of the public function, ``"module:apply_<name>"``.
    :param params: Home of the class of its settings, ``"module:class"``.
    :param decides: Property of the weights that it decides.
    :param unit: Part of a model that is worked on at a time.
    :param number: Setting in third position of the call; None if there is none.
    :param reference: True if it is given the float model or its outputs as ``reference``, since
        the simulation no longer holds them.
    :param data_free: True if it decides from weights alone, and reads no data.
    :param freezes_if: Setting without which ranges of weights stay open; None for what follows from
        ``decides``.
    :param resumes: False if nothing is searched that a checkpoint could keep.
    :param aimet: AIMET's function whose calls are understood, ``"module:function"``; None if AIMET
        has none of that form.
    :param aimet_order: Names of this package for the arguments of AIMET's function, in its order;
        empty for the own order.
    :param olive: Name in a workflow of Olive; None for a technique that Olive is not given.
    :param olive_defaults: Settings that have other defaults there.
    :param page: Page of the documentation; None for a technique without one.
    """

    name: str
    function: str
    params: str
    decides: Decides
    unit: Literal["layer", "block"] = "layer"
    number: str | None = None
    reference: bool = False
    data_free: bool = False
    freezes_if: str | None = None
    resumes: bool = True
    aimet: str | None = None
    aimet_order: tuple[str, ...] = ()
    olive: str | None = None
    olive_defaults: dict[str, Any] = field(default_factory=dict)
    page: str | None = None

    @property
    def rank(self) -> int:
        """Place in an order of techniques, in which ranks rise."""
        return get_args(Decides).index(self.decides)

    @property
    def rounds(self) -> bool:
        """True if it decides integers, so that the weights are on their grids afterwards."""
        return self.decides == "integers"

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the positional arguments, in AIMET's order."""
        own = ("sim", "dataloader", *([self.number] if self.number else []))
        return self.aimet_order or own


TECHNIQUES: dict[str, Technique] = {
    row.name: row
    for row in (
        Technique(
            name="smoothquant",
            function="aimet_ext.techniques.smoothquant:apply_smoothquant",
            params="aimet_ext.config:SmoothQuantParams",
            decides="smoothing",
            unit="block",
            number="alpha",
            olive="smoothquant",
            page="smoothquant",
        ),
        Technique(
            name="awq",
            function="aimet_ext.techniques.awq:apply_awq",
            params="aimet_ext.config:AWQParams",
            decides="smoothing",
            unit="block",
            number="num_grid",
            freezes_if="clip",
            olive="awq",
            page="awq",
        ),
        Technique(
            name="omniquant",
            function="aimet_ext.techniques.omniquant:apply_omniquant",
            params="aimet_ext.config:OmniQuantParams",
            decides="scales",
            unit="block",
            number="num_iterations",
            aimet="aimet_torch.experimental.omniquant:apply_omniquant",
            aimet_order=("sim", "dataloader", "forward_fn", "num_iterations", "output_path"),
            olive="omniquant",
            page="omniquant",
        ),
        Technique(
            name="seq_mse",
            function="aimet_ext.techniques.seq_mse:apply_seq_mse",
            params="aimet_ext.config:SeqMSEParams",
            decides="ranges",
            number="num_candidates",
            aimet="aimet_torch.seq_mse:_apply_seq_mse",  # the public one takes anything
            aimet_order=(
                *("sim", "dataloader", "num_candidates", "forward_fn", "modules_to_exclude"),
                *("checkpoints_config", "cache_dir"),
            ),
            olive="seqmse",
            page="seq_mse",
        ),
        Technique(
            name="gptq",
            function="aimet_ext.techniques.gptq:apply_gptq",
            params="aimet_ext.config:GPTQParams",
            decides="integers",
            olive="gptq",
            page="gptq",
        ),
        Technique(
            name="adaround",
            function="aimet_ext.techniques.adaround:apply_adaround",
            params="aimet_ext.config:AdaRoundParams",
            decides="integers",
            number="num_iterations",
            olive="adaround",
            olive_defaults={"num_iterations": 10000},  # as the technique that Olive ships
            page="adaround",
        ),
        Technique(
            name="autoround",
            function="aimet_ext.techniques.autoround:apply_autoround",
            params="aimet_ext.config:AutoRoundParams",
            decides="integers",
            unit="block",
            number="num_iterations",
            olive="autoround",
            page="autoround",
        ),
        Technique(
            name="rtn",
            function="aimet_ext.techniques.rtn:apply_rtn",
            params="aimet_ext.config:RTNParams",
            decides="integers",
            data_free=True,
            olive="rtn",
            page="rtn",
        ),
        Technique(
            name="hqq",
            function="aimet_ext.techniques.hqq:apply_hqq",
            params="aimet_ext.config:HQQParams",
            decides="integers",
            number="num_iterations",
            data_free=True,
            olive="hqq",
            page="hqq",
        ),
        Technique(
            name="dwq",
            function="aimet_ext.techniques.dwq:apply_dwq",
            params="aimet_ext.config:DWQParams",
            decides="polish",
            number="num_iterations",
            reference=True,
            olive="dwq",
            page="dwq",
        ),
        Technique(
            name="lpbq",
            function="aimet_ext.techniques.lpbq:apply_lpbq",
            params="aimet_ext.config:SeqMSEParams",
            decides="grids",
            number="block_size",
            freezes_if="search",
            olive="lpbq",
            page="lpbq",
        ),
        Technique(
            name="rotation",
            function="aimet_ext.techniques.rotation:apply_rotation",
            params="aimet_ext.config:RotationParams",
            decides="rotation",
            unit="block",
            resumes=False,
            olive="quarot",
            page="rotation",
        ),
        Technique(
            name="spinquant",
            function="aimet_ext.techniques.spinquant:apply_spinquant",
            params="aimet_ext.config:SpinQuantParams",
            decides="rotation",
            unit="block",
            number="num_iterations",
            olive="spinquant",
            page="spinquant",
        ),
        Technique(
            name="activation_ranges",
            function="aimet_ext.techniques.activation_ranges:apply_activation_ranges",
            params="aimet_ext.config:ActivationRangesParams",
            decides="activations",
            olive="activation_ranges",
            page="activation_ranges",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A technique in an order of techniques.

    :param row: Its row.
    :param name: Name that the user gave it.
    :param settings: Settings that were given.
    :param exclude: Layers that it is to leave alone.
    """

    row: Technique
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    exclude: Sequence[str] = ()

    @property
    def freezes(self) -> bool:
        """True if ranges of weights are frozen afterwards."""
        if self.row.freezes_if is not None:
            return bool(self.settings.get(self.row.freezes_if, True))
        return self.row.decides in ("scales", "ranges", "integers")


def check_order(names: Sequence[str], rows: Mapping[str, Technique]) -> None:
    """Refuse an order of techniques that would fail in the middle of the work.

    :param names: Techniques in the order in which they are to be applied.
    :param rows: Rows of all that there are, by those names.
    :raises ValueError: One follows another that decides as much or more.
    """
    for earlier, later in itertools.pairwise(names):
        if rows[earlier].rank >= rows[later].rank:
            ordered = sorted(rows, key=lambda name: rows[name].rank)
            groups = itertools.groupby(ordered, lambda name: rows[name].rank)
            *first, last = (" or ".join(group) for _, group in groups)
            raise ValueError(
                f"{later!r} cannot follow {earlier!r}; the order is {', '.join(first)}, then {last}"
                ", each at most once"
            )


def load(home: str) -> Any:
    """Import a function or a class of a row.

    :param home: ``"module:name"``.
    """
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(module), name)


def public_homes() -> dict[str, str]:
    """Return the module of every public name that the rows add to the package."""
    homes = [home for row in TECHNIQUES.values() for home in (row.function, row.params)]
    return {name: module for module, _, name in (home.partition(":") for home in homes)}
