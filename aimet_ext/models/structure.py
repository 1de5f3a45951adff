"""Scale pairs of a block by what is seen in a run of it: which channels of a layer reach which.

Multiply a layer's output channels by ``m``. If what another one reads is then ``x_j · m_i`` in
channel ``j`` for every token, channel ``i`` of the first can be divided and column ``j`` of the
second multiplied. The gradient of ``Σ c_t x_tj`` by ``m_i`` is that sum itself for this ``i``, and
zero for all others; two random combinations of all channels, the second with a factor of each
channel's own, tell the ``j`` of every ``i`` at once. Finite multipliers of either sign then decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call

from aimet_ext.core.equivalence import PairKind, ScalePair, Side
from aimet_ext.models.proof import Float64Casts, random_scale
from aimet_ext.models.scaled_run import ScaledRun, Seen

_ORDER = ("norm_qkv", "v_o", "norm_mlp", "up_down")
_CLOSE = 1e-7  # relative, of sums of products in float64
_TRIED = 4  # channels, before a layer is given up whose channels mix
ACTIVATED = "{} goes through the activation, which does not commute with a scale"


@dataclass(eq=False)
class Reading:
    """The way from other layers' outputs to the channels that a layer reads.

    :param rows: By layer or norm, the output channel that each input channel is proportional to,
        long ``[in]``, -1 for none.
    :param reached_by: By layer or norm, which of its output channels change what is read at all.
    :param inner: By layer, the one input channel that each output channel changes, long ``[out]``;
        only where each changes one or none.
    :param mixed: Layers and norms of which a token reaches other tokens.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    reached_by: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()


