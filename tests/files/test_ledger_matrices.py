"""Rotations in a ledger and in the file of scales: composed, stored once, read back, refused."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from aimet_ext.core.factors import Product
from aimet_ext.errors import CorruptFileError
from aimet_ext.files.factors import NORM_GAIN
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.scales import SCALES_FILE, Scales, load_scales, write_scales
from aimet_ext.files.tensors import write_sealed

HIDDEN, HEADS, DIM = 8, 2, 4
NORM, V, OUT, DOWN = "m.norm", "m.v_proj", "m.o_proj", "m.down_proj"


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def orthogonal(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed))[0]


def stacked() -> tuple[Ledger, dict[str, Tensor], dict[str, Tensor]]:
    """Gains, R1, R2 and a scale pair: the ledger, and the weights before and after."""
    before = {name: normal(HIDDEN, HIDDEN, seed=ord(name[2])) for name in (V, OUT, DOWN)}
    after = {name: weight.clone() for name, weight in before.items()}
    ledger = Ledger("0" * 64)
    gain = normal(HIDDEN, seed=1)
    gain[3] = 0
    sides: list[Any] = [(NORM, "out", torch.where(gain == 0, 1.0, 1 / gain)), (V, "in", gain)]
    ledger.record("rotation", "m", "norm->v", NORM_GAIN, sides, size=HIDDEN, source=NORM)
    after[V] = after[V] * gain
    r1, r2 = orthogonal(HIDDEN, 2)[None], orthogonal(DIM, 3)[None].expand(HEADS, -1, -1)
    sides = [(V, "in", r1), (OUT, "out", r1.mT), (DOWN, "out", r1.mT.clone())]
    ledger.record("rotation", "m", "R1", "rotation", sides, size=HIDDEN)
    after |= {V: after[V] @ r1[0], OUT: r1[0].T @ after[OUT], DOWN: r1[0].T @ after[DOWN]}
    ledger.record("rotation", "m", "R2", "rotation", [(V, "out", r2.mT), (OUT, "in", r2)], size=DIM)
    wide = torch.block_diag(*r2)
    after |= {V: wide.T @ after[V], OUT: after[OUT] @ wide}
    s = normal(HIDDEN, seed=4).exp()
    ledger.record("smooth", "m", "v->o", "v_o", [(V, "out", 1 / s), (OUT, "in", s)], size=HIDDEN)
    after |= {V: after[V] / s[:, None], OUT: after[OUT] * s}
    for technique in ("rotation", "smooth"):
        ledger.log_run(technique, [V, OUT])
    return ledger, before, after


def save(folder: pathlib.Path, ledger: Ledger, **options: Any) -> Scales:
    write_scales(folder, ledger, **options)
    return load_scales(folder)


def test_transformed_is_out_original_in(tmp_path: pathlib.Path) -> None:
    """W' = OUT W IN: later transforms from outside, whatever was stacked, and from the file."""
    ledger, before, after = stacked()
    scales = save(tmp_path, ledger, rename=lambda name: name[2:])
    for name, weight in before.items():
        found = scales[name[2:]].fold_input(scales[name[2:]].fold_output(weight))
        torch.testing.assert_close(found, after[name], rtol=1e-12, atol=1e-12)
    assert scales["down_proj"].input is None
    rotated = scales["v_proj"].input
    assert isinstance(rotated, Product) and [f.dim() for f in rotated.factors] == [1, 3]
    assert isinstance(scales["norm"].output, Tensor)
    assert scales.pairs[2]["sides"] == [["v_proj", "out", HIDDEN], ["o_proj", "in", HIDDEN]]


def test_a_matrix_is_kept_and_stored_once(tmp_path: pathlib.Path) -> None:
    """R1 by all modules, R2 by all heads; equal ones that came from different tensors too."""
    ledger, _, _ = stacked()
    out, down = (side.factor for side in ledger.entries[1].sides[1:])
    assert out.data_ptr() == down.data_ptr()
    assert ledger.entries[2].sides[1].factor.shape == (HEADS, DIM, DIM)
    save(tmp_path, ledger)
    ledger.save(tmp_path)
    for file in (SCALES_FILE, "ledger.safetensors"):
        tensors = safetensors.torch.load_file(tmp_path / file)
        shapes = sorted(tuple(t.shape) for t in tensors.values() if t.dim() == 3)
        assert shapes == [(1, DIM, DIM)] * 2 + [(1, HIDDEN, HIDDEN)] * 2
    read = Ledger.load(tmp_path)
    assert read.to_tensors()[1] == ledger.to_tensors()[1]
    for one, two in zip(read.entries, ledger.entries, strict=True):
        assert all(
            torch.equal(a.factor, b.factor) for a, b in zip(one.sides, two.sides, strict=True)
        )
    copied = copy.deepcopy(read)
    copied.record("x", "m", "p", "rotation", [(V, "in", orthogonal(HIDDEN, 2)[None])], size=8)
    kept = copied.entries[-1].sides[0].factor
    assert kept.data_ptr() == read.entries[1].sides[0].factor.data_ptr()


