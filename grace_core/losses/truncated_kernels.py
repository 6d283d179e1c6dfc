"""The two passes over the vocabulary of :mod:`grace_core.losses.truncated_terms` in Triton.

The logits of the target and of the kept tokens have been replaced by `ABSENT`, which exp takes to
0. Bytes moved for bf16 logits, a token and entry: 2 for the sums, 4 for the gradient.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from grace_core.losses.truncated_teacher import ABSENT

_NUM_WARPS = 16
_BLOCK = 8 * 32 * _NUM_WARPS
"""Columns a program takes at a time: 16 bytes of bf16 a lane."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_ABSENT = tl.constexpr(ABSENT)


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    logits,
    sums,  # (3, N): largest logit; sums of exp((z - largest) / T) and of exp(z - largest)
    stride,
    num_tokens,
    vocabulary,
    temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    slope = _LOG2_E / temperature
    # Every place of the block keeps its own maximum: they meet only at the end.
    top = tl.full([BLOCK], _ABSENT, tl.float32)
    sum_T = tl.zeros([BLOCK], tl.float32)
    sum_1 = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < vocabulary, other=_ABSENT).to(tl.float32)
        new_top = tl.maximum(top, z)
        sum_T = sum_T * tl.exp2((top - new_top) * slope) + tl.exp2((z - new_top) * slope)
        sum_1 = sum_1 * tl.exp2((top - new_top) * _LOG2_E) + tl.exp2((z - new_top) * _LOG2_E)
        top = new_top
    largest = tl.max(top, axis=0)
    tl.store(sums + row, largest)
    total = tl.sum(sum_T * tl.exp2((top - largest) * slope), axis=0)
    tl.store(sums + num_tokens + row, total)
    total = tl.sum(sum_1 * tl.exp2((top - largest) * _LOG2_E), axis=0)
    tl.store(sums + 2 * num_tokens + row, total)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    factors,  # (3, N): largest logit; factors of exp((z - largest) / T) and of exp(z - largest)
    stride,
    num_tokens,
    vocabulary,
    temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + row * stride + columns
    z = tl.load(places, mask=columns < vocabulary, other=_ABSENT).to(tl.float32)
    z = (z - tl.load(factors + row)) * _LOG2_E
    gradient = tl.load(factors + num_tokens + row) * tl.exp2(z / temperature)
    gradient += tl.load(factors + 2 * num_tokens + row) * tl.exp2(z)
    tl.store(places, gradient.to(logits.dtype.element_ty), mask=columns < vocabulary)


def tail_sums(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row its largest logit m and sums of exp((z - m) / T) and exp(z - m), (N, 1) fp32.

    The sums are 1 or more, also of a row without any logit that is not `ABSENT`.
    """
    num_tokens, vocabulary = logits_NV.shape
    sums = torch.empty((3, num_tokens), device=logits_NV.device)
    with torch.cuda.device_of(logits_NV):
        _sums_kernel[(num_tokens,)](
            logits_NV,
            sums,
            logits_NV.stride(0),
            num_tokens,
            vocabulary,
            float(temperature),
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
    top, sum_T, sum_1 = sums.clamp_(min=ABSENT)[:, :, None]
    return top, sum_T.clamp(min=1.0), sum_1.clamp(min=1.0)


def tail_gradient_(
    logits_NV: Tensor, top_N1: Tensor, of_T_N1: Tensor, of_1_N1: Tensor, temperature: float
) -> None:
    """Overwrite every logit z by of_T exp((z - top) / T) + of_1 exp(z - top)."""
    num_tokens, vocabulary = logits_NV.shape
    factors = torch.cat([top_N1, of_T_N1, of_1_N1], -1).t().contiguous()
    with torch.cuda.device_of(logits_NV):
        _gradient_kernel[(num_tokens, triton.cdiv(vocabulary, _BLOCK))](
            logits_NV,
            factors,
            logits_NV.stride(0),
            num_tokens,
            vocabulary,
            float(temperature),
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
