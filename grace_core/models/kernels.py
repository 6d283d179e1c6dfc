"""Elementwise work of a decoder layer in one kernel each: norms, rotary turning and SwiGLU.

Liger-Kernel (arXiv 2410.10989, the extra `gpu`) has the kernels; each has its twin in plain PyTorch
here, which is also what runs where Liger-Kernel is not installed.

For root-mean-square norms torch has a fused kernel too, which costs the host a fraction of a Triton
kernel's start; short rows take it. On long ones it is slower than Liger-Kernel's.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

log = logging.getLogger(__name__)

# dims: B batch, L tokens, H heads, D width of a head, d width


@dataclass(frozen=True)
class Kernels:
    """The elementwise kernels of one way of computing."""

    turn: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(query, key, cos, sin) -> query and key turned. The given ones may be overwritten."""

    silu_times: Callable[[Tensor, Tensor], Tensor]
    """(gate, up) -> silu(gate) * up. The backward pass may overwrite both."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x, weight, epsilon) -> x normalised over its last axis, times the weight."""


def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, first half of a head's channels against the second.

    Args:
        query: (B, L, H, D).
        key: (B, L, H', D).
        cos: (B, L, D), both halves alike; computed in its dtype where that is the wider one.
        sin: as `cos`.

    Returns:
        Both turned, in their own dtypes.
    """
    return _turned(query, cos, sin), _turned(key, cos, sin)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU: silu(gate) * up, all (..., d)."""
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, (..., d); rounded once."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


PLAIN = Kernels(turn=turn, silu_times=silu_times, rms_norm=rms_norm)

_LONG = 2**22
"""Elements from which a Triton kernel's start is worth its time in a norm: 2048 tokens of 2048
channels."""

_OFFSET = 0.0
"""What Liger-Kernel adds to a norm's weight."""

_IN_FP32 = 1
"""Liger-Kernel's casting mode `gemma`: the product with the weight is not rounded before."""


@lru_cache(maxsize=1)
def best_kernels() -> Kernels:
    """Liger-Kernel's where it is installed, else the plain ones, with the reason logged once."""
    try:
        liger: Any = importlib.import_module("liger_kernel.ops")
    except ImportError as error:
        log.warning(
            "rotary turning, SwiGLU and norms run in plain PyTorch: Liger-Kernel cannot be "
            "imported (%s); install the extra `gpu` of this package for faster steps",
            error,
        )
        return PLAIN
    return liger_kernels(liger)


def liger_kernels(liger: Any) -> Kernels:
    """Liger-Kernel's operators, from its module `liger_kernel.ops`."""

    class Turn(torch.autograd.Function):
        """Its rotary kernel, between layouts that cost no views outside of autograd."""

        @staticmethod
        def forward(
            ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
        ) -> tuple[Tensor, Tensor]:
            q, k, cos, sin = liger.rope_forward(
                query.transpose(1, 2), key.transpose(1, 2), cos, sin
            )
            ctx.save_for_backward(cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2)

        @staticmethod
        def backward(
            ctx: Any, *gradients: Tensor
        ) -> tuple[Tensor | None, Tensor | None, None, None]:
            dq, dk = (gradient.transpose(1, 2) for gradient in gradients)
            dq, dk = liger.rope_backward(dq, dk, *ctx.saved_tensors)
            return dq.transpose(1, 2), dk.transpose(1, 2), None, None

    class LongRMSNorm(torch.autograd.Function):
        """Its norm, whose gradient is not written over the incoming one."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
            normed, rows, reciprocal, ctx.block, ctx.warps, _ = liger.rms_norm_forward(
                x.contiguous(), weight, epsilon, _OFFSET, _IN_FP32, None
            )
            ctx.save_for_backward(rows, weight, reciprocal)
            return normed

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
            dx, dweight = liger.rms_norm_backward(
                gradient.contiguous(),
                *ctx.saved_tensors,
                _OFFSET,
                _IN_FP32,
                ctx.block,
                ctx.warps,
                False,
                None,
                needs_dw=ctx.needs_input_grad[1],
            )
            return dx, dweight, None

    def long_or_short(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if x.numel() < _LONG:
            return rms_norm(x, weight, epsilon)
        normed: Tensor = LongRMSNorm.apply(x, weight, epsilon)
        return normed

    return Kernels(
        turn=Turn.apply, silu_times=liger.LigerSiLUMulFunction.apply, rms_norm=long_or_short
    )


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    crossed = torch.cat((-second, first), dim=-1)
    return (states * cos.unsqueeze(-2) + crossed * sin.unsqueeze(-2)).to(states.dtype)
