"""Slow and plain: recurrent layers step by step, and the rows that their weights multiply.

Written from the formulas in the documentation of torch.nn.LSTM, GRU and RNN, and of ONNX's GRU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def run_by_steps(
    mode: str,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w: Tensor,
    r: Tensor,
    wb: Tensor,
    rb: Tensor,
    *,
    reset_before: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One layer in one direction.

    :param mode: "LSTM" (gates i, f, g, o), "GRU" (r, z, n), "RNN_TANH" or "RNN_RELU".
    :param x: ``[steps, batch, in]``.
    :param h: initial state ``[batch, hidden]``.
    :param c: initial cell state, for an LSTM.
    :param reset_before: a GRU's reset gate multiplies the state before ``r`` does.
    :returns: states ``[steps, batch, hidden]``, by step the state that ``r`` multiplies, and by
        step what its candidate gate multiplies.
    """
    size = h.shape[1]
    outputs, before, candidates = [], [], []
    for row in x:
        before.append(h)
        read = row @ w.T + wb
        if mode == "LSTM":
            i, f, g, o = (read + h @ r.T + rb).split(size, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif mode == "GRU":
            hidden = h @ r.T + rb
            reset = (read[:, :size] + hidden[:, :size]).sigmoid()
            update = (read[:, size : 2 * size] + hidden[:, size : 2 * size]).sigmoid()
            if reset_before:
                candidates.append(reset * h)
                mixed = candidates[-1] @ r[2 * size :].T + rb[2 * size :]
            else:
                mixed = reset * hidden[:, 2 * size :]
            h = update * h + (1 - update) * (read[:, 2 * size :] + mixed).tanh()
        else:
            total = read + h @ r.T + rb
            h = total.tanh() if mode == "RNN_TANH" else total.relu()
        outputs.append(h)
    return torch.stack(outputs), before, candidates


@torch.no_grad()
def rows_of_weights(module: nn.RNNBase, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output for ``x [batch, steps, in]``, and rows ``[rows, in]`` by weight, in float64."""
    x = x.transpose(0, 1).double()
    rows: dict[str, Tensor] = {}
    for layer in range(module.num_layers):
        outputs = []
        for end in ("", "_reverse")[: 1 + module.bidirectional]:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            values = [getattr(module, f"{name}_l{layer}{end}").double() for name in names]
            zeros = x.new_zeros(x.shape[1], module.hidden_size)
            steps = x.flip(0) if end else x
            states, before, _ = run_by_steps(module.mode, steps, zeros, zeros, *values)
            outputs.append(states.flip(0) if end else states)
            rows[f"weight_ih_l{layer}{end}"] = x.flatten(0, 1)
            rows[f"weight_hh_l{layer}{end}"] = torch.cat(before)
        x = torch.cat(outputs, 2)
    return x.transpose(0, 1), rows
