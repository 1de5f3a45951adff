"""Differentiable torch versions of attention operators: ONNX's own and onnxruntime's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aimet_ext.onnx.ops.operator import (
    CONTRIB,
    Attributes,
    Inputs,
    Limit,
    Operator,
    Outputs,
    operand,
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """Return ``softmax(cap(scale · q kᵀ) + bias) v`` of every head; rows without keys are zero.

    :param q: ``[batch, heads, seq, size]``.
    :param k: ``[batch, kv_heads, total, size]``; heads / kv_heads consecutive heads read each.
    :param v: ``[batch, kv_heads, total, v_size]``.
    :param bias: added to the scores, broadcasts to ``[batch, heads, seq, total]``.
    :param allowed: bool, which keys a query sees, broadcasts likewise.
    :param softcap: limit c of the scores, ``c · tanh(score / c)``; 0 for none.
    :param sink: ``[heads]``, score of a key without value that takes its share of the softmax.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * (q @ k.mT)  # [batch, heads, seq, total]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sink is not None:
        column = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    # A row of -inf alone has no softmax; both it and its gradient are kept finite.
    shares = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    return shares[..., : k.shape[2]] @ v


def _heads(x: Tensor, count: int) -> Tensor:
    """Return ``[batch, seq, count · size]`` as ``[batch, count, seq, size]``."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    """Return ``[batch, heads, seq, size]`` as ``[batch, seq, heads · size]``."""
    return x.transpose(1, 2).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of the first channels by their token's angles; the other channels stay.

    Pair i consists of channels (i, i + pairs), or if interleaved (2 i, 2 i + 1).

    :param x: ``[batch, heads, seq, size]``.
    :param cos: ``[batch or 1, seq, pairs]``; as ``sin``.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


def _behind_past(
    k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Return keys and values behind those of a cache, and how many it holds."""
    if past_k is None or past_v is None:
        return k, v, 0
    return torch.cat([past_k, k], 2), torch.cat([past_v, v], 2), past_k.shape[2]


def _causal(q: Tensor, k: Tensor, past: int) -> Tensor:
    """Return keys that each query may see, bool ``[seq, total]``."""
    return _steps(k.shape[2], q)[None] <= past + _steps(q.shape[2], q)[:, None]


