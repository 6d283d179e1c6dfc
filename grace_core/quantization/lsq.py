"""Group-wise learned step size quantization (LSQ): the mathematics, without modules.

GRACE (arXiv 2601.22709), Eq. 14, symmetric and weight-only. Every run of ``group_size``
consecutive weights along the input dimension shares one scale s > 0 and no zero point:

    v     = W / s
    q     = clip(round(v), -Qn, Qp)        Qn = 2^(b-1), Qp = 2^(b-1) - 1
    W_hat = s * q

``round`` rounds halves to even and is straight-through. A weight is *inside* when
-Qn <= round(v) <= Qp: the clip follows the rounding, so v = 7.3 is inside at 4 bits. Then

    dW_hat/dW = 1            dW_hat/ds = round(v) - v           inside
    dW_hat/dW = 0            dW_hat/ds = -Qn or Qp              outside

The learned parameter is theta = log s in fp32, so dW_hat/dtheta = s * dW_hat/ds. There is no LSQ
gradient-scale factor.

Where this differs from the paper: the forward pass uses the scale as a release stores it,
s = bf16(exp(theta)), with that rounding straight-through too. Trained, evaluated and exported
codes then coincide; rounding the scale at export only would move 0.2-0.4 % of the 4-bit codes.
The s of every formula above, the factor in dW_hat/dtheta included, is this stored scale.

Shapes: O output features, I input features, G = I / group_size groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
"""The dtype in which releases store scales, and in which the forward pass uses them."""

MIN_SCALE = 1e-8
NUM_CANDIDATES = 20
CANDIDATE_RANGE = (0.3, 1.2)
BLOCK_ELEMENTS = 1 << 20
"""Weights whose codes are computed at a time."""


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code, (-Qn, Qp) = (-2^(b-1), 2^(b-1) - 1), of ``bits`` in 2..8."""
    assert 2 <= bits <= 8, f"codes are stored as int8; got {bits} bits"
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """View (O, I) as (O, G, group_size); ``group_size`` must divide I."""
    assert weight.ndim == 2, f"expected a matrix, got shape {tuple(weight.shape)}"
    assert weight.shape[1] % group_size == 0, (
        f"group size {group_size} does not divide the {weight.shape[1]} input features"
    )
    return weight.unflatten(1, (-1, group_size))


def stored_scale(theta: Tensor) -> Tensor:
    """bf16(exp(theta)): the scale that the forward pass uses and that a release stores.

    The exponential is taken in fp64. In fp32 those of CPUs and GPUs differ in the last digit, which
    decides the rounding to bf16 of a few scales among ten million; a model trained on a GPU would
    not be the one that is exported on a CPU.

    Args:
        theta: log-scales, fp32, any shape.
    """
    assert theta.dtype == torch.float32, f"theta must stay fp32, got {theta.dtype}"
    return torch.exp(theta.detach().double()).float().to(SCALE_DTYPE)


@torch.no_grad()
def initial_scale(weight: Tensor, group_size: int, bits: int) -> Tensor:
    """Scales with the least squared error among a few candidates for each group.

    The candidates are 20 evenly spaced multiples, both ends included, in [0.3, 1.2] of
    max|W_group| / Qp, and never below 1e-8. Of equal errors the smallest candidate wins.
    Candidates are tried one after the other: peak memory is about three fp32 copies of the weight.

    Args:
        weight: (O, I), any floating dtype.

    Returns:
        (O, G) fp32 scales on the weight's device, not yet rounded to bf16.
    """
    low, high = code_range(bits)
    groups = grouped(weight.float(), group_size)
    base = groups.abs().amax(dim=-1) / high
    best_scale = torch.empty_like(base)
    best_error = torch.full_like(base, torch.inf)
    for factor in torch.linspace(*CANDIDATE_RANGE, NUM_CANDIDATES, dtype=torch.float64).tolist():
        scale = (base * factor).clamp_(min=MIN_SCALE)
        step = scale.unsqueeze(-1)
        residual = (groups / step).round_().clamp_(low, high).mul_(step).sub_(groups)
        error = residual.square_().sum(dim=-1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


@torch.no_grad()
def quantize(weight: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes q = clip(round(W / s), -Qn, Qp) as int8 (O, I).

    The division is done in fp32. For bf16 weights and scales that is exact enough to never move a
    quotient onto or over a rounding boundary, so codes agree between devices. Rows are taken in
    blocks whose fp32 quotients stay in a processor's cache: several times as fast as all at once.

    Args:
        weight: (O, I), any floating dtype.
        scale: (O, G), stored scales (bf16).
    """
    low, high = code_range(bits)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    groups, stored = grouped(weight, group_size), grouped(codes, group_size)
    rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    for begin in range(0, weight.shape[0], rows):
        block = slice(begin, begin + rows)
        ratio = groups[block] / scale[block].float().unsqueeze(-1)  # promoted to fp32
        stored[block] = ratio.round_().clamp_(low, high)
    return codes


@torch.no_grad()
def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """W_hat = q * s, (O, I) in ``dtype``.

    The fp32 product of an 8-bit code and a bf16 scale is exact, so the cast rounds once.

    Args:
        codes: (O, I) int8.
        scale: (O, G), stored scales (bf16); I must be a multiple of G.
    """
    group_size = codes.shape[1] // scale.shape[1]
    product = grouped(codes, group_size).float().mul_(scale.float().unsqueeze(-1))
    return product.flatten(1).to(dtype)


def fake_quantize(weight: Tensor, theta: Tensor, bits: int, group_size: int) -> Tensor:
    """W_hat in the weight's dtype, differentiable in ``weight`` and ``theta`` as stated above.

    The plain composition of autograd operations. It keeps several tensors of the weight's size for
    the backward pass; training uses :class:`~grace_core.quantization.linear.QuantizedLinear`,
    which keeps none and must agree with this.

    Args:
        weight: (O, I), any floating dtype.
        theta: (O, G) fp32 log-scales.
    """
    low, high = code_range(bits)
    # The second factor is exactly 1 in value and carries d/dtheta = s past the rounding to bf16.
    scale = stored_scale(theta).float() * torch.exp(theta - theta.detach())
    step = scale.unsqueeze(-1)
    ratio = grouped(weight, group_size).float() / step
    rounded = ratio.detach().round() + (ratio - ratio.detach())
    return (rounded.clamp(low, high) * step).flatten(1).to(weight.dtype)
