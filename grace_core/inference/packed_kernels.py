"""Products of bf16 inputs with packed weights, as Triton kernels.

Weights are words in the order of `grace_core.inference.layout` and one bf16 scale a group; the
product is y = x W^T with W = code * scale. Codes are exact in bf16 and in fp32, sums are fp32, and
a group's scale is multiplied in fp32, so a result differs from the fp32 product with the exact
code * scale only by the order of its sums and by its own rounding. The reference model rounds
code * scale to bf16 first, which moves each weight by at most 2^-9 of itself.

`few_rows`   a row's dot products on the ordinary units: for one or two rows, where weights are
             read at the rate of the memory and nothing else matters.
`tiles`      codes become bf16 in registers and are the left operand of the tensor cores, inputs
             the right one, W x^T: few rows then fill the tensor cores' short side.
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

from grace_core.inference.launches import launch_options, wait_for_earlier

# dims: M rows, N outputs, K inputs, P parts of the input dimension

MOST_FEW_ROWS = 2
"""Rows that `few_rows` takes."""

_ONE = 0x3F800000
"""Bits of 1.0; a code's field set into the top of its mantissa makes 1 + unsigned / 2^b."""

_NEXT_FIELD_4 = tl.constexpr("shr.b32 $0, $1, 4;")
_NEXT_FIELD_8 = tl.constexpr("shr.b32 $0, $1, 8;")
"""Of two halves at once. What the upper one shifts into the lower lies above the lowest field."""

_BF16_CODES_4 = tl.constexpr(
    """
    {
    .reg .b32 number, offset, one;
    mov.b32 one, 0x3F803F80;
    lop3.b32 number, $1, 0x000F000F, 0x43004300, 0xEA;
    mov.b32 offset, 0xC308C308;
    fma.rn.bf16x2 $0, number, one, offset;
    }
    """
)
"""Lowest fields of two halves: (u & 15) | bits of 128.0 is 128 + u; minus 136 is the code."""

_BF16_CODES_8 = tl.constexpr(
    """
    {
    .reg .b32 number, offset, one;
    mov.b32 one, 0x3F803F80;
    lop3.b32 number, $1, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 offset, $1, 0x00800080, 0xC380C380, 0x6A;
    fma.rn.bf16x2 $0, number, one, offset;
    }
    """
)
"""The same for 8 bits, of which bf16 takes 7 beside its exponent: 128 + (u & 127), minus 256 where
the highest bit of u is clear and minus 128 where it is set."""


@dataclass(frozen=True)
class Plan:
    """How a product is cut among programs."""

    block_n: int
    """Outputs of a program."""

    parts: int = 1
    """Of the input dimension, each with programs of its own."""

    block_m: int = 8
    """Rows of a program; `tiles` only, a power of two, at least 8."""

    slabs: int = 16
    """Slabs of 128 inputs that a program takes at a time; `few_rows` only, a power of two."""

    warps: int = 4
    stages: int = 3
    """Slabs of `tiles` on their way from the memory at a time, and one."""