class Structure:
    """The scale pairs of a block, found in a run.

    :param run: The run; its call has several tokens.
    :param readings: What every layer reads, by its name.
    :param pairs: Pairs of norms and layers with those that read them, that hold in the run.
    :param lost: Reasons for pairs that were seen and do not hold, by kind.
    """

    def __init__(self, run: ScaledRun) -> None:
        self.run = run
        self.lost: dict[str, list[str]] = {}
        self.readings = {name: read(run, name) for name in run.layers}
        found: list[ScalePair] = []
        for name in run.seen:
            for readers in self._groups(name):
                pair = self._pair(name, readers)
                reason = self._reason_against(pair, name, readers)
                if reason is None:
                    found.append(pair)
                else:
                    self.lost.setdefault(pair.kind, []).append(reason)
        found.sort(key=lambda pair: _ORDER.index(pair.kind))
        self.pairs = tuple(_distinctly_named(found))

    def _groups(self, name: str) -> list[dict[str, Tensor]]:
        """Return the readers of a layer or norm, apart where they read other channels of it."""
        groups: list[dict[str, Tensor]] = []
        for reader, reading in self.readings.items():
            rows = reading.rows.get(name)
            if rows is None:
                continue
            own = {reader: rows}
            for group in [g for g in groups if _overlap(g, rows)]:
                groups.remove(group)
                own = {**group, **own}
            groups.append(own)
        return groups

    def _pair(self, name: str, readers: Mapping[str, Tensor]) -> ScalePair:
        seen = self.run.seen[name]
        kind = self._kind(name, readers)
        channels = torch.unique(torch.cat([rows[rows >= 0] for rows in readers.values()]))
        assert seen.channels is not None
        entries = torch.full((len(seen.channels),), -1)
        entries[channels] = torch.arange(len(channels))
        offset = gain_offset(self.run, seen) if seen.is_norm else 0.0
        first, last = int(channels[0]), int(channels[-1]) + 1
        whole = (first, last) == (0, len(entries))
        index = entries[first:last]
        producer = Side(
            module=name,
            axis="out",
            power=-1,
            index=None if _is_identity(index) else index,
            rows=None if whole else (first, last),
            gain_offset=0.0 if offset is None else offset,
        )
        sides = [producer]
        for reader, rows in readers.items():
            columns = torch.where(rows >= 0, entries[rows], -1)
            plain = kind != "v_o" and _is_identity(columns) and len(columns) == len(channels)
            index_or_none = None if plain else columns
            sides.append(Side(module=reader, axis="in", power=1, index=index_or_none))
        return ScalePair(
            name=f"{_short([name])}->{_short(readers)}",
            kind=kind,
            size=len(channels),
            sides=tuple(sides),
        )

    def _kind(self, name: str, readers: Iterable[str]) -> PairKind:
        mixes = any(name in self.readings[reader].mixed for reader in readers)
        if not self.run.seen[name].is_norm:
            return "v_o" if mixes else "up_down"
        leads = {n for reading in self.readings.values() for n in reading.mixed}
        return "norm_qkv" if mixes or leads.intersection(readers) else "norm_mlp"

    def _reason_against(
        self, pair: ScalePair, name: str, readers: Mapping[str, Tensor]
    ) -> str | None:
        """Return what speaks against a pair, None if it holds for multipliers of either sign."""
        run, seen = self.run, self.run.seen[name]
        if seen.is_norm and gain_offset(run, seen) is None:
            return f"{name} does not multiply by its weight, or by a constant more"
        unseen = {other for reader in readers for other in peers(run.uncalled, reader)}
        if unseen and not any(peers(run.uncalled, name)):  # else each has its own
            return (
                f"{', '.join(sorted(unseen))} received no token when {name} was looked at; "
                "longer sequences may reach all"
            )
        side = pair.sides[0]
        multiplier = torch.ones_like(seen.channels).detach()  # type: ignore[arg-type]
        scale = random_scale(pair.size, 0).to(multiplier)
        scale[::2] = -scale[::2]
        start, stop = side.rows or (0, len(multiplier))
        multiplier[start:stop] = scale if side.index is None else _taken(scale, side.index)
        inputs, leaving = run.scaled(name, multiplier)
        for layer, own in run.layers.items():
            expected = own.x.detach()
            if layer in readers:
                expected = expected * _taken(multiplier, readers[layer])
            if layer not in inputs or not _is_close(inputs[layer], expected):
                if layer in readers and not seen.is_norm:
                    return ACTIVATED.format(name)
                return f"{layer} reads {name} in another way than channel by channel"
        if len(leaving) != len(run.leaving) or not all(map(_is_close, leaving, run.leaving)):
            return f"{name} is read by more than layers, as by what adds it to the hidden states"
        return None

    # ---- roles ----------------------------------------------------------------------------------

    @cached_property
    def between(self) -> tuple[str, ...]:
        """Norms whose output the block returns, or adds to what it returns."""
        return tuple(name for name in self.run.written if name in self.run.norms)

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Layers whose output the block adds to the hidden states, as it is or behind a norm."""
        return tuple(name for name in self.run.written if name in self.run.layers)

    @cached_property
    def mlps(self) -> dict[str, tuple[str, ...]]:
        """By layer that leads out of an MLP, those that lead in: row ``r`` to column ``r mod in``.

        Those of whose rows several meet a column hold as many projections.
        """
        found = {}
        for reader, reading in self.readings.items():
            width = self.run.seen[reader].x.shape[-1]
            if reading.reached_by and reading.inner.keys() == reading.reached_by.keys():
                layers = all(not self.run.seen[name].is_norm for name in reading.inner)
                if layers and all(_in_order(i, width) for i in reading.inner.values()):
                    found[reader] = tuple(reading.inner)
        return found

    def stages(self, layers: Iterable[str], alone: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """Return layers in the order of their calls, those that read one tensor together.

        :param alone: Layers that are each a stage of their own.
        """
        own = set(alone)
        stages: dict[object, list[str]] = {}
        for name, x in self.run.called.items():
            if name in layers:
                key = name if name in own else (x.data_ptr(), tuple(x.shape), x.stride())
                stages.setdefault(key, []).append(name)
        for name in layers:  # not called: behind their likes
            if name not in self.run.called:
                stages[name] = [name]
        return tuple(map(tuple, stages.values()))


# ---- how channels reach a layer -----------------------------------------------------------------


def read(run: ScaledRun, reader: str) -> Reading:
    """Return how the channels that a layer reads come from others' outputs."""
    look = _Look(run, reader)
    first = look.decode(torch.arange(look.width))
    reading = Reading(reached_by=look.reached_by, inner=look.inner)
    if not look.reached_by:
        return reading
    if look.left(first).numel():
        left = look.left(first)
        tried = left[torch.linspace(0, len(left) - 1, min(_TRIED, len(left))).long()]
        single = [look.decode(channel[None]) for channel in tried]
        if any(single):
            look.split(first, left)
    reading.rows = look.latest(first)
    reading.mixed = look.mixed()
    return reading


