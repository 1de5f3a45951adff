"""Techniques in a row: what an earlier one decided stays, or the later one is refused by name."""

from __future__ import annotations

import contextlib
import copy
import io
import pathlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import LPBQ, QSpec
from aimet_ext.core.affine import fake_quantize
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")

W4 = QSpec(bitwidth=4)
W4_LPBQ = QSpec(bitwidth=4, granularity=LPBQ(16))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """AIMET warns and prints."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def aimet_seq_mse(sim: Any, data: Any) -> None:
    from aimet_torch.seq_mse import apply_seq_mse

    with quiet():
        apply_seq_mse(sim, data, num_candidates=8, forward_fn=lambda m, b: m(b))


def aimet_adascale(sim: Any, data: Any, steps: int = 4) -> None:
    from aimet_torch.adascale import apply_adascale

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        apply_adascale(sim, data, forward_fn=lambda m, b: m(b), num_iterations=steps)


def ours(name: str, **settings: Any) -> Callable[[Any, Any], Any]:
    function = getattr(aimet_ext, f"apply_{name}")
    return lambda sim, data: function(sim, data, progress=False, **settings)


STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "set_lpbq": lambda sim, data: aimet_ext.set_lpbq(sim, 16),
    "apply_lpbq": ours("lpbq", block_size=16, num_candidates=8, sweeps=2),
    "seq_mse": ours("seq_mse", num_candidates=8, sweeps=2),
    "smoothquant": ours("smoothquant"),
    "awq": ours("awq", num_grid=4),
    "omniquant": ours("omniquant", num_iterations=4, search_sweeps=1),
    "gptq": ours("gptq", refine_sweeps=2),
    "adaround": ours("adaround", num_iterations=60, refine_sweeps=2),
    "autoround": ours("autoround", num_iterations=4),
    "rtn": ours("rtn"),
    "hqq": ours("hqq"),
    "AIMET's SeqMSE": aimet_seq_mse,
    "AIMET's AdaScale": aimet_adascale,
}
GRIDS = {"set_lpbq", "apply_lpbq"}  # decide what kind of grid
RANGES = set(STEPS) - {"set_lpbq", "smoothquant"}  # decide ranges, and freeze them
SCALES = {"smoothquant", "awq", "omniquant"}  # rescale weights
ROUNDS = {"gptq", "adaround", "autoround", "rtn", "hqq"}  # decide integers


@dataclass(frozen=True)
class Composition:
    """A row of the table in the documentation.

    :param steps: in order.
    :param keeps: whether the last step keeps the ranges of those before it.
    """

    steps: tuple[str, ...]
    keeps: bool = True

    def __str__(self) -> str:
        return ", ".join(self.steps)


#: Orders that make sense.
COMPOSITIONS = (
    Composition(("set_lpbq", "seq_mse", "adaround")),
    Composition(("set_lpbq", "seq_mse", "gptq")),
    Composition(("apply_lpbq", "gptq")),
    Composition(("apply_lpbq", "adaround")),
    Composition(("seq_mse", "gptq")),
    Composition(("seq_mse", "rtn")),
    Composition(("set_lpbq", "hqq")),
    Composition(("smoothquant", "gptq")),
    Composition(("smoothquant", "seq_mse", "gptq")),
    Composition(("smoothquant", "omniquant", "gptq")),
    Composition(("smoothquant", "awq", "gptq")),
    Composition(("awq", "adaround")),
    Composition(("omniquant", "adaround")),
    Composition(("omniquant", "gptq")),
    Composition(("omniquant", "autoround")),
    Composition(("AIMET's SeqMSE", "gptq")),
    Composition(("AIMET's SeqMSE", "adaround")),
    Composition(("seq_mse", "AIMET's AdaScale"), keeps=False),
)

#: One that works and does not pay: AdaScale puts its rounding into the float weights, which the
#: rounding of GPTQ is then faithful to.
DISCOURAGED = (Composition(("AIMET's AdaScale", "gptq")),)

#: Orders that are refused, with what the error says of the reason.
REFUSED = (
    (("gptq", "seq_mse"), "seq_mse needs float weights, but gptq already rounded"),
    (("gptq", "adaround"), "adaround needs float weights, but gptq already rounded"),
    (("adaround", "gptq"), "gptq needs float weights, but adaround already rounded"),
    (("gptq", "autoround"), "autoround needs float weights, but gptq already rounded"),
    (("autoround", "gptq"), "gptq needs float weights, but autoround already rounded"),
    (("rtn", "gptq"), "gptq needs float weights, but rtn already rounded"),
    (("hqq", "rtn"), "rtn needs float weights, but hqq already rounded"),
    (("gptq", "smoothquant"), "gptq froze its range, which rescaling would make wrong"),
    (("awq", "omniquant"), "awq froze its range, which rescaling would make wrong"),
    (("awq", "seq_mse"), "q_proj: awq froze its range"),
    (("smoothquant", "smoothquant"), "smoothquant was already applied to"),
    (("gptq", "omniquant"), "gptq froze its range, which rescaling would make wrong"),
    (("seq_mse", "omniquant"), "seq_mse froze its range, which rescaling would make wrong"),
    (("apply_lpbq", "omniquant"), "lpbq froze its range, which rescaling would make wrong"),
    (("omniquant", "seq_mse"), "q_proj: omniquant froze its range"),
    (("apply_lpbq", "seq_mse"), "q_proj: lpbq froze its range"),
    (("AIMET's SeqMSE", "seq_mse"), "q_proj: an earlier technique froze its range"),
    (("AIMET's SeqMSE", "omniquant"), "an earlier technique froze its range"),
    (("AIMET's AdaScale", "seq_mse"), "q_proj: an earlier technique froze its range"),
    (("gptq", "set_lpbq"), "froze its range; set grids first"),
    (("seq_mse", "set_lpbq"), "froze its range; set grids first"),
    (("seq_mse", "apply_lpbq"), "froze its range; set grids first"),
    (("seq_mse", "seq_mse"), "seq_mse was already applied to"),
    (("gptq", "gptq"), "gptq was already applied to"),
    (("adaround", "adaround"), "adaround was already applied to"),
    (("apply_lpbq", "apply_lpbq"), "froze its range; set grids first"),
    (("omniquant", "omniquant"), "omniquant froze its range"),
)


@pytest.fixture
def data(ids: Callable[..., Tensor]) -> list[Tensor]:
    return [ids(4, 24, 1), ids(4, 24, 2)]


def layers(sim: Any) -> dict[str, Any]:
    """Weight quantizers but those of norms' gains."""
    return {n: q for n, q in adapt(sim).weight_quantizers().items() if q.weight.dim() > 1}