@triton.jit
def _one_row(  # type: ignore[no-untyped-def]
    x,  # (K,), or (K / 2,) int32 pairs of bf16
    word,  # (BLOCK_N, SLABS * WORDS)
    scale,
    first,  # (1, SLABS * WORDS): the pair of inputs that belongs to a word's first fields
    inside,
    one,
    BITS: tl.constexpr,
):
    """Products of a row with the codes of each word, times scale / 2^BITS."""
    WORDS: tl.constexpr = 4 * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    total = tl.zeros(first.shape, dtype=tl.float32)
    product = tl.zeros(word.shape, dtype=tl.float32)
    for field in tl.static_range(16 // BITS):
        # Four numbers a thread, as of the words: both then lie in the same threads.
        place = tl.max_contiguous(first + field * WORDS, [1, 4])
        if x.dtype.element_ty == tl.int32:
            pair = tl.load(x + place, mask=inside, other=0)
            low = (pair << 16).to(tl.float32, bitcast=True)
            high = (pair & -65536).to(tl.float32, bitcast=True)
        else:
            low = tl.load(x + 2 * place, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(x + 2 * place + 1, mask=inside, other=0.0).to(tl.float32)
        # Into the top of the mantissa: the lower half's field to the left, the upper one's too
        # or to the right.
        lower = word << (23 - BITS - BITS * field)
        if 7 - BITS - BITS * field >= 0:
            upper = word << (7 - BITS - BITS * field)
        else:
            upper = word >> (BITS * field + BITS - 7)
        total += low + high
        product += ((lower & MASK) | one).to(tl.float32, bitcast=True) * low
        product += ((upper & MASK) | one).to(tl.float32, bitcast=True) * high
    # Codes are unsigned - 2^(BITS - 1), and weights here 1 + unsigned / 2^BITS.
    return scale * (product - 1.5 * total)


@triton.jit
def _few_rows_kernel(  # type: ignore[no-untyped-def]
    x,  # (ROWS, K), rows x_stride apart, or (ROWS, K / 2) int32 pairs of bf16
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
    ROWS: tl.constexpr,  # 1 or 2
    BLOCK_N: tl.constexpr,
    SLABS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    WORDS: tl.constexpr = 4 * BITS  # of a slab
    ALL: tl.constexpr = K // 128
    SHARE: tl.constexpr = (ALL + PARTS - 1) // PARTS  # slabs of a part

    part = tl.program_id(1)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    place = tl.arange(0, SLABS * WORDS)[None, :]
    acc_0 = tl.zeros([BLOCK_N, SLABS * WORDS], dtype=tl.float32)
    acc_1 = acc_0
    for begin in tl.static_range(0, SHARE, SLABS):
        near = begin + place // WORDS
        slab = part * SHARE + near
        inside = (near < SHARE) & (slab < ALL)
        present = inside & (n < N)
        word = tl.load(
            words + n * (K * BITS // 32) + slab * WORDS + place % WORDS, mask=present, other=0
        )
        scale = tl.load(
            scales + n * (K // GROUP) + (slab * 128) // GROUP, mask=present, other=0.0
        ).to(tl.float32)
        if begin == 0:  # the first weights are on their way
            wait_for_earlier(DEPENDENT)
        first = slab * 64 + place % WORDS
        acc_0 += _one_row(x, word, scale, first, inside, one, BITS)
        if ROWS > 1:
            acc_1 += _one_row(x + x_stride, word, scale, first, inside, one, BITS)

    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = outputs < N
    added = tl.zeros([BLOCK_N], dtype=tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + outputs, mask=held & (part == 0), other=0.0).to(tl.float32)
    out += part * ROWS * N + outputs
    _store_sum(out, acc_0, added, held, BITS)
    if ROWS > 1:
        _store_sum(out + N, acc_1, added, held, BITS)


@triton.jit
def _store_sum(out, acc, added, held, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    y = tl.sum(acc, axis=1) * (1 << BITS) + added
    tl.store(out, y.to(out.dtype.element_ty), mask=held)


@triton.jit
def _numbers(  # type: ignore[no-untyped-def]
    half, BITS: tl.constexpr, dtype: tl.constexpr, PAIRED: tl.constexpr
):
    """Codes in the lowest fields of halves, as `dtype`; exact."""
    if PAIRED:
        asm: tl.constexpr = _BF16_CODES_4 if BITS == 4 else _BF16_CODES_8
        return tl.inline_asm_elementwise(
            asm, "=r,r", [half], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    unsigned = half.to(tl.int32) & ((1 << BITS) - 1)
    return (unsigned - (1 << (BITS - 1))).to(tl.float32).to(dtype)


@triton.jit
def _next_field(half, BITS: tl.constexpr, PAIRED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Halves with the next field lowest."""
    if PAIRED:
        asm: tl.constexpr = _NEXT_FIELD_4 if BITS == 4 else _NEXT_FIELD_8
        return tl.inline_asm_elementwise(asm, "=r,r", [half], dtype=tl.int16, is_pure=True, pack=2)
    return half >> BITS


@triton.jit
def _bring_nearer(place):  # type: ignore[no-untyped-def]
    """Fetch what lies there into the GPU's second cache; nothing waits for it."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [place.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _tiles_kernel(  # type: ignore[no-untyped-def]
    x,  # (M, K), rows x_stride apart
    halves,  # (N, K * BITS / 16) int16
    scales,
    bias,
    out,  # (PARTS, M, N)
    x_stride,
    M,
    N,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,  # of 128 bytes, in a row of a part; a power of two, the rest left out
    HAS_BIAS: tl.constexpr,
    PAIRED: tl.constexpr,  # x is bf16, on a GPU: two codes at once, by its own instructions
    DEPENDENT: tl.constexpr,
):
    HALVES: tl.constexpr = 8 * BITS  # of a slab
    ALL: tl.constexpr = K // 128
    SHARE: tl.constexpr = (ALL + PARTS - 1) // PARTS

    part = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, HALVES)
    places = halves + n[:, None] * (K * BITS // 16) + i[None, :]
    inputs = x + m[None, :] * x_stride + i[:, None]
    of_scales = scales + n * (K // GROUP)
    first = part * SHARE
    end = min(first + SHARE, ALL)
    scale = tl.load(of_scales + (first * 128) // GROUP, mask=(n < N) & (first < ALL), other=0.0)
    if DEPENDENT:  # while the kernel before ends, its own weights come nearer
        line = tl.arange(0, LINES)[None, :]
        near = tl.minimum(n, N - 1)[:, None] * (K * BITS // 16) + first * HALVES + line * 64
        _bring_nearer(halves + tl.minimum(near, N * (K * BITS // 16) - 1))
    wait_for_earlier(DEPENDENT)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for slab in tl.range(first, end, num_stages=STAGES):
        half = tl.load(places + slab * HALVES, mask=(n < N)[:, None], other=0)
        # A slab ahead, as the pipeline does with what the tensor cores take.
        ahead = ((slab + 1) * 128) // GROUP
        next_scale = tl.load(of_scales + ahead, mask=(n < N) & (slab + 1 < end), other=0.0)
        product = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for field in tl.static_range(16 // BITS):
            value = tl.load(inputs + slab * 128 + field * HALVES, mask=(m < M)[None, :], other=0.0)
            code = _numbers(half, BITS, x.dtype.element_ty, PAIRED)
            product = tl.dot(code, value, product, input_precision="ieee")
            half = _next_field(half, BITS, PAIRED)
        acc += product * scale.to(tl.float32)[:, None]
        scale = next_scale
    if HAS_BIAS:
        added = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        acc += tl.where(part == 0, added, 0.0)[:, None]
    place_out = out + part * M * N + m[None, :] * N + n[:, None]
    tl.store(place_out, acc.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _expand_kernel(  # type: ignore[no-untyped-def]
    halves,  # (S, HALVES) int16, slabs one after the other
    scales,
    out,  # (S, 128)
    S,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SLABS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    HALVES: tl.constexpr = 8 * BITS
    slab = tl.program_id(0).to(tl.int64) * SLABS + tl.arange(0, SLABS)
    present = slab < S
    k = tl.arange(0, 128)
    half = tl.load(
        halves + slab[:, None] * HALVES + (k % HALVES)[None, :], mask=present[:, None], other=0
    ).to(tl.int32)
    unsigned = (half >> ((k // HALVES) * BITS)[None, :]) & ((1 << BITS) - 1)
    code = (unsigned - (1 << (BITS - 1))).to(tl.float32)
    scale = tl.load(scales + (slab * 128) // GROUP, mask=present, other=0.0).to(tl.float32)
    weight = (code * scale[:, None]).to(out.dtype.element_ty)
    wait_for_earlier(DEPENDENT)
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
        x: (M, K), bf16 or fp32, neighbours in a row next to each other; M is at most 2.
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
    pairs = _pairs(x) if x.dtype == torch.bfloat16 else x
    _few_rows_kernel[grid](
        pairs,
        words,
        scales,
        scales if bias is None else bias,
        out,
        pairs.stride(0),
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
        **launch_options(x.device),
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
        words.view(torch.int16),
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
        STAGES=plan.stages,
        LINES=lines(inputs, plan.parts, bits),
        HAS_BIAS=bias is not None,
        PAIRED=x.is_cuda and x.dtype == torch.bfloat16,
        num_warps=plan.warps,
        **launch_options(x.device),
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
        words.view(torch.int16),
        scales,
        out,
        slabs,
        BITS=bits,
        GROUP=group_size,
        SLABS=16,
        num_warps=4,
        **launch_options(out.device),
    )


def lines(inputs: int, parts: int, bits: int) -> int:
    """Whole 128 bytes of a row's words in a part, rounded down to a power of two; at least 1."""
    slabs = -(-inputs // 128 // parts)
    return 1 << (max(1, slabs * bits // 8).bit_length() - 1)


def _room(x: Tensor, outputs: int, parts: int) -> Tensor:
    dtype = x.dtype if parts == 1 else torch.float32
    return torch.empty(parts, len(x), outputs, dtype=dtype, device=x.device)


def _pairs(x: Tensor) -> Tensor:
    """bf16 neighbours as one int32."""
    whole = x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0
    return (x if whole else x.contiguous()).view(torch.int32)