class _Look:
    """The gradients of what a layer reads."""

    def __init__(self, run: ScaledRun, reader: str) -> None:
        self.run, self.reader = run, reader
        self.shape = run.seen[reader].x.shape
        self.width = self.shape[-1]
        self.generator = torch.Generator().manual_seed(0)
        x = run.seen[reader].x.detach()
        tokens = torch.randn(self.shape[:-1], generator=self.generator, dtype=torch.float64)
        self.tokens = tokens.to(x)[..., None]
        self.sums = (x * self.tokens).flatten(0, -2).sum(0).cpu()  # [in]
        self.reached_by: dict[str, Tensor] = {}
        self.inner: dict[str, Tensor] = {}

    def decode(self, channels: Tensor) -> dict[str, Tensor]:
        """Return, by layer or norm, the row that each input channel is proportional to, or -1."""
        count, like = len(channels), self.tokens
        weight = torch.randn(count, generator=self.generator, dtype=self.sums.dtype)
        place = torch.randperm(count, generator=self.generator)
        at = torch.argsort(place)
        code, factor = self.sums.new_zeros(self.width), self.sums.new_ones(self.width)
        code[channels] = weight
        factor[channels] += place.to(factor) / count
        one = self.run.slopes(self.reader, like * code.to(like))
        two = self.run.slopes(self.reader, like * (code * factor).to(like))
        found: dict[str, Tensor] = {}
        for name, slope in one.items():
            live = slope.abs() > _CLOSE * slope.abs().max()
            ratio = two.get(name, torch.zeros_like(slope)) / torch.where(live, slope, 1) - 1
            number = (ratio * count).round().clamp(0, count - 1)
            fits = live & ((ratio - number / count).abs() <= _CLOSE / 10)
            channel = channels[at[number.long()]]
            if count == self.width:
                self.reached_by[name] = live
                if bool((fits == live).all()):
                    self.inner[name] = torch.where(live, channel, -1)
            expected = (self.sums * code)[channel]
            fits &= (slope - expected).abs() <= _CLOSE * expected.abs()
            if bool(fits.any()):
                rows = torch.full((self.width,), -1)
                order = torch.arange(len(slope))[fits]
                found[name] = rows.scatter_reduce(0, channel[fits], order, "amax")
        return found

    def left(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return the channels that are proportional to nothing known."""
        known = torch.zeros(self.width, dtype=torch.bool)
        for found in rows.values():
            known |= found >= 0
        return torch.arange(self.width)[~known]

    def split(self, rows: dict[str, Tensor], channels: Tensor) -> None:
        """Look at fewer channels at a time, until no row has several of them."""
        waiting = list(channels.tensor_split(2))
        while waiting:
            part = waiting.pop()
            for name, found in self.decode(part).items():
                before = rows.get(name, torch.full((self.width,), -1))
                rows[name] = torch.where(before >= 0, before, found)
            left = self.left(rows)
            part = part[torch.isin(part, left)]
            if len(part) > 1:
                waiting += part.tensor_split(2)

    def latest(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one row for each channel: that of the layer that was called last."""
        taken = torch.zeros(self.width, dtype=torch.bool)
        found = {}
        for name in reversed(self.run.seen):
            if name in rows:
                own = torch.where(taken, -1, rows[name])
                taken |= own >= 0
                if bool((own >= 0).any()):
                    found[name] = own
        return found

    def mixed(self) -> frozenset[str]:
        """Return the layers and norms of which a token reaches the last one."""
        last = torch.zeros_like(self.tokens)
        last.flatten()[-1] = 1
        code = torch.randn(self.width, generator=self.generator, dtype=torch.float64)
        slopes = self.run.slopes(self.reader, last * code.to(last), of_tokens=True)
        return frozenset(n for n, s in slopes.items() if int((s.abs() > 0).sum()) > 1)


@torch.no_grad()
def gain_offset(run: ScaledRun, seen: Seen) -> float | None:
    """Return ``o`` if a norm returns ``n(x) · (weight + o) + bias``, None if it does not."""
    prefix = f"{seen.name}."
    own = {n.removeprefix(prefix): v for n, v in run.values.items() if n.startswith(prefix)}
    weight = own["weight"]
    if "bias" in own:
        own["bias"] = torch.zeros_like(own["bias"])
    generator = torch.Generator().manual_seed(1)
    step = 0.5 + torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    step = step.to(weight)
    with Float64Casts():
        outputs = [
            functional_call(seen.module, {**own, "weight": weight + moved}, *seen.call)
            for moved in (torch.zeros_like(step), step)
        ]
    normed = (outputs[1] - outputs[0]) / step  # n(x)
    usable = normed.abs() > 1e-6 * normed.abs().max()
    offset = torch.where(usable, outputs[0] / torch.where(usable, normed, 1) - weight, 0)[usable]
    middle = offset.median().round(decimals=6)
    fits = (outputs[0] - normed * (weight + middle)).abs().max() <= 1e-9 * outputs[0].abs().max()
    return float(middle) if bool(fits) else None


# ---- helpers ------------------------------------------------------------------------------------


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Return values by index, 1 where that is -1."""
    index = index.to(values.device)
    return torch.where(index >= 0, values[index.clamp_min(0)], 1)


def _is_close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    size = float(other.abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
    return torch.allclose(one, other.to(one), rtol=0, atol=1e-10 * size, equal_nan=True)


def _in_order(inner: Tensor, width: int) -> bool:
    """Return True if row ``r`` meets column ``r mod width``, as far as it meets one."""
    live = inner >= 0
    order = torch.arange(len(inner)) % width
    return len(inner) % width == 0 and bool((inner == order)[live].all())


def _is_identity(index: Tensor) -> bool:
    return torch.equal(index, torch.arange(len(index)))


def _overlap(group: Mapping[str, Tensor], rows: Tensor) -> bool:
    return any(bool(torch.isin(rows[rows >= 0], other).any()) for other in group.values())


def peers(names: Iterable[str], like: str) -> Iterator[str]:
    """Yield the names that differ from another one in numbers alone."""
    form = _without_numbers(like)
    return (name for name in names if _without_numbers(name) == form)


def _without_numbers(name: str) -> tuple[str, ...]:
    return tuple("" if part.isdecimal() else part for part in name.split("."))


def _short(names: Iterable[str]) -> str:
    """Return ``"q_proj,k_proj"``, with a name before a number."""
    return ",".join(map(_last, names))


def _last(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]


def _distinctly_named(pairs: Sequence[ScalePair]) -> Iterator[ScalePair]:
    """Yield pairs; those of one short name get their full ones."""
    names = [pair.name for pair in pairs]
    for pair in pairs:
        if names.count(pair.name) > 1:
            first, *readers = (side.module for side in pair.sides)
            pair = ScalePair(
                name=f"{first}->{','.join(readers)}",
                kind=pair.kind,
                size=pair.size,
                sides=pair.sides,
            )
        yield pair
