"""Attention of generation: prompts as one packed row, then one new token a row against the cache.

Registered with transformers under the name `cached`. The library makes no mask for a name that it
has none for, so what decides is what the caller hands over: `segments` for a row of prompts, an
attention mask (or none) for new tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from grace_core.models.packed_attention import attend
from grace_core.models.segments import Segments

CACHED = "cached"

# dims: B rows, H heads, K key-value heads, T columns of the cache, L tokens, D width of a head


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers asks for.

    Args:
        query: (1, H, L, D) of packed prompts, or (B, H, 1, D) of one new token a row.
        key: (1, K, L, D) or (B, K, T, D), and `value` likewise.
        attention_mask: None, or (B, 1, 1, T): which columns a row's new token sees.
        segments: the prompts of a packed row; None for new tokens.

    Returns:
        (1, L, H, D) or (B, 1, H, D), and None for the attention weights.
    """
    assert not kwargs.get("dropout"), "the supported families have no dropout in attention"
    if segments is not None:
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        return attend(q, k, v, segments, scale=scaling, causal=True)[None], None
    rows, heads, tokens, width = query.shape
    assert tokens == 1, "after its prompt, a row goes on token by token"
    # Heads that share a key-value head are consecutive. As queries of that one head they need no
    # repeated copy of the cache, which is what decoding is bound by.
    grouped = query.view(rows, key.shape[1], -1, width)
    found = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return found.reshape(rows, 1, heads, width), None


AttentionInterface.register(CACHED, cached_attention)
