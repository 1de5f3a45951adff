"""Complex numbers as pairs of real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from aimet_ext.models.exportable import Exportable

torch.manual_seed(0)
DOUBLE = torch.float64


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turn ``x [batch, heads, seq, 8]`` by ``angles [batch, seq, 4]``, in complex numbers."""
    turns = 0.5 * torch.polar(torch.ones_like(angles), angles)
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * turns.unsqueeze(1).to(x.device)).flatten(3)


def test_rotations_in_complex_numbers():
    x, angles = torch.randn(2, 3, 5, 8, dtype=DOUBLE), torch.randn(2, 5, 4, dtype=DOUBLE)
    with Exportable():
        found = turned(x, angles)
        assert not found.is_complex()
    torch.testing.assert_close(found, turned(x, angles), rtol=1e-12, atol=1e-12)
