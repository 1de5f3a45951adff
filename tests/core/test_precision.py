"""The precision of training: products alone are in bfloat16, and only where that is faster."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from aimet_ext.core.precision import training_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("has", "autocast", "dtype"),
    [
        ({"avx512_bf16": True}, None, torch.bfloat16),
        ({"amx_bf16": True}, None, torch.bfloat16),
        ({"avx512_bf16": True}, False, torch.float32),
        ({"avx512_bf16": False, "avx512_bw": True}, None, torch.float32),
        ({}, None, torch.float32),
        ({}, True, torch.bfloat16),
    ],
    ids=str,
)
def test_products_are_in_bfloat16_where_that_is_faster(
    has: dict[str, bool],
    autocast: bool | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(has), raising=False)
    x = torch.ones(2, 3)
    with training_precision(CPU, autocast):
        product, total = x @ x.T, x.sum()
    assert (product.dtype, total.dtype) == (dtype, torch.float32)


def test_a_torch_that_does_not_know_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    with training_precision(CPU):
        assert (torch.ones(2, 3) @ torch.ones(3, 2)).dtype == torch.float32


def test_doubles_stay() -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    with training_precision(CPU, True):
        assert (x @ x.T).dtype == torch.float64
