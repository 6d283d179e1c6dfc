"""Attention over a packed sequence, kept within each of its segments.

A packed row holds several samples one after the other, a vision tower's input several pictures.
Attention runs over each alone, so the result equals that of the unpacked ones and no L x L mask is
ever made. Two ways with one result: `attend` makes one call of the variable-length flash kernel
where that can be used; `attend_each` goes over the segments one by one, on any device.

`attend_each` is registered with transformers under the name `packed`; the segments travel as the
keyword `segments`, which decoder layers pass through untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from grace_core.models.segments import Segments

PACKED = "packed"

# dims: L tokens, D width of a head


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, causal: bool
) -> Tensor:
    """Attention of each segment to itself, in one kernel where possible.

    Args:
        query: (L, heads, D).
        key: (L, key-value heads, D), and `value` likewise; heads is a multiple of theirs.
        segments: their lengths add up to L; on the same device.
        scale: of the products of queries and keys.
        causal: whether tokens see only what precedes them in their segment.

    Returns:
        (L, heads, D).
    """
    if not query.is_cuda or flash_obstacle(query.device, query.dtype, query.shape[-1]) is not None:
        return attend_each(query, key, value, segments, scale=scale, causal=causal)
    # torch's own operator rather than `torch.nn.attention.varlen`: it has the same kernel, its
    # backward needs no Python, and its leading arguments are the same from torch 2.11 to 2.13,
    # while the module's are not.
    output: Tensor = torch.ops.aten._flash_attention_forward.default(
        query,
        key,
        value,
        segments.cumulative,
        segments.cumulative,
        segments.longest,
        segments.longest,
        0.0,
        causal,
        False,
        scale=scale,
    )[0]
    return output


def attend_each(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, causal: bool
) -> Tensor:
    """As `attend`, with one call of torch's attention a segment."""
    assert sum(segments.lengths) == len(query) == len(key)
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16 and query.requires_grad:
        # torch's bf16 attention backward takes three times as long as its fp32 one on a CPU
        # (16.1 against 5.1 ms for 12 samples of 85 tokens, 4 heads of 32, one thread).
        query, key, value = query.float(), key.float(), value.float()
    outputs = [
        F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )[0].transpose(0, 1)
        for q, k, v in zip(
            query.split(segments.lengths),
            key.split(segments.lengths),
            value.split(segments.lengths),
            strict=True,
        )
    ]
    return torch.cat(outputs).to(dtype)


def flash_obstacle(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why the variable-length flash kernel cannot be used; None where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {dtype}"
    if head_width % 8 or head_width > 256:
        return f"it takes heads of a multiple of 8, at most 256 wide, not {head_width}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash attention"
    return None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attend_each` in the form that transformers asks for.

    Args:
        query: (1, heads, L, D).
        key: (1, key-value heads, L, D), and `value` likewise.
        attention_mask: must be None: samples are separated by their lengths.

    Returns:
        (1, L, heads, D) and None for the attention weights.
    """
    assert attention_mask is None, "packed rows carry lengths, not masks"
    assert not kwargs.get("dropout"), "the supported families have no dropout in attention"
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend_each(q, k, v, segments, scale=scaling, causal=True)[None], None


AttentionInterface.register(PACKED, packed_attention)
