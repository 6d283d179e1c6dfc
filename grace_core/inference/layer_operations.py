"""What lies between the products of a decoder layer, in plain PyTorch.

`layer_kernels` has the same functions for a GPU.

A product comes as partial sums (P, M, N), see `PackedLinear.partial_products`; a dense one has one
part. Sums are rounded to the model's dtype first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from grace_core.models import kernels

# dims: P partial sums, M rows, d width, H query heads, J key-value heads, D width of a head,
#       B rows of the cache, T its capacity


def add_and_norm(product: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add a product to the residual stream and take the root-mean-square norm of it.

    Args:
        product: (P, M, d), or None for the norm alone.
        residual: (M, d), added to in place.
        weight: (d,) of the norm.

    Returns:
        (M, d) in the residual's dtype.
    """
    if product is not None:
        residual += _summed(product, residual.dtype)
    return _rms_norm(residual, weight, eps)


def turn_and_keep(
    product: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    cosines: Tensor,
    sines: Tensor,
    turns: Tensor,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Norm and turn queries and keys, and put keys and values into the cache.

    Args:
        product: (P, M, (H + 2 J) D): queries, keys, values.
        norms: weights (D,) of the queries' and of the keys' norm, and epsilon; None without.
        cosines: (R, D) for rotary turning, both halves alike; `sines` likewise.
        turns: (M,) int64, each token's row of these.
        places: (M,) int64, each token's place in the cache.
        keys: (B T, J, D), written to; `values` likewise. Its dtype is the result's.

    Returns:
        (M, H + 2 J, D): queries and keys as they are attended with, and values.
    """
    kept, width = keys.shape[-2:]
    states = _summed(product, keys.dtype).view(product.shape[1], -1, width)
    heads = states.shape[1] - 2 * kept
    query, key, value = states.split([heads, kept, kept], dim=1)
    if norms is not None:
        query, key = _rms_norm(query, norms[0], norms[2]), _rms_norm(key, norms[1], norms[2])
    cosine, sine = cosines[turns][None], sines[turns][None]
    query, key = kernels.turn(query[None], key[None], cosine, sine)
    keys[places] = key[0]
    values[places] = value
    return torch.cat((query[0], key[0], value), dim=1)


def attend_to_cache(
    turned: Tensor, keys: Tensor, values: Tensor, places: Tensor, scale: float
) -> Tensor:
    """Attention of one new token a row to all tokens of its row.

    Args:
        turned: (M, H + 2 J, D) as :func:`turn_and_keep` returns it; queries are used.
        keys: (M, T, J, D), the new token's included; `values` likewise.
        places: (M,) int64: m T + the number of tokens before the new one.
        scale: of the products of queries and keys.

    Returns:
        (M, H D).
    """
    rows, capacity, kept, _ = keys.shape
    lengths = places - torch.arange(rows, device=places.device) * capacity + 1
    longest = int(lengths.max())
    held = torch.arange(longest, device=places.device) < lengths[:, None]
    attended = F.scaled_dot_product_attention(
        turned[:, : turned.shape[1] - 2 * kept, None],
        keys[:, :longest].transpose(1, 2),
        values[:, :longest].transpose(1, 2),
        attn_mask=held[:, None, None],
        scale=scale,
        enable_gqa=True,
    )
    return attended.reshape(rows, -1)


def silu_times(product: Tensor, dtype: torch.dtype) -> Tensor:
    """SwiGLU of (P, M, 2 d), gate and up side by side: silu(gate) * up, (M, d)."""
    gate, up = _summed(product, dtype).chunk(2, dim=-1)
    return kernels.silu_times(gate, up)


def _summed(product: Tensor, dtype: torch.dtype) -> Tensor:
    return (product[0] if len(product) == 1 else product.float().sum(0)).to(dtype)


def _rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers: the normalised states are rounded before they are multiplied."""
    exact = states.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(states.dtype)