def ranges(sim: Any) -> dict[str, tuple[Tensor, ...]]:
    """Everything of the grids that a technique may have decided."""
    return {
        name: (q.grid().scale.clone(), q.grid().offset.clone(), q.free_grid().scale.clone())
        for name, q in layers(sim).items()
    }


def described(sim: Any) -> dict[str, tuple[str, QSpec, bool]]:
    return {
        name: (type(q.quantizer).__name__, q.spec(), q.frozen) for name, q in layers(sim).items()
    }


def same(one: dict[str, tuple[Tensor, ...]], other: dict[str, tuple[Tensor, ...]]) -> bool:
    assert list(one) == list(other)
    return all(torch.equal(a, b) for n in one for a, b in zip(one[n], other[n], strict=True))


@torch.no_grad()
def logits(sim: Any, data: list[Tensor]) -> Tensor:
    return torch.cat([sim.model(batch) for batch in data])


def on_grid(sim: Any) -> bool:
    return all(
        torch.equal(fake_quantize(q.weight.detach(), q.grid()), q.weight)
        and torch.equal(q.quantizer(q.weight).dequantize(), q.weight)
        for q in layers(sim).values()
    )


def error(sim: Any, data: list[Tensor], target: Tensor) -> float:
    return float((logits(sim, data) - target).square().mean())


