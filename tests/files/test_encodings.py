"""Encodings of both versions: the same grids, as AIMET's own reader of ONNX sees them."""

from __future__ import annotations

import copy
import json
import pathlib
from typing import Any

import pytest
import torch

from aimet_ext.core.affine import Grid
from aimet_ext.errors import CorruptFileError
from aimet_ext.files.encodings import Layout, entries, load_encodings, to_grid, to_version_1

OUT, IN = 6, 8


def numbers(*shape: int) -> list[Any]:
    return (torch.arange(1, 1 + torch.Size(shape).numel()) / 64).reshape(shape).tolist()


INTEGERS = torch.tensor([[16, 3] * (OUT // 2), [1, 16] * (OUT // 2)])  # [blocks, out]

# name: encoding 2.0.0 of a weight that lies as [in, out], and the integers it can take
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "per tensor": ({"output_dtype": "int8", "y_scale": 0.25}, -128, 127),
    "per tensor, asymmetric": (
        {"output_dtype": "uint16", "y_scale": 0.25, "y_zero_point": 31764},
        0,
        65535,
    ),
    "per channel": ({"output_dtype": "int3", "y_scale": numbers(OUT), "axis": 1}, -4, 3),
    "per channel, asymmetric": (
        {
            "output_dtype": "uint4",
            "y_scale": numbers(OUT),
            "y_zero_point": [0, 15, 8, 7, 3, 1],
            "axis": 1,
        },
        0,
        15,
    ),
    "2 bits, shifted": (
        {
            "output_dtype": "int2",
            "y_scale": numbers(OUT),
            "y_zero_point": [-0.5] * OUT,
            "axis": 1,
        },
        -2,
        1,
    ),
    "blockwise": (
        {"output_dtype": "int4", "y_scale": numbers(2, OUT), "axis": 0, "block_size": 4},
        -8,
        7,
    ),
    "blockwise, asymmetric": (
        {
            "output_dtype": "uint4",
            "y_scale": numbers(2, OUT),
            "y_zero_point": torch.arange(12).reshape(2, OUT).tolist(),
            "axis": 0,
            "block_size": 4,
        },
        0,
        15,
    ),
    "LPBQ": (
        {
            "output_dtype": "int4",
            "per_block_int_scale": INTEGERS.tolist(),
            "per_channel_float_scale": numbers(1, OUT),
            "axis": 0,
            "block_size": 4,
        },
        -8,
        7,
    ),
}


def document(entry: dict[str, Any]) -> dict[str, Any]:
    return {"version": "2.0.0", "producer": {}, "encodings": [{"name": "w", **entry}]}


def same(one: Grid, other: Grid) -> bool:
    """Whether two grids hold the same values, cell by cell."""
    values = [grid.scale * (grid.offset + grid.zero_point_shift) for grid in (one, other)]
    ends = [
        [grid.scale * (grid.offset + q) for q in (grid.qmin, grid.qmax)] for grid in (one, other)
    ]
    return (
        torch.equal(one.scale.reshape(other.scale.shape), other.scale)
        and torch.equal(values[0].reshape(values[1].shape), values[1])
        and all(torch.equal(a.reshape(b.shape), b) for a, b in zip(*ends, strict=True))
        and one.block_size == other.block_size
    )


@pytest.mark.parametrize("case", CASES)
def test_both_versions_say_the_same_grid(case: str) -> None:
    entry, low, high = CASES[case]
    layout = Layout((IN, OUT), 1)
    newer = to_grid({"name": "w", **entry}, layout)
    older = to_version_1(document(entry), {"w": layout})
    assert (newer.qmin, newer.qmax) == (low, high)
    assert newer.zero_point_shift == (0.5 if "shifted" in case else 0.0)
    assert entries(older).keys() == {"w"} and len(older["param_encodings"]) == 1
    assert same(to_grid(entries(older)["w"], layout), newer)


@pytest.mark.parametrize("case", [case for case in CASES if "lock" in case or case == "LPBQ"])
def test_blockwise_scales_of_1_0_0_run_channel_by_channel(case: str) -> None:
    """Where the channels are columns, [blocks, out] is stored as its transpose."""
    entry, _, _ = CASES[case]
    older = entries(to_version_1(document(entry), {"w": Layout((IN, OUT), 1)}))["w"]
    if case == "LPBQ":
        assert older["per_block_int_scale"] == INTEGERS.T.flatten().tolist()
        assert (older["bw"], older["compressed_bw"]) == (8, 4)
    else:
        assert older["scale"] == torch.tensor(entry["y_scale"]).T.flatten().tolist()


@pytest.mark.parametrize("case", CASES)
def test_the_reader_of_aimet_onnx_agrees(case: str) -> None:
    encoding = pytest.importorskip("aimet_onnx._encoding")
    entry, _, _ = CASES[case]
    layout = Layout((IN, OUT), 1)
    older = entries(to_version_1(document(entry), {"w": layout}))["w"]
    read = encoding.EncodingBase.from_qnn_encoding_dict(
        older, input_shape=(IN, OUT), default_channel_axis=1, default_block_axis=0
    )
    grid = to_grid({"name": "w", **entry}, layout)
    if case == "LPBQ":
        scale = torch.tensor(read.per_block_int_scale * read.per_channel_float_scale)
        assert torch.equal(scale.float(), grid.scale)
    else:
        shift = grid.zero_point_shift
        assert torch.equal(torch.tensor(read.scale).float(), grid.scale.reshape(read.scale.shape))
        offset = (grid.offset + shift).reshape(read.offset.shape)
        # A symmetric grid of unsigned integers is read as one of signed integers.
        assert torch.equal(torch.tensor(read.offset + read.qmin).float(), offset + grid.qmin)


@pytest.mark.parametrize("scale_bits", [3, 4, 6])
def test_lpbq_keeps_the_bits_of_its_scales(scale_bits: int) -> None:
    """2.0.0 knows only as many as the weight has; 1.0.0 says them as they are."""
    entry = {
        "output_dtype": "int3",
        "y_scale": ((1 << scale_bits) * torch.tensor(numbers(1, OUT)) * torch.ones(2, 1)).tolist(),
        "axis": 0,
        "block_size": 4,
    }
    layout = Layout((IN, OUT), 1, scale_bits)
    older = entries(to_version_1(document(entry), {"w": layout}))["w"]
    assert (older["enc_type"], older["bw"], older["compressed_bw"]) == ("LPBQ", 3 + scale_bits, 3)
    assert older["scale"] == numbers(OUT)
    assert same(to_grid(older, layout), to_grid({"name": "w", **entry}, layout))


def test_activations_and_what_else_a_document_holds() -> None:
    newer = document(CASES["per channel"][0])
    newer["encodings"].append({"name": "x", **CASES["per tensor, asymmetric"][0]})
    older = to_version_1(
        newer, {"w": Layout((IN, OUT), 1)}, excluded_layers=["a"], quantizer_args={"b": 1}
    )
    (activation,) = older["activation_encodings"]
    assert activation["offset"] == [-31764] and activation["is_sym"] is False
    assert older["excluded_layers"] == ["a"] and older["quantizer_args"] == {"b": 1}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0, -0.25, "wide", None])
