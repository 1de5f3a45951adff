"""The ledger: what the transforms come to, and what it refuses."""

from __future__ import annotations

import copy
import pathlib

import pytest
import torch

from aimet_ext.core.key_maps import KeyMap
from aimet_ext.files.ledger import Ledger

Q, V, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qvo")  # noqa: E741


def vector(width: int, seed: int) -> torch.Tensor:
    return torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(seed)))


def stacked() -> tuple[Ledger, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A ledger of two techniques with the weights before and after, as they were folded."""
    weights = {name: torch.randn(8, 8, dtype=torch.float64) for name in (Q, V, O)}
    changed = {name: weight.clone() for name, weight in weights.items()}
    ledger = Ledger("0" * 64)
    for seed, technique in enumerate(("smoothquant", "omniquant")):
        s = vector(8, seed)
        ledger.record(technique, "b", "norm->q,v", "norm_qkv", [(Q, "in", s), (V, "in", s)], size=8)
        for name in (Q, V):
            changed[name] *= s
        t = vector(4, 10 + seed).repeat(2)
        sides = [(V, "out", 1 / t), (O, "in", t)]
        ledger.record(technique, "b", "v->o", "v_o", sides, size=4, source=V)
        changed[V] /= t[:, None]
        changed[O] *= t
        ledger.log_run(technique, [Q, V, O], settings={"seed": seed})
    return ledger, weights, changed


def test_transformed_is_output_original_input() -> None:
    """W' = diag(output) W diag(input), whatever was stacked."""
    ledger, weights, changed = stacked()
    for name, axes in ledger.cumulative().items():
        rows = axes.get("output", torch.ones(8)).double()[:, None]
        expected = rows * weights[name] * axes.get("input", torch.ones(8)).double()
        torch.testing.assert_close(changed[name], expected, rtol=1e-6, atol=0)
    assert ledger.techniques == ("smoothquant", "omniquant")
    assert ledger.cumulative().keys() == {Q, V, O}
    assert ledger.cumulative()[V].keys() == {"input", "output"}


def test_names_of_the_original_checkpoint() -> None:
    ledger, _, _ = stacked()
    renamed = ledger.cumulative(lambda name: name.removeprefix("model."))
    assert set(renamed) == {name.removeprefix("model.") for name in (Q, V, O)}


def test_what_was_recorded_does_not_change() -> None:
    ledger = Ledger()
    s = torch.full((4,), 2.0)
    ledger.record("x", "b", "p", "k", [(Q, "in", s)], size=4)
    s.zero_()
    assert torch.equal(ledger.cumulative()[Q]["input"], torch.full((4,), 2.0))


def test_a_copy_is_independent() -> None:
    ledger, _, _ = stacked()
    copied = copy.deepcopy(ledger)
    copied.record("awq", "b", "p", "k", [(Q, "in", vector(8, 3))], size=8)
    copied.log_run("awq", [Q])
    assert (len(ledger.entries), len(copied.entries)) == (4, 5)
    assert (len(ledger.runs), len(copied.runs)) == (2, 3)


def test_tensors_and_json_hold_all_of_it() -> None:
    ledger, _, _ = stacked()
    ledger.log_run("gptq", [Q], rounds=True)
    read = Ledger.from_tensors(*ledger.to_tensors())
    assert read.to_tensors()[1] == ledger.to_tensors()[1]
    assert read.runs == ledger.runs and read.origin == ledger.origin
    for name, axes in ledger.cumulative().items():
        for axis, product in axes.items():
            assert torch.equal(product, read.cumulative()[name][axis])


def test_the_same_technique_twice_is_refused() -> None:
    ledger, _, _ = stacked()
    with pytest.raises(ValueError, match=r"omniquant was already applied to .*q_proj"):
        ledger.check_can_apply("omniquant", [Q])
    ledger.check_can_apply("omniquant", ["model.layers.1.self_attn.q_proj"])
    ledger.check_can_apply("awq", [Q])


def test_what_comes_after_the_rounding_is_refused() -> None:
    ledger = Ledger()
    ledger.log_run("gptq", [Q], rounds=True)
    with pytest.raises(ValueError, match=r"gptq already rounded those of .*q_proj"):
        ledger.check_can_apply("omniquant", [Q, V])
    with pytest.raises(ValueError, match=r"adaround needs float weights"):
        ledger.check_can_apply("adaround", [Q])
    ledger.check_can_apply("omniquant", [V])


@pytest.mark.parametrize(
    "bad", [torch.tensor([1.0, 0.0]), torch.tensor([torch.nan]), torch.ones(())]
)
def test_a_multiplier_that_cannot_be_undone_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Ledger().record("x", "b", "p", "k", [(Q, "in", bad)], size=1)


def test_multipliers_of_two_widths_are_refused() -> None:
    ledger = Ledger()
    for width in (4, 8):
        ledger.record("x", "b", "p", "k", [(Q, "in", torch.ones(width))], size=4)
    with pytest.raises(ValueError, match="one width"):
        ledger.cumulative()


def test_maps_of_keys_are_written_and_read_back(tmp_path: pathlib.Path) -> None:
    """Exactly, in a file of the third version; copies have them, and folding does not see them."""
    ledger, _, _ = stacked()
    draw = torch.Generator().manual_seed(0)
    ledger.key_maps = tuple(
        KeyMap(
            torch.randn(2, 4, 4, generator=draw).double(),
            torch.randn(2, 4, generator=draw).double(),
        )
        for _ in range(2)
    )
    ledger.log_run("rotation", [Q], settings={"r3": "fitted"})
    before = ledger.cumulative()
    ledger.save(tmp_path)
    for other in (Ledger.load(tmp_path), copy.deepcopy(ledger)):
        assert other.rotates_keys and len(other.key_maps) == 2
        for own, found in zip(ledger.key_maps, other.key_maps, strict=True):
            assert torch.equal(own.matrix, found.matrix) and torch.equal(own.shift, found.shift)
        for name, axes in other.cumulative().items():
            assert all(torch.equal(axes[key], before[name][key]) for key in axes)
