"""What lies between the products of a decoder layer, in one Triton kernel each.

All take a product as partial sums (P, M, N), any floating dtype, which they add in fp32 and round
to the model's dtype before anything else, as a product of one part would have been rounded. Then
they do what transformers' modules do, with fewer roundings in between.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from grace_core.inference.launches import launch_options, wait_for_earlier

# dims: P partial sums, M rows, d width, H query heads, J key-value heads, D width of a head,
#       B rows of the cache, T its capacity, S stretches of it

STRETCH = 128
"""Tokens of the cache that one program attends to."""

_BLOCK = 1024


@triton.jit
def _summed(  # type: ignore[no-untyped-def]
    product, offset, mask, stride, PARTS: tl.constexpr, dtype: tl.constexpr
):
    """One element's partial sums, rounded to `dtype`; fp32."""
    total = tl.load(product + offset, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(product + part * stride + offset, mask=mask, other=0.0).to(tl.float32)
    return total.to(dtype).to(tl.float32)


@triton.jit
def _add_and_norm_kernel(  # type: ignore[no-untyped-def]
    product,  # (PARTS, M, d)
    residual,  # (M, d), overwritten
    weight,  # (d,)
    out,  # (M, d)
    stride,  # M d
    eps,
    d,
    PARTS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    place = tl.arange(0, BLOCK)
    inside = place < d
    row = tl.program_id(0) * d + place
    scale = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    wait_for_earlier(DEPENDENT)
    state = tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        dtype: tl.constexpr = residual.dtype.element_ty
        state += _summed(product, row, inside, stride, PARTS, dtype)
        rounded = state.to(dtype)
        tl.store(residual + row, rounded, mask=inside)
        state = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(state * state, axis=0) / d + eps)
    normed = (state * factor).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row, (normed * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_kernel(  # type: ignore[no-untyped-def]
    product,  # (PARTS, M, (H + 2 J) D)
    query_norm,  # (D,)
    key_norm,  # (D,)
    cosines,  # (R, D)
    sines,
    turns,  # (M,) int64 rows of the two
    places,  # (M,) int64 rows of the cache
    keys,  # (B T, J, D)
    values,
    out,  # (M, H + 2 J, D)
    stride,  # M (H + 2 J) D
    eps,
    H,
    J,
    D,
    PARTS: tl.constexpr,
    NORMS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_earlier(DEPENDENT)
    token = tl.program_id(0)
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    other = tl.where(channel < D // 2, channel + D // 2, channel - D // 2)
    dtype: tl.constexpr = out.dtype.element_ty
    start = (token * (H + 2 * J) + head) * D
    state = _summed(product, start + channel, inside, stride, PARTS, dtype)
    if head < H + J:  # values are not turned
        crossed = _summed(product, start + other, inside, stride, PARTS, dtype)
        if NORMS:
            factor = tl.rsqrt(tl.sum(state * state, axis=0) / D + eps)
            norm = query_norm
            if head >= H:
                norm = key_norm
            here = tl.load(norm + channel, mask=inside, other=0.0).to(tl.float32)
            there = tl.load(norm + other, mask=inside, other=0.0).to(tl.float32)
            state = (state * factor).to(dtype).to(tl.float32) * here
            crossed = (crossed * factor).to(dtype).to(tl.float32) * there
            state = state.to(dtype).to(tl.float32)
            crossed = crossed.to(dtype).to(tl.float32)
        turn = tl.load(turns + token) * D
        cosine = tl.load(cosines + turn + channel, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sines + turn + channel, mask=inside, other=0.0).to(tl.float32)
        state = state * cosine + tl.where(channel < D // 2, -crossed, crossed) * sine
    result = state.to(dtype)
    tl.store(out + start + channel, result, mask=inside)
    place = tl.load(places + token)
    if head >= H + J:
        tl.store(values + (place * J + head - H - J) * D + channel, result, mask=inside)
    elif head >= H:
        tl.store(keys + (place * J + head - H) * D + channel, result, mask=inside)


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    turned,  # (M, H + 2 J, D); queries come first
    keys,  # (M, T, J, D)
    values,
    places,  # (M,) int64: m T + tokens before this one
    sums,  # (M, H, S, D) fp32
    maxima,  # (M, H, S) fp32, of scores in base 2
    weights,  # (M, H, S) fp32
    scale,  # log2(e) times the attention's
    T,
    S,
    H,
    J,
    D,
    HEADS: tl.constexpr,  # H / J rounded up, at least 16
    BLOCK: tl.constexpr,  # D rounded up
    TOKENS: tl.constexpr,
    STRETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_earlier(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    stretch = tl.program_id(2)
    length = (tl.load(places + row) - row * T + 1).to(tl.int32)
    first = stretch * STRETCH
    share = H // J
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, BLOCK)
    token = tl.arange(0, TOKENS)
    present = head < share
    inside = channel < D
    query_place = (row * (H + 2 * J) + group * share + head)[:, None] * D + channel[None, :]
    query = tl.load(turned + query_place, mask=present[:, None] & inside[None, :], other=0.0)
    top = tl.full([HEADS], -1e30, dtype=tl.float32)
    total = tl.zeros([HEADS], dtype=tl.float32)
    acc = tl.zeros([HEADS, BLOCK], dtype=tl.float32)
    for begin in range(first, tl.minimum(first + STRETCH, length), TOKENS):
        near = begin + token
        held = near < length
        place = ((row * T + near) * J + group)[:, None] * D + channel[None, :]
        mask = held[:, None] & inside[None, :]
        key = tl.load(keys + place, mask=mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(held[None, :], score, -1e30)
        higher = tl.maximum(top, tl.max(score, axis=1))
        kept = tl.exp2(top - higher)
        weight = tl.where(held[None, :], tl.exp2(score - higher[:, None]), 0.0)
        value = tl.load(values + place, mask=mask, other=0.0)
        part = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        acc = acc * kept[:, None] + part
        total = total * kept + tl.sum(weight, axis=1)
        top = higher
    # A stretch behind the last token leaves its initial values, which weigh nothing.
    at = (row * H + group * share + head) * S + stretch
    tl.store(maxima + at, top, mask=present)
    tl.store(weights + at, total, mask=present)
    tl.store(
        sums + at[:, None] * D + channel[None, :], acc, mask=present[:, None] & inside[None, :]
    )


@triton.jit
def _join_kernel(  # type: ignore[no-untyped-def]
    sums,
    maxima,
    weights,
    out,  # (M, H D)
    S,
    D,
    STRETCHES: tl.constexpr,  # S rounded up
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_earlier(DEPENDENT)
    at = tl.program_id(0).to(tl.int64)
    stretch = tl.arange(0, STRETCHES)
    channel = tl.arange(0, BLOCK)
    held = stretch < S
    inside = channel < D
    top = tl.load(maxima + at * S + stretch, mask=held, other=-1e30)
    share = tl.exp2(top - tl.max(top, axis=0))
    share = tl.where(held, share, 0.0)
    weight = tl.load(weights + at * S + stretch, mask=held, other=0.0)
    total = tl.sum(weight * share, axis=0)
    place = (at * S + stretch)[:, None] * D + channel[None, :]
    parts = tl.load(sums + place, mask=held[:, None] & inside[None, :], other=0.0)
    joined = tl.sum(parts * share[:, None], axis=0) / total
    tl.store(out + at * D + channel, joined.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_times_kernel(  # type: ignore[no-untyped-def]
    product,  # (PARTS, M, 2 d): gate, then up
    out,  # (M, d)
    stride,  # 2 M d
    d,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_earlier(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < d
    dtype: tl.constexpr = out.dtype.element_ty
    gate = _summed(product, row * 2 * d + place, inside, stride, PARTS, dtype)
    up = _summed(product, row * 2 * d + d + place, inside, stride, PARTS, dtype)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * d + place, (active * up).to(dtype), mask=inside)


def add_and_norm(product: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `layer_operations.add_and_norm`."""
    rows, width = residual.shape
    out = torch.empty_like(residual)
    given = residual if product is None else product
    _add_and_norm_kernel[(rows,)](
        given,
        residual,
        weight,
        out,
        rows * width,
        eps,
        width,
        PARTS=1 if product is None else len(product),
        ADDS=product is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8 if width > 1024 else 4,
        **launch_options(residual.device),
    )
    return out


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
    """See `layer_operations.turn_and_keep`."""
    parts, rows, width = product.shape
    kept, head_width = keys.shape[-2:]
    heads = width // head_width - 2 * kept
    dtype = keys.dtype
    out = torch.empty(rows, heads + 2 * kept, head_width, dtype=dtype, device=product.device)
    query_norm, key_norm, eps = (cosines, cosines, 0.0) if norms is None else norms
    _turn_kernel[(rows, heads + 2 * kept)](
        product,
        query_norm,
        key_norm,
        cosines,
        sines,
        turns,
        places,
        keys,
        values,
        out,
        rows * width,
        eps,
        heads,
        kept,
        head_width,
        PARTS=parts,
        NORMS=norms is not None,
        BLOCK=triton.next_power_of_2(head_width),
        num_warps=1,
        **launch_options(product.device),
    )
    return out


def attend_to_cache(
    turned: Tensor, keys: Tensor, values: Tensor, places: Tensor, scale: float
) -> Tensor:
    """See `layer_operations.attend_to_cache`."""
    rows, capacity, kept, width = keys.shape
    heads = turned.shape[1] - 2 * kept
    stretches = triton.cdiv(capacity, STRETCH)
    device = turned.device
    sums = torch.empty(rows, heads, stretches, width, dtype=torch.float32, device=device)
    maxima = torch.empty(rows, heads, stretches, dtype=torch.float32, device=device)
    weights = torch.empty_like(maxima)
    out = torch.empty(rows, heads * width, dtype=turned.dtype, device=device)
    block = max(16, triton.next_power_of_2(width))
    _attend_kernel[(rows, kept, stretches)](
        turned,
        keys,
        values,
        places,
        sums,
        maxima,
        weights,
        scale * 1.4426950408889634,
        capacity,
        stretches,
        heads,
        kept,
        width,
        HEADS=max(16, triton.next_power_of_2(heads // kept)),
        BLOCK=block,
        TOKENS=64,
        STRETCH=STRETCH,
        num_warps=4,
        num_stages=2,
        **launch_options(device),
    )
    _join_kernel[(rows * heads,)](
        sums,
        maxima,
        weights,
        out,
        stretches,
        width,
        STRETCHES=triton.next_power_of_2(stretches),
        BLOCK=block,
        num_warps=1,
        **launch_options(device),
    )
    return out


def silu_times(product: Tensor, dtype: torch.dtype) -> Tensor:
    """See `layer_operations.silu_times`."""
    parts, rows, both = product.shape
    width = both // 2
    out = torch.empty(rows, width, dtype=dtype, device=product.device)
    _silu_times_kernel[(rows, triton.cdiv(width, _BLOCK))](
        product,
        out,
        rows * both,
        width,
        PARTS=parts,
        BLOCK=_BLOCK,
        num_warps=4,
        **launch_options(product.device),
    )
    return out