@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
@pytest.mark.parametrize("case", CASES)
def test_scales_that_make_no_grid_are_refused(
    tmp_path: pathlib.Path, case: str, version: str, number: Any
) -> None:
    """By the names of the file and the tensor; readers would compute with them."""
    found = document(CASES[case][0])
    if version == "1.0.0":
        found = to_version_1(found, {"w": Layout((IN, OUT), 1)})
    path = tmp_path / "a.encodings"
    path.write_text(json.dumps(found))
    assert load_encodings(path) == found
    keys = {"scale", "y_scale", "per_channel_float_scale", "per_block_int_scale"}
    for key in keys & entries(found)["w"].keys():
        damaged = copy.deepcopy(found)
        place = entries(damaged)["w"]
        inner = place[key]
        while isinstance(inner, list) and isinstance(inner[-1], list):
            inner = inner[-1]
        if isinstance(inner, list):
            inner[-1] = number
        else:
            place[key] = number
        path.write_text(json.dumps(damaged))
        if key == "per_block_int_scale" and number == 0:  # as AIMET writes for a block of zeros
            assert load_encodings(path) == damaged
            continue
        with pytest.raises(CorruptFileError, match=rf"a\.encodings: w: {key}: .*required"):
            load_encodings(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "0.6.1"}', '{"version": "3.0.0"}'])
def test_other_files_are_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "a.encodings").write_text(text)
    with pytest.raises(CorruptFileError, match=r"a\.encodings"):
        load_encodings(tmp_path / "a.encodings")


def test_what_is_no_integer_grid_or_does_not_fit_is_named() -> None:
    for entry in (
        {"name": "w", "output_dtype": "float8e4m3fn", "y_scale": 1.0},
        {"name": "w", "dtype": "FLOAT", "bw": 16, "enc_type": "PER_TENSOR"},
        {"name": "w", "output_dtype": "int4"},
    ):
        with pytest.raises(ValueError, match="w: an"):
            to_grid(entry, Layout((IN, OUT), 1))
    older = entries(to_version_1(document(CASES["per channel"][0]), {"w": Layout((IN, OUT), 1)}))
    with pytest.raises(ValueError, match=r"w: .*\(8, 7\)"):
        to_grid(older["w"], Layout((IN, 7), 1))


def test_files_are_read_as_they_are(tmp_path: pathlib.Path) -> None:
    newer = document(CASES["LPBQ"][0])
    (tmp_path / "a").write_text(json.dumps(newer))
    assert load_encodings(tmp_path / "a") == newer