def _rotary_contrib(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Compute onnxruntime's RotaryEmbedding: one position to start at, or one per token."""
    x, positions, cos, sin = inputs
    width = attributes.get("rotary_embedding_dim", 0)
    flat = x.dim() == 3
    if flat:
        count = attributes.get("num_heads", 0) if width else 0
        x = _heads(x, count or x.shape[-1] // (2 * cos.shape[-1]))
    if positions.dim() == 1:
        positions = (positions + _steps(x.shape[2], positions))[None]
    interleaved = bool(attributes.get("interleaved", 0))
    result = rotate(x, cos[positions.long()], sin[positions.long()], interleaved=interleaved)
    return _merged(result) if flat else result


def _rotary_onnx(attributes: Attributes, inputs: Inputs, opset: int) -> Tensor:
    """Compute ONNX's RotaryEmbedding: tables by position, without positions one row per token."""
    x, cos, sin = inputs[:3]
    positions = operand(inputs, 3)
    flat = x.dim() == 3
    if flat:
        x = _heads(x, attributes["num_heads"])
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    result = rotate(x, cos, sin, interleaved=bool(attributes.get("interleaved", 0)))
    return _merged(result) if flat else result


def _per_head_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _grouped(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Compute onnxruntime's GroupQueryAttention: causal, rotary inside if asked, grouped keys.

    Rows of a batch that is a prompt (no past) may be padded on the right: ``seqlens_k + 1`` keys
    of a row count. Behind a past, all rows must be of one length.

    :raises ValueError: rows of different lengths behind a past.
    """
    q, k, v, past_k, past_v, last_key = (operand(inputs, position) for position in range(6))
    heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    if k is None:  # all three in one, [batch, seq, (heads + 2 · kv_heads) · size]
        size = q.shape[-1] // (heads + 2 * kv_heads)
        q, k, v = q.split([heads * size, kv_heads * size, kv_heads * size], -1)
    q, k, v = _heads(q, heads), _heads(k, kv_heads), _heads(v, kv_heads)
    epsilon = attributes.get("qk_norm_epsilon", 1e-6)
    q = _per_head_norm(q, operand(inputs, 14), epsilon)
    k = _per_head_norm(k, operand(inputs, 15), epsilon)
    seq, past = q.shape[2], 0 if past_k is None else past_k.shape[2]
    lengths = last_key.reshape(-1) + 1  # [batch]
    if past and bool((lengths != past + seq).any()):
        raise ValueError(
            "behind a past, GroupQueryAttention is translated where each row has "
            f"{past} past and {seq} new keys; seqlens_k + 1 is {lengths.tolist()}"
        )
    if attributes.get("do_rotary", 0):
        q, k = _rotated_pair(q, k, past, inputs, bool(attributes.get("rotary_interleaved", 0)))
    k, v, _ = _behind_past(k, v, past_k, past_v)
    allowed = _visible(seq, past, lengths, attributes)
    bias, sink = operand(inputs, 10), operand(inputs, 11)
    if sink is None and attributes.get("smooth_softmax", 0) == 1:
        sink = q.new_zeros(heads)
    output = attend(
        q,
        k,
        v,
        scale=attributes.get("scale", 0.0) or q.shape[-1] ** -0.5,
        bias=bias,
        allowed=allowed,
        softcap=attributes.get("softcap", 0.0),
        sink=sink,
    )
    return _merged(output), k, v


def _rotated_pair(
    q: Tensor, k: Tensor, past: int, inputs: Inputs, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, ``[batch, heads, seq, size]``."""
    cos, sin, positions = inputs[7], inputs[8], operand(inputs, 9)
    if positions is None:
        positions = past + _steps(q.shape[2], q)[None]  # [1, seq]
    elif not past:  # onnxruntime reads the first position of a prompt only
        positions = positions.reshape(-1)[:1] + _steps(q.shape[2], q)[None]
    cos, sin = cos[positions.long()], sin[positions.long()]
    return (
        rotate(q, cos, sin, interleaved=interleaved),
        rotate(k, cos, sin, interleaved=interleaved),
    )


def _visible(seq: int, past: int, lengths: Tensor, attributes: Attributes) -> Tensor:
    """Return which keys a query sees, bool ``[batch, 1, seq, past + seq]``."""
    query = past + _steps(seq, lengths)[:, None]  # [seq, 1]
    key = _steps(past + seq, lengths)[None]  # [1, total]
    seen = (key < lengths[:, None])[:, None, None, :]  # [batch, 1, 1, total]
    if attributes.get("causal", 1):
        seen = seen & (key <= query)
    window = attributes.get("local_window_size", -1)
    if window > 0:
        seen = seen & (query - key < window)
    return seen


def _grouped_limit(attributes: Attributes, given: Sequence[bool]) -> str | None:
    """Return what of GroupQueryAttention is not translated."""
    for name, default in (("qk_output", 0), ("sliding_window_cache", 0)):
        if attributes.get(name, default) != default:
            return f"{name}={attributes[name]!r} is not translated"
    for name in ("k_quant_type", "v_quant_type"):
        if attributes.get(name, "NONE") != "NONE":
            return f"a quantized cache ({name}={attributes[name]!r}) is not translated"
    if attributes.get("n_outputs", 1) > 3:
        return "the output of scores is not translated"
    return None


def _multi_head(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Compute onnxruntime's MultiHeadAttention of separate queries, keys and values.

    :raises ValueError: a key padding mask of other than one value per key, packed keys.
    """
    q, k, v, bias, padding, added, past_k, past_v = (
        operand(inputs, position) for position in range(8)
    )
    heads = attributes["num_heads"]
    if q.dim() != 3:
        raise ValueError(f"queries [batch, seq, hidden] are required, got {tuple(q.shape)}")
    if bias is not None:
        parts = bias.split([q.shape[-1], q.shape[-1], bias.shape[0] - 2 * q.shape[-1]])
        q = q + parts[0]
        k, v = (k + parts[1], v + parts[2]) if k.dim() == 3 else (k, v)
    q = _heads(q, heads)
    if k.dim() == 5:
        raise ValueError("packed keys and values are not translated")
    k, v = (_heads(k, heads), _heads(v, heads)) if k.dim() == 3 else (k, v)
    k, v, past = _behind_past(k, v, past_k, past_v)
    if padding is not None:
        if padding.shape != (q.shape[0], k.shape[2]):
            raise ValueError(
                f"a key padding mask [batch, total] {(q.shape[0], k.shape[2])} is required, "
                f"got {tuple(padding.shape)}"
            )
        hidden = torch.where(padding == 0, attributes.get("mask_filter_value", -10000.0), 0.0)
        hidden = hidden[:, None, None, :].to(q.dtype)
        added = hidden if added is None else added + hidden
    allowed = None
    if attributes.get("unidirectional", 0):
        allowed = _causal(q, k, past)
    scale = attributes.get("scale", 0.0) or q.shape[-1] ** -0.5
    output = attend(q, k, v, scale=scale, bias=added, allowed=allowed)
    return _merged(output), k, v


def _multi_head_limit(attributes: Attributes, given: Sequence[bool]) -> str | None:
    """Return what of MultiHeadAttention is not translated."""
    if not (len(given) > 2 and given[1] and given[2]):
        return "packed queries, keys and values are not translated"
    if any(given[8:]):
        return "a cache in a shared buffer is not translated"
    return "the output of scores is not translated" if attributes["n_outputs"] > 3 else None


def _attention(attributes: Attributes, inputs: Inputs, opset: int) -> Outputs:
    """Compute ONNX's Attention of ``[batch, heads, seq, size]`` or ``[batch, seq, hidden]``."""
    q, k, v, mask, past_k, past_v = (operand(inputs, position) for position in range(6))
    flat = q.dim() == 3
    if flat:
        q = _heads(q, attributes["q_num_heads"])
        k, v = (_heads(x, attributes["kv_num_heads"]) for x in (k, v))
    k, v, past = _behind_past(k, v, past_k, past_v)
    allowed = None
    if attributes.get("is_causal", 0):
        allowed = _causal(q, k, past)
    if mask is not None and mask.dtype == torch.bool:
        allowed, mask = mask if allowed is None else mask & allowed, None
    output = attend(
        q,
        k,
        v,
        scale=attributes.get("scale", q.shape[-1] ** -0.5),
        bias=mask,
        allowed=allowed,
        softcap=attributes.get("softcap", 0.0),
    )
    return (_merged(output) if flat else output), k, v


def _attention_limit(attributes: Attributes, given: Sequence[bool]) -> str | None:
    """Return what of ONNX's Attention is not translated."""
    if any(given[6:]):
        return "nonpad_kv_seqlen is not translated"
    for name in ("left_window_size", "right_window_size"):
        if attributes.get(name, -1) >= 0:
            return f"{name}={attributes[name]} is not translated"
    return "the output of scores is not translated" if attributes["n_outputs"] > 3 else None


def _rotary_limit(attributes: Attributes, given: Sequence[bool]) -> str | None:
    """Return what of onnxruntime's RotaryEmbedding is not translated."""
    if attributes.get("is_packed_batching", 0):
        return "is_packed_batching=1 is not translated"
    return None if attributes.get("scale", 1.0) == 1.0 else "a scale is not translated"


ATTENTION: Mapping[tuple[str, str], Operator] = {
    ("", "Attention"): _attention,
    ("", "RotaryEmbedding"): _rotary_onnx,
    (CONTRIB, "GroupQueryAttention"): _grouped,
    (CONTRIB, "MultiHeadAttention"): _multi_head,
    (CONTRIB, "RotaryEmbedding"): _rotary_contrib,
}

ATTENTION_LIMITS: Mapping[tuple[str, str], Limit] = {
    ("", "Attention"): _attention_limit,
    (CONTRIB, "GroupQueryAttention"): _grouped_limit,
    (CONTRIB, "MultiHeadAttention"): _multi_head_limit,
    (CONTRIB, "RotaryEmbedding"): _rotary_limit,
}
