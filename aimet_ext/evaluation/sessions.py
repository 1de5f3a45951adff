"""Sessions of onnxruntime as modules, so that what evaluates modules evaluates them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["SessionModel"]

_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"


class SessionModel(nn.Module):
    """A language model behind a session: called with ids, or with its inputs by name.

    :param session: of onnxruntime, of a graph with the input ``input_ids`` (or one input only) and
        the output ``logits`` (or else its first one).
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self._session = session
        self._types = {each.name: each.type for each in session.get_inputs()}
        outputs = [each.name for each in session.get_outputs()]
        self._output = "logits" if "logits" in outputs else outputs[0]
        self._ids = _IDS if _IDS in self._types else next(iter(self._types), _IDS)

    def named(self, batch: Any) -> dict[str, Tensor]:
        """A batch as inputs by name; what the graph does not take is dropped.

        A mask of ones and positions from 0 are filled in where the graph asks for them, for batches
        without padding.

        :param batch: tensor or array of ids ``[batch, seq]``, a tuple in the order of the graph's
            inputs, or a mapping with ``input_ids``.
        :raises ValueError: an input is missing that cannot be filled in, or there are too many.
        """
        if isinstance(batch, tuple | list):
            if len(batch) > len(self._types) + 1:
                raise ValueError(
                    "each batch must hold one array for each of the model's inputs "
                    f"({', '.join(self._types)}) and a label at most, got {len(batch)} values"
                )
            batch = dict(zip(self._types, batch, strict=False))  # what is over is the label
        given = dict(batch) if isinstance(batch, Mapping) else {self._ids: batch}
        ids = given.get(self._ids, given.get(_IDS))
        if ids is None:
            raise ValueError(
                f"each batch must hold {self._ids!r}, got {', '.join(given) or 'nothing'}"
            )
        ids = torch.as_tensor(ids)
        mask = torch.as_tensor(given.get(_MASK, torch.ones_like(ids)))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        known = {_MASK: mask, _POSITIONS: positions, **given, _IDS: ids, self._ids: ids}
        missing = [name for name in self._types if name not in known]
        if missing:
            raise ValueError(
                f"the model has the inputs {', '.join(map(repr, self._types))}, but a batch lacks "
                f"{', '.join(map(repr, missing))}; give batches as mappings with all of them"
            )
        keep = {*self._types, _IDS, _MASK} if _MASK in given else {*self._types, _IDS}
        return {name: torch.as_tensor(known[name]) for name in known if name in keep}

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits ``[batch, seq, vocab]``."""
        feeds = {}
        for name, kind in self._types.items():
            array = inputs[name].detach().cpu().numpy()
            feeds[name] = array.astype(_TYPES[kind], copy=False) if kind in _TYPES else array
        (logits,) = self._session.run([self._output], feeds)
        return torch.from_numpy(logits)