@pytest.fixture(scope="module")
def composed(make_sim: Any, ids: Callable[..., Tensor]) -> Callable[..., Any]:
    """A sim after some steps, each started from what was kept of the steps before it."""
    kept: dict[tuple[str, ...], Any] = {(): make_sim(activations=16)}

    def build(steps: tuple[str, ...]) -> Any:
        if steps not in kept:
            sim = build(steps[:-1])
            STEPS[steps[-1]](sim, [ids(4, 24, 1), ids(4, 24, 2)])
            kept[steps] = sim
        return copy.deepcopy(kept[steps])

    return build


@pytest.mark.parametrize("row", COMPOSITIONS + DISCOURAGED, ids=str)
def test_an_order_that_works(
    composed: Callable[..., Any], data: list[Tensor], row: Composition
) -> None:
    """Grids, ranges and integers stay from where they were decided, through calibration too."""
    start = composed(())
    with adapt(start).disabled_quantizers():
        target = logits(start, data)
    with adapt(start).disabled_quantizers(weights=False):
        plain = error(start, data, target)
    sims = [composed(row.steps[: end + 1]) for end in range(len(row.steps))]
    final = sims[-1]
    for step, sim in zip(row.steps[:-1], sims[:-1], strict=True):
        if step in RANGES:
            assert all(frozen for *_, frozen in described(sim).values())
            assert same(ranges(final), ranges(sim)) == row.keeps
        if step in GRIDS:
            kinds = {(kind, spec) for kind, spec, _ in described(final).values()}
            assert kinds == {("GroupedBlockQuantizeDequantize", W4_LPBQ)}
        if step in SCALES:
            entries = [len(each.aimet_ext_ledger.entries) for each in (sim, final)]
            later = set(row.steps[row.steps.index(step) + 1 :]) & SCALES
            assert 0 < entries[0] <= entries[1]
            assert later or entries[0] == entries[1]
    assert all(frozen for *_, frozen in described(final).values())
    assert on_grid(final) == (row.steps[-1] in ROUNDS)
    with adapt(final).disabled_quantizers(weights=False):
        assert error(final, data, target) < plain
    ledger = final.aimet_ext_ledger.techniques
    expected = [step.removeprefix("apply_") for step in row.steps if "AIMET" not in step]
    assert list(ledger) == [step for step in expected if step != "set_lpbq"]

    before, kinds = ranges(final), described(final)
    floats = {name: value.clone() for name, value in adapt(final).float_state().items()}
    final.compute_encodings(lambda model: model(data[0]))
    assert same(ranges(final), before)
    assert described(final) == kinds
    now = adapt(final).float_state()
    assert all(torch.equal(now[name], value) for name, value in floats.items())
    assert all(q.is_initialized() for q in adapt(final).activation_quantizers().values())


