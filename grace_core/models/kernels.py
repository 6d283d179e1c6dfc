"""Elementwise work of a decoder layer in one kernel each: rotary turning and SwiGLU.

Liger-Kernel (arXiv 2410.10989, the extra `gpu`) has the kernels; each has its twin in plain PyTorch
here, which is also what runs where Liger-Kernel is not installed. Root-mean-square norms need
neither: torch has its own fused kernel, which costs the host a fraction of a Triton kernel's start.
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


PLAIN = Kernels(turn=turn, silu_times=silu_times)


@lru_cache(maxsize=1)
def best_kernels() -> Kernels:
    """Liger-Kernel's where it is installed, else the plain ones, with the reason logged once."""
    try:
        liger: Any = importlib.import_module("liger_kernel.ops")
    except ImportError as error:
        log.warning(
            "rotary turning and SwiGLU run in plain PyTorch: Liger-Kernel cannot be imported "
            "(%s); install the extra `gpu` of this package for faster steps",
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

    return Kernels(turn=Turn.apply, silu_times=liger.LigerSiLUMulFunction.apply)


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    crossed = torch.cat((-second, first), dim=-1)
    return (states * cos.unsqueeze(-2) + crossed * sin.unsqueeze(-2)).to(states.dtype)