def test_what_was_recorded_does_not_change() -> None:
    ledger, matrix = Ledger(), orthogonal(HIDDEN, 5)[None]
    expected = matrix.clone()
    ledger.record("x", "b", "p", "rotation", [(V, "in", matrix)], size=HIDDEN)
    matrix.zero_()
    found = ledger.cumulative()[V]["input"]
    assert isinstance(found, Product) and torch.equal(found.matrix(), expected[0])


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (torch.ones(1, 8, 8), "rotation", r"rotate, m\.v_proj \(in\): a non-singular matrix"),
        (torch.full((1, 8, 8), torch.nan), "rotation", "m.v_proj.*finite"),
        (torch.eye(8), "rotation", r"a stack \[n, d, d\]"),
        (torch.ones(1, 4, 8), "rotation", r"a stack \[n, d, d\]"),
        (-torch.ones(8), "norm_qkv", "above 0"),
        (torch.tensor([torch.inf]), NORM_GAIN, "finite"),
    ],
)
def test_factors_that_cannot_be_followed_are_refused(bad: Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ledger().record("rotate", "b", "p", kind, [(V, "in", bad)], size=8)


def test_matrices_of_two_widths_are_refused() -> None:
    ledger = Ledger()
    for width in (4, 8):
        sides: list[Any] = [(V, "in", torch.eye(width)[None])]
        ledger.record("x", "b", "p", "rotation", sides, size=4)
    with pytest.raises(ValueError, match="one width"):
        ledger.cumulative()


def test_aimet_keys_refuse_rotations(tmp_path: pathlib.Path) -> None:
    ledger, _, _ = stacked()
    with pytest.raises(ValueError, match=r"aimet_keys.*m\.v_proj\.input.* was rotated"):
        write_scales(tmp_path, ledger, aimet_keys=True)
    assert not list(tmp_path.iterdir())


def test_files_without_rotations_are_of_the_first_version(tmp_path: pathlib.Path) -> None:
    """What an earlier version reads is written as it was; the rest says that it is newer."""
    for plain, version in ((True, "1"), (False, "2")):
        ledger = stacked()[0]
        ledger.entries = ledger.entries[3:] if plain else ledger.entries
        save(tmp_path, ledger)
        ledger.save(tmp_path)
        for file, kind in ((SCALES_FILE, "scales"), ("ledger.safetensors", "ledger")):
            with safetensors.safe_open(tmp_path / file, framework="pt") as opened:
                assert opened.metadata()["schema"] == f"aimet_ext.{kind}/{version}"
                assert ("products" in opened.metadata()) == (kind == "scales" and not plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix.0": torch.full((1, 8, 8), torch.inf)}, "finite"),
        ({"matrix.0": torch.ones(3, 8, 8)}, "1 blocks"),
        ({"matrix.0": torch.eye(4)[None]}, "one width"),
        ({"matrix.0": None}, r"matrix\.0"),
    ],
)
def test_products_that_do_not_go_together_are_refused(
    tmp_path: pathlib.Path, change: dict[str, Tensor | None], message: str
) -> None:
    """Sealed as the file is, so that its hash is right."""
    save(tmp_path, stacked()[0])
    path = tmp_path / SCALES_FILE
    with safetensors.safe_open(path, framework="pt") as file:
        fields = {key: text for key, text in file.metadata().items() if key != "sha256"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    changed = {key: t for key, t in {**tensors, **change}.items() if t is not None}
    write_sealed(path, fields.pop("schema"), changed, fields)
    with pytest.raises(CorruptFileError, match=rf"scales\.safetensors: .*{message}"):
        load_scales(path)