@pytest.mark.parametrize(("steps", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_an_order_that_is_refused(
    composed: Callable[..., Any],
    data: list[Tensor],
    state_of: Callable[[Any], Any],
    steps: tuple[str, ...],
    reason: str,
) -> None:
    sim = composed(steps[:-1])
    before = state_of(sim)
    with pytest.raises(ValueError, match=reason) as caught:
        STEPS[steps[-1]](sim, data)
    assert "layers.0." in str(caught.value)
    assert state_of(sim) == before


@pytest.mark.parametrize(
    "steps",
    [("set_lpbq", "seq_mse", "gptq"), ("omniquant", "adaround"), ("AIMET's SeqMSE", "gptq")],
    ids=", ".join,
)
def test_exported_and_loaded(
    composed: Callable[..., Any],
    data: list[Tensor],
    tmp_path: pathlib.Path,
    steps: tuple[str, ...],
) -> None:
    """The folder's weights are the rounded ones, to the bit, and so is all that is loaded."""
    pytest.importorskip("onnx")
    safetensors = pytest.importorskip("safetensors.torch")
    sim = composed(steps)
    sim.compute_encodings(lambda model: model(data[0]))
    expected = logits(sim, data)
    with quiet():
        aimet_ext.export(sim, tmp_path / "out", "tiny", data[0])
        loaded = aimet_ext.load(tmp_path / "out")
    assert torch.equal(logits(loaded, data), expected)
    assert on_grid(loaded)
    assert same(ranges(loaded), ranges(sim))
    assert described(loaded) == described(sim)
    assert loaded.aimet_ext_ledger.techniques == sim.aimet_ext_ledger.techniques
    written = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    for name, quantizer in layers(sim).items():
        assert torch.equal(written[f"{name.removeprefix('model.')}.weight"], quantizer.weight)
    with pytest.raises(ValueError, match=f"{steps[-1]} was already applied"):
        STEPS[steps[-1]](loaded, data)


def test_integers_are_chosen_for_the_rescaled_weights(
    composed: Callable[..., Any], data: list[Tensor]
) -> None:
    """Of OmniQuant's ranges and weights GPTQ changes the rounding alone: norms, ranges, scales."""
    sim, final = composed(("omniquant",)), composed(("omniquant", "gptq"))
    before, after = adapt(sim).float_state(), adapt(final).float_state()
    grids = layers(sim)
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        if layer not in grids:
            assert torch.equal(after[name], value), name
            continue
        step = grids[layer].grid().scale.expand(*value.shape)
        inside = (value - fake_quantize(value, grids[layer].grid())).abs() <= step
        assert float(((after[name] - value).abs() <= 4 * step)[inside].float().mean()) > 0.99


def test_what_aimets_seq_mse_does_to_ours(composed: Callable[..., Any]) -> None:
    """It writes over frozen ranges: it takes ours for the full ones and shares of them instead."""
    chosen = ranges(composed(("seq_mse",)))
    after = composed(("seq_mse", "AIMET's SeqMSE"))
    shares = torch.cat([s[0] / chosen[name][0] for name, s in ranges(after).items()])
    torch.testing.assert_close((shares * 8).round() / 8, shares, rtol=0, atol=1e-5)
    assert float(shares.max()) < 1 + 1e-5 and float(shares.min()) < 0.9
    assert all(frozen for *_, frozen in described(after).values())


def test_where_aimets_adascale_starts(composed: Callable[..., Any], data: list[Tensor]) -> None:
    """At the ranges that ours chose, from which it moves away step by step."""
    sim = composed(("seq_mse",))
    chosen, full = ranges(sim), ranges(composed(()))
    aimet_adascale(sim, data, steps=1)
    for name, (scale, *_) in ranges(sim).items():
        moved = (scale / chosen[name][0] - 1).abs().max()
        assert moved < 0.01 < (full[name][0] / chosen[name][0] - 1).abs().max(), name


def test_a_later_technique_does_what_an_earlier_one_left_alone(
    make_sim: Any, data: list[Tensor]
) -> None:
    """The output layer after the blocks: decided by SeqMSE, and the blocks are named."""
    sim = make_sim(lm_head=QSpec(bitwidth=8))
    STEPS["omniquant"](sim, data)
    before = ranges(sim)
    report = STEPS["seq_mse"](sim, data)
    assert [layer.name for layer in report.layers] == ["model.lm_head"]
    assert set(report.skipped.values()) == {"omniquant froze its range"}
    assert len(report.skipped) == 14
    changed = [n for n, r in ranges(sim).items() if not torch.equal(r[0], before[n][0])]
    assert changed == ["model.lm_head"]


def test_halves_of_a_model(make_sim: Any, data: list[Tensor]) -> None:
    """One technique for some layers, another one for the others, which see the first ones' work."""
    sim = make_sim()
    names = list(layers(sim))
    STEPS["gptq"](sim, data)  # the reference
    whole = {n: q.weight.detach().clone() for n, q in layers(sim).items()}
    sim = make_sim()
    first, second = names[:7], names[7:]
    aimet_ext.apply_gptq(sim, data, modules_to_exclude=second, progress=False, refine_sweeps=2)
    assert all(torch.equal(adapt(sim).weight_quantizer(n).weight, whole[n]) for n in first)
    report = aimet_ext.apply_adaround(
        sim, data, modules_to_exclude=first, num_iterations=10, progress=False
    )
    assert [layer.name for layer in report.layers] == second
    with pytest.raises(ValueError, match=r"was already applied|already rounded"):
        STEPS["gptq"](sim, data)
