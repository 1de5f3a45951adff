"""Recurrent layers of torch, computed so that the inputs of each of their weights are seen.

The gates of a step are ``W x_t + R h_{t-1} + b``: two linear layers, of which one reads the layer's
input and the other the hidden states, the initial one first and the last one left out. This holds
for LSTM, GRU (torch multiplies with the reset gate behind ``R``) and RNN alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

# torch's kernel of one layer, by mode.
_KERNELS: dict[str, Any] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}


class Unrolled:
    """The forward pass of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` whose matrices are modules.

    Each matrix is a child of the name that torch has for it, such as ``weight_hh_l0``, with a
    ``weight``, and is called with all rows that it multiplies at once: those of ``weight_hh`` come
    of the weights as they are before it is called, what the layer returns of those behind it.
    Dropout is left out, as in evaluation mode.

    :param module: Layer, see :func:`matrices`.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        self.module = module

    def __call__(self, input: Any, hx: Any = None) -> Any:  # noqa: A002 (torch's name)
        """Return what the layer returns."""
        own, packed = self.module, isinstance(input, PackedSequence)
        x, sizes = (input.data, input.batch_sizes) if packed else (input, None)
        hx = hx if not packed or hx is None else _permuted(hx, input.sorted_indices)
        lasts = []
        for layer in range(own.num_layers):
            places = [f"_l{layer}{end}" for end in ("", "_reverse")[: 1 + own.bidirectional]]
            settings = (own.mode, own.batch_first, layer, len(places), own.proj_size)
            for place in places:
                getattr(own, f"weight_ih{place}")(x)
            before = _scan(x, sizes, hx, self._weights(places), settings)
            for number, place in enumerate(places):
                getattr(own, f"weight_hh{place}")(before[2][number])
            after = _scan(x, sizes, hx, self._weights(places), settings)
            x = after[0]
            lasts.append(after[1])
        last = _joined(lasts, own.mode)
        if not packed:
            return x, last
        output = PackedSequence(x, sizes, input.sorted_indices, input.unsorted_indices)
        return output, _permuted(last, input.unsorted_indices)

    def _weights(self, places: Sequence[str]) -> list[Tensor]:
        """Return the parameters of a layer in the order of torch's kernel."""
        own = self.module
        found = []
        for place in places:
            found += [getattr(own, f"{name}{place}").weight for name in ("weight_ih", "weight_hh")]
            found += [getattr(own, f"{name}{place}") for name in ("bias_ih", "bias_hh") if own.bias]
            found += [getattr(own, f"weight_hr{place}")] if own.proj_size else []
        return found


def matrices(module: nn.RNNBase) -> tuple[str, ...]:
    """Return the names of the weights of a recurrent layer that :class:`Unrolled` calls."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return tuple(name for name in names if name.startswith(("weight_ih", "weight_hh")))


@fx.wrap
def _scan(
    x: Tensor,
    sizes: Tensor | None,
    hx: Any,
    weights: Sequence[Tensor],
    settings: tuple[str, bool, int, int, int],
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """Compute one layer, both directions of it.

    :param x: Input ``[seq, batch, in]``, ``[batch, seq, in]`` or ``[seq, in]``, or the rows of a
        packed sequence.
    :param sizes: Sequences at each step, of a packed sequence.
    :param hx: Initial states of all layers, zeros if None.
    :param weights: Parameters, those of one direction after those of the other.
    :param settings: Mode, whether the batch comes first, number of the layer and of directions, and
        width of a projection.
    :returns: output, last states, and by direction the hidden states that ``weight_hh`` multiplies;
        output and these in the form of ``x``.
    """
    mode, batch_first, layer, directions, projection = settings
    single = sizes is None and x.dim() == 2
    turned = batch_first and sizes is None and not single
    rows = x.unsqueeze(1) if single else x.transpose(0, 1) if turned else x
    batch = rows.shape[1] if sizes is None else int(sizes[0])
    hidden = weights[1].shape[1]  # of the states, projected or not
    place = slice(directions * layer, directions * (layer + 1))
    if hx is None:
        widths = (hidden, weights[1].shape[0] // 4) if mode == "LSTM" else (hidden,)
        states = [rows.new_zeros(directions, batch, width) for width in widths]
    else:
        given = hx if mode == "LSTM" else (hx,)
        states = [(s.unsqueeze(1) if single else s)[place].contiguous() for s in given]
    carried = tuple(states) if mode == "LSTM" else states[0]
    has_bias = len(weights) // directions > 2 + bool(projection)
    common = (carried, list(weights), has_bias, 1, 0.0, False, directions == 2)
    if sizes is None:
        output, *lasts = _KERNELS[mode](rows, *common, False)
    else:
        output, *lasts = _KERNELS[mode](rows, sizes, *common)
    before = [
        _before(part, first, sizes, backward=number == 1)
        for number, (part, first) in enumerate(
            zip(output.split(hidden, -1), states[0], strict=True)
        )
    ]
    if single:
        output, *before = (t.squeeze(1) for t in (output, *before))
        lasts = [t.squeeze(1) for t in lasts]
    elif turned:
        output, *before = (t.transpose(0, 1) for t in (output, *before))
    return output, tuple(lasts), before


def _before(states: Tensor, first: Tensor, sizes: Tensor | None, *, backward: bool) -> Tensor:
    """Return the state before each step, of those after it.

    :param states: ``[seq, batch, hidden]``, or the rows of a packed sequence.
    :param first: Initial state ``[batch, hidden]``.
    :param sizes: Sequences at each step, of a packed sequence.
    :param backward: True if the steps are taken from the last one on.
    """
    if sizes is None:
        ends = [states[1:], first[None]] if backward else [first[None], states[:-1]]
        return torch.cat(ends)
    counts = sizes.tolist()
    steps = states.split(counts)
    if not backward:
        return torch.cat([(steps[n - 1] if n else first)[:count] for n, count in enumerate(counts)])
    pairs = zip([*steps[1:], states[:0]], counts, strict=True)
    # The sequences that end at a step start there.
    return torch.cat([torch.cat([after, first[len(after) : count]]) for after, count in pairs])


@fx.wrap
def _joined(lasts: Sequence[Sequence[Tensor]], mode: str) -> Any:
    """Return the last states of all layers, as the layer returns them."""
    joined = tuple(torch.cat(list(states)) for states in zip(*lasts, strict=True))
    return joined if mode == "LSTM" else joined[0]


def _permuted(states: Any, order: Tensor | None) -> Any:
    """Return states with the sequences of a batch in another order."""
    if order is None:
        return states
    if isinstance(states, tuple):
        return tuple(state.index_select(1, order) for state in states)
    return states.index_select(1, order)
