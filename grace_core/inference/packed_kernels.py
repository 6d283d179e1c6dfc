"""Products of bf16 inputs with packed weights, as Triton kernels.

Weights are words in the order of `grace_core.inference.layout` and one bf16 scale a group; the
product is y = x W^T with W = code * scale. Codes are exact in bf16 and in fp32, sums are fp32, and
a group's scale is multiplied in fp32, so a result differs from the fp32 product with the exact
code * scale only by the order of its sums and by its own rounding. The reference model rounds
code * scale to bf16 first, which moves each weight by at most 2^-9 of itself.

`few_rows`   a row's dot products on the ordinary units: for one to a few rows, where weights are
             read at the rate of the memory and nothing else matters.
`tiles`      codes become bf16 on the way to the tensor cores: for up to about a hundred rows.
`expand`     W itself, rounded to bf16: exactly the evaluated weights, for a dense product of many
             rows.

`few_rows` and `tiles` may cut the input dimension into parts that run side by side. Their result is
then a stack of fp32 partial sums, which the next kernel adds in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import language as tl

# dims: M rows, N outputs, K inputs, P parts of the input dimension

MOST_FEW_ROWS = 4
"""Rows that `few_rows` takes."""

_ONE = 0x3F800000
"""Bits of 1.0; a code's field set into the top of its mantissa makes 1 + unsigned / 2^b."""

_INTEGER = tl.constexpr(0x4B000000)
"""Bits of 2^23; an unsigned code in its lowest bits makes 2^23 + unsigned."""


@dataclass(frozen=True)
class Plan:
    """How a product is cut among programs."""

    block_n: int
    """Outputs of a program."""

    parts: int = 1
    """Of the input dimension, each with programs of its own."""

    block_m: int = 16
    """Rows of a program; `tiles` only, at least 16."""

    slabs: int = 16
    """Slabs of 128 inputs that a program takes at a time; `few_rows` only, a power of two."""

    warps: int = 4
    stages: int = 3


@triton.jit
def _one_row(  # type: ignore[no-untyped-def]
    x,  # (K,)
    word,  # (BLOCK_N, SLABS * WORDS)
    scale,
    first,  # (1, SLABS * WORDS): the input that belongs to a word's first field
    inside,
    one,
    BITS: tl.constexpr,
):
    """Products of a row with the codes of each word, times scale / 2^BITS."""
    FIELDS: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = 128 // FIELDS
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    total = tl.zeros(first.shape, dtype=tl.float32)
    product = tl.zeros(word.shape, dtype=tl.float32)
    for field in tl.static_range(FIELDS):
        # Four numbers a thread, as of the words: both then lie in the same threads.
        place = tl.max_contiguous(first + field * WORDS, [1, 4])
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if 23 - BITS - BITS * field >= 0:
            moved = word << (23 - BITS - BITS * field)
        else:
            moved = word >> (BITS * field + BITS - 23)
        weight = ((moved & MASK) | one).to(tl.float32, bitcast=True)
        total += value
        product += weight * value
    # Codes are unsigned - 2^(BITS - 1), and weights here 1 + unsigned / 2^BITS.
    return scale * (product - 1.5 * total)


