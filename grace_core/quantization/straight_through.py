"""The two maps of a quantized training step, over many layers at once.

Forward, the weights as the model uses them, from the latent weights W and the stored scales s:

    W_hat = s * clip(round(W / s), -Qn, Qp)

and backward, from G = dL/dW_hat (Eq. 14; why, is said in :mod:`grace_core.quantization.lsq`):

    dL/dW = G inside, 0 outside        dL/dtheta = s * sum over the group of G * dW_hat/ds

Both are linear in G, so G may be summed over micro-batches and ranks first, and mapped once. Of the
sum a rank may hold a part only, cut anywhere: a group's parts add up.

Several layers are taken together because one launch of a kernel for all of them costs a GPU less
than hundreds: :mod:`grace_core.quantization.kernels` for CUDA, the plain PyTorch below elsewhere.

Shapes: of L layers, each with O output features, I input features and O * I / group_size groups.
The scales, theta's gradient and W_hat of all layers lie behind one another, layer by layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from grace_core.quantization.lsq import SCALE_DTYPE, code_range, grouped

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GradientShare:
    """The part of one layer's G = dL/dW_hat that is held here: consecutive elements.

    Attributes:
        start: index of the first one in the flattened weight.
        gradient: (elements,) of any floating dtype; contiguous, and changed in place.
    """

    start: int
    gradient: Tensor


@torch.no_grad()
def quantize_layers(
    weights: Sequence[Tensor], scales: Tensor, w_hat: Tensor, *, bits: int, group_size: int
) -> None:
    """Write W_hat of all layers.

    Args:
        weights: (O, I) contiguous, one floating dtype and device.
        scales: (groups of all layers,) bf16, as stored.
        w_hat: (weights of all layers,) written; any floating dtype.
    """
    _check(weights, scales, group_size)
    assert w_hat.shape == (sum(weight.numel() for weight in weights),)
    kernels = _kernels(weights[0], group_size)
    quantize = plain_quantize_layers if kernels is None else kernels.quantize_layers
    quantize(weights, scales, w_hat, bits=bits, group_size=group_size)


@torch.no_grad()
def map_gradients(
    weights: Sequence[Tensor],
    scales: Tensor,
    shares: Sequence[GradientShare | None],
    theta_gradient: Tensor,
    *,
    bits: int,
    group_size: int,
) -> None:
    """Turn the shares of G into shares of dL/dW, in place, and write their dL/dtheta.

    Args:
        weights, scales: the ones that W_hat was made of.
        shares: one for each weight, None where nothing of it is held; one dtype.
        theta_gradient: (groups of all layers,) fp32. Written where a share reaches into the group,
            left alone elsewhere.
    """
    _check(weights, scales, group_size)
    assert theta_gradient.shape == scales.shape and theta_gradient.dtype == torch.float32
    assert len(shares) == len(weights)
    for weight, share in zip(weights, shares, strict=True):
        if share is not None:
            assert share.gradient.ndim == 1 and share.gradient.is_contiguous()
            assert 0 <= share.start <= weight.numel() - share.gradient.numel()
    kernels = _kernels(weights[0], group_size)
    apply = plain_map_gradients if kernels is None else kernels.map_gradients
    apply(weights, scales, shares, theta_gradient, bits=bits, group_size=group_size)


# --- in plain PyTorch ----------------------------------------------------------------------------


def plain_quantize_layers(
    weights: Sequence[Tensor], scales: Tensor, w_hat: Tensor, *, bits: int, group_size: int
) -> None:
    """:func:`quantize_layers` layer by layer; up to two fp32 copies of a weight at a time."""
    sizes = [weight.numel() for weight in weights]
    of_layers = zip(weights, _by_layer(scales, sizes, group_size), w_hat.split(sizes), strict=True)
    for weight, scale, result in of_layers:
        step = scale.float().unsqueeze(-1)
        ratio = grouped(weight, group_size).flatten(0, 1) / step  # promoted to fp32
        result.view_as(ratio).copy_(ratio.round_().clamp_(*code_range(bits)).mul_(step))


def plain_map_gradients(
    weights: Sequence[Tensor],
    scales: Tensor,
    shares: Sequence[GradientShare | None],
    theta_gradient: Tensor,
    *,
    bits: int,
    group_size: int,
) -> None:
    """:func:`map_gradients` layer by layer; up to five fp32 copies of a share at a time."""
    sizes = [weight.numel() for weight in weights]
    of_layers = zip(
        weights,
        shares,
        _by_layer(scales, sizes, group_size),
        _by_layer(theta_gradient, sizes, group_size),
        strict=True,
    )
    for weight, share, scale, gradient in of_layers:
        if share is None:
            continue
        flat = weight.reshape(-1)
        end = share.start + share.gradient.numel()
        for first, last in _runs(share.start, end, group_size):
            rows = slice(first // group_size, -(-last // group_size))
            of_run = share.gradient[first - share.start : last - share.start]
            gradient[rows] = _map_rows(flat[first:last], scale[rows], of_run, bits)


def _map_rows(weight: Tensor, scale: Tensor, gradient: Tensor, bits: int) -> Tensor:
    """Whole groups, or a part of one: masks `gradient` in place, returns its dL/dtheta."""
    rows = (scale.numel(), weight.numel() // scale.numel())
    step = scale.float().unsqueeze(-1)
    ratio = weight.view(rows) / step
    rounded = ratio.round()
    codes = rounded.clamp(*code_range(bits))
    outside = codes != rounded
    # dW_hat/ds: round(v) - v inside, the clipped code itself outside.
    slope = codes.sub_(ratio.masked_fill_(outside, 0.0))
    of_rows = gradient.view(rows)
    of_theta = slope.mul_(of_rows).mul_(step).sum(dim=-1)
    of_rows.masked_fill_(outside, 0.0)
    return of_theta


def _runs(start: int, end: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) where groups begin: a part of one, whole ones, a part of one."""
    head = min(-(-start // group_size) * group_size, end)
    tail = max(end // group_size * group_size, head)
    for first, last in ((start, head), (head, tail), (tail, end)):
        if first < last:
            yield first, last


def _by_layer(of_groups: Tensor, sizes: Sequence[int], group_size: int) -> tuple[Tensor, ...]:
    return of_groups.split([size // group_size for size in sizes])


# --- which of the two ----------------------------------------------------------------------------


def _check(weights: Sequence[Tensor], scales: Tensor, group_size: int) -> None:
    assert weights and scales.dtype == SCALE_DTYPE
    first = weights[0]
    for weight in weights:
        assert weight.is_contiguous() and weight.shape[-1] % group_size == 0
        assert (weight.dtype, weight.device) == (first.dtype, first.device)
    assert scales.shape == (sum(weight.numel() for weight in weights) // group_size,)


def _kernels(weight: Tensor, group_size: int) -> ModuleType | None:
    """The fused kernels, where these tensors lie on a GPU that has them."""
    return _kernels_for(weight.device.type, group_size)


@functools.cache
def _kernels_for(device: str, group_size: int) -> ModuleType | None:
    """Asked once for each answer, so that a reason is logged once."""
    if device == "cpu":
        return None
    reason = None
    if device != "cuda":
        reason = f"no kernels for {device} devices"
    elif group_size & (group_size - 1):
        reason = f"the kernels need a power of two as group size, not {group_size}"
    else:
        try:
            from grace_core.quantization import kernels
        except ImportError as error:
            reason = f"Triton cannot be imported ({error})"
        else:
            return kernels
    log.warning("weights are fake-quantized in plain PyTorch, slowly: %s", reason)
    return None
