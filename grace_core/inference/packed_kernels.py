"""Products of bf16 inputs with packed weights, as Triton kernels.

Weights are words in the order of `grace_core.inference.layout` and one bf16 scale a group; the
product is y = x W^T with W = code * scale. Codes are exact in bf16 and in fp32, sums are fp32, and
a group's scale is multiplied in fp32, so a result differs from the fp32 product with the exact
code * scale only by the order of its sums and by its own rounding. The reference model rounds
code * scale to bf16 first, which moves each weight by at most 2^-9 of itself.

`tiles`    codes become bf16 in registers and are the left operand of the tensor cores, inputs
           the right one, W x^T: few rows then fill the tensor cores' short side.
`expand`   W itself, rounded to bf16: exactly the evaluated weights, for a dense product of many
           rows.

`tiles` may cut the input dimension into parts that run side by side. Its result is then a stack of
fp32 partial sums, which the next kernel adds in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import language as tl

from grace_core.inference.launches import launch_options, wait_for_earlier

# dims: M rows, N outputs, K inputs, P parts of the input dimension

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
    """Rows of a program; a power of two, at least 8."""

    warps: int = 4
    stages: int = 3
    """Slabs of 128 inputs on their way from the memory at a time, and one."""


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
    """x W^T on the tensor cores.

    Args:
        x: (M, K), bf16 or fp32, neighbours in a row next to each other.
        words: (N, K bits / 32) int32 and `scales` (N, K / group_size), both without gaps.
        bias: (N,) or None.

    Returns:
        (1, M, N) in the dtype of x, or (parts, M, N) fp32 to be summed.
    """
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