@triton.jit
def _few_rows_kernel(  # type: ignore[no-untyped-def]
    x,  # (ROWS, K), rows x_stride apart
    words,  # (N, K * BITS / 32)
    scales,  # (N, K / GROUP)
    bias,  # (N,)
    out,  # (PARTS, ROWS, N)
    x_stride,
    N,
    one,  # bits of 1.0; as a constant it would cost one more instruction for each weight
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # 1 to 4
    BLOCK_N: tl.constexpr,
    SLABS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    FIELDS: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = 128 // FIELDS  # of a slab
    ALL: tl.constexpr = K // 128
    SHARE: tl.constexpr = (ALL + PARTS - 1) // PARTS  # slabs of a part

    part = tl.program_id(1)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    place = tl.arange(0, SLABS * WORDS)[None, :]
    acc_0 = tl.zeros([BLOCK_N, SLABS * WORDS], dtype=tl.float32)
    acc_1 = acc_0
    acc_2 = acc_0
    acc_3 = acc_0
    for begin in tl.static_range(0, SHARE, SLABS):
        near = begin + place // WORDS
        slab = part * SHARE + near
        inside = (near < SHARE) & (slab < ALL)
        present = inside & (n < N)
        word = tl.load(
            words + n * (K // FIELDS) + slab * WORDS + place % WORDS, mask=present, other=0
        )
        scale = tl.load(
            scales + n * (K // GROUP) + (slab * 128) // GROUP, mask=present, other=0.0
        ).to(tl.float32)
        first = slab * 128 + place % WORDS
        acc_0 += _one_row(x, word, scale, first, inside, one, BITS)
        if ROWS > 1:
            acc_1 += _one_row(x + x_stride, word, scale, first, inside, one, BITS)
        if ROWS > 2:
            acc_2 += _one_row(x + 2 * x_stride, word, scale, first, inside, one, BITS)
        if ROWS > 3:
            acc_3 += _one_row(x + 3 * x_stride, word, scale, first, inside, one, BITS)

    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = outputs < N
    added = tl.zeros([BLOCK_N], dtype=tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + outputs, mask=held & (part == 0), other=0.0).to(tl.float32)
    out += part * ROWS * N + outputs
    _store_sum(out, acc_0, added, held, BITS)
    if ROWS > 1:
        _store_sum(out + N, acc_1, added, held, BITS)
    if ROWS > 2:
        _store_sum(out + 2 * N, acc_2, added, held, BITS)
    if ROWS > 3:
        _store_sum(out + 3 * N, acc_3, added, held, BITS)


@triton.jit
def _store_sum(out, acc, added, held, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    y = tl.sum(acc, axis=1) * (1 << BITS) + added
    tl.store(out, y.to(out.dtype.element_ty), mask=held)


@triton.jit
def _tiles_kernel(  # type: ignore[no-untyped-def]
    x,  # as above, and all that follow
    words,
    scales,
    bias,
    out,
    x_stride,
    M,
    N,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    FIELDS: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = 128 // FIELDS
    ALL: tl.constexpr = K // 128
    SHARE: tl.constexpr = (ALL + PARTS - 1) // PARTS
    # An unsigned code u stands for u - 2^(BITS - 1).
    OFFSET: tl.constexpr = 8388608.0 + (1 << (BITS - 1))

    part = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, 128)
    shift = (k // WORDS) * BITS
    word_places = words + n[None, :] * (K // FIELDS) + (k % WORDS)[:, None]
    inputs = x + m[:, None] * x_stride + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for slab in range(part * SHARE, min(part * SHARE + SHARE, ALL)):
        value = tl.load(inputs + slab * 128, mask=(m < M)[:, None], other=0.0)
        # Fields of a word are read one by one; all but the first come from the nearest cache.
        word = tl.load(word_places + slab * WORDS, mask=(n < N)[None, :], other=0)
        unsigned = (word >> shift[:, None]) & ((1 << BITS) - 1)
        code = (unsigned | _INTEGER).to(tl.float32, bitcast=True) - OFFSET
        product = tl.dot(value, code.to(value.dtype), input_precision="ieee")
        scale = tl.load(scales + n * (K // GROUP) + (slab * 128) // GROUP, mask=n < N, other=0.0)
        acc += product * scale.to(tl.float32)[None, :]
    if HAS_BIAS:
        added = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        acc += tl.where(part == 0, added, 0.0)[None, :]
    place_out = out + part * M * N + m[:, None] * N + n[None, :]
    tl.store(place_out, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _expand_kernel(  # type: ignore[no-untyped-def]
    words,  # (S, WORDS), slabs one after the other
    scales,
    out,  # (S, 128)
    S,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SLABS: tl.constexpr,
):
    FIELDS: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = 128 // FIELDS
    OFFSET: tl.constexpr = 8388608.0 + (1 << (BITS - 1))
    slab = tl.program_id(0).to(tl.int64) * SLABS + tl.arange(0, SLABS)
    present = slab < S
    k = tl.arange(0, 128)
    word = tl.load(
        words + slab[:, None] * WORDS + (k % WORDS)[None, :], mask=present[:, None], other=0
    )
    unsigned = (word >> ((k // WORDS) * BITS)[None, :]) & ((1 << BITS) - 1)
    code = (unsigned | _INTEGER).to(tl.float32, bitcast=True) - OFFSET
    scale = tl.load(scales + (slab * 128) // GROUP, mask=present, other=0.0).to(tl.float32)
    weight = (code * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + slab[:, None] * 128 + k[None, :], weight, mask=present[:, None])


def few_rows(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    plan: Plan,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    """x W^T for a few rows.

    Args:
        x: (M, K), bf16 or fp32, neighbours in a row next to each other; M is at most 4.
        words: (N, K bits / 32) int32 and `scales` (N, K / group_size), both without gaps.
        bias: (N,) or None.

    Returns:
        (1, M, N) in the dtype of x, or (parts, M, N) fp32 to be summed.
    """
    rows, inputs = x.shape
    assert rows <= MOST_FEW_ROWS
    outputs = len(words)
    out = _room(x, outputs, plan.parts)
    grid = (triton.cdiv(outputs, plan.block_n), plan.parts)
    _few_rows_kernel[grid](
        x,
        words,
        scales,
        scales if bias is None else bias,
        out,
        x.stride(0),
        outputs,
        _ONE,
        K=inputs,
        BITS=bits,
        GROUP=group_size,
        ROWS=rows,
        BLOCK_N=plan.block_n,
        SLABS=plan.slabs,
        PARTS=plan.parts,
        HAS_BIAS=bias is not None,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    return out


def tiles(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    plan: Plan,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    """x W^T on the tensor cores; arguments and result as those of :func:`few_rows`, any M."""
    rows, inputs = x.shape
    outputs = len(words)
    out = _room(x, outputs, plan.parts)
    grid = (triton.cdiv(outputs, plan.block_n), triton.cdiv(rows, plan.block_m), plan.parts)
    _tiles_kernel[grid](
        x,
        words,
        scales,
        scales if bias is None else bias,
        out,
        x.stride(0),
        rows,
        outputs,
        K=inputs,
        BITS=bits,
        GROUP=group_size,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        PARTS=plan.parts,
        HAS_BIAS=bias is not None,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    return out


def expand(words: Tensor, scales: Tensor, out: Tensor, *, bits: int, group_size: int) -> None:
    """W = code * scale of one or several layers that lie behind one another.

    Args:
        words: int32, any shape, without gaps; `scales` those of its groups in the same order.
        out: 32 / bits as many elements as `words`, bf16 or fp32; overwritten.
    """
    slabs = out.numel() // 128
    _expand_kernel[(triton.cdiv(slabs, 16),)](
        words, scales, out, slabs, BITS=bits, GROUP=group_size, SLABS=16, num_warps=4
    )


def _room(x: Tensor, outputs: int, parts: int) -> Tensor:
    dtype = x.dtype if parts == 1 else torch.float32
    return torch.empty(parts, len(x), outputs, dtype=dtype, device=x.device)
