"""The maps of :mod:`grace_core.quantization.straight_through` as Triton kernels.

One launch for all layers. The layers' weights and gradients lie wherever they lie: kernels get the
address of the first and the others' distances from it. Each program takes a run of whole groups of
one layer, so every group's sum is made by one program, in a fixed order.

Results are those of the plain twin: codes and W_hat exactly (rounded division, halves to even),
theta's gradient up to the order of its sums. NaN stays NaN.

Bytes moved for a bf16 weight: 4 forward (W, W_hat); backward 6 with an fp32 gradient (W, G), and
what is outside is written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import language as tl

from grace_core.quantization.lsq import code_range
from grace_core.quantization.straight_through import GradientShare

WEIGHTS_A_PROGRAM = 4096
NUM_WARPS = 8
WIDEST_LOAD = 16
"""Bytes a thread."""

_TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2^23: a small fp32 number added to it is rounded to an integer, halves to even."""


@triton.jit
def _code(weight, step, LOW: tl.constexpr, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]
    """W / s, its rounding clipped one beyond the codes, and the code; all fp32."""
    ratio = tl.div_rn(weight, step)
    # Comparing rather than tl.clamp, which would turn NaN into a code.
    near = tl.where(ratio > HIGH + 1, HIGH + 1, ratio)
    near = tl.where(near < LOW - 1, LOW - 1, near)
    rounded = (near + _TO_INTEGER) - _TO_INTEGER
    code = tl.where(rounded > HIGH, HIGH, rounded)
    code = tl.where(code < LOW, LOW, code)
    return ratio, rounded, code


@triton.jit
def _quantize_kernel(  # type: ignore[no-untyped-def]
    weights,
    scales,
    w_hat,
    distances,  # (L,) of each layer's weight from the first, in elements
    layer_of_program,
    first_program,  # (L,)
    first_group,  # (L + 1,)
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # elements whose multiples all distances are
):
    program = tl.program_id(0)
    layer = tl.load(layer_of_program + program)
    first = tl.load(first_group + layer)
    count = tl.load(first_group + layer + 1) - first
    distance = tl.load(distances + layer)
    distance = tl.multiple_of(distance, WIDTH)

    group = (program - tl.load(first_program + layer)) * GROUPS + tl.arange(0, GROUPS)
    present = group < count
    element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    weight = tl.load(weights + distance + element, mask=present[:, None], other=0.0)
    step = tl.load(scales + first + group, mask=present, other=1.0).to(tl.float32)[:, None]
    _, _, code = _code(weight.to(tl.float32), step, LOW, HIGH)
    result = (code * step).to(w_hat.dtype.element_ty)
    tl.store(w_hat + first * GROUP + element, result, mask=present[:, None])


@triton.jit
def _map_kernel(  # type: ignore[no-untyped-def]
    weights,
    scales,
    gradients,
    theta_gradient,
    distances,  # (4, L): of weight and of gradient from the first; start and end of the share
    layers,
    layer_of_program,
    first_program,
    first_group,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # elements whose multiples all distances are
):
    program = tl.program_id(0)
    layer = tl.load(layer_of_program + program)
    distance = tl.load(distances + layer)
    of_gradient = tl.load(distances + layers + layer)
    start = tl.load(distances + 2 * layers + layer)
    end = tl.load(distances + 3 * layers + layer)
    distance = tl.multiple_of(distance, WIDTH)
    of_gradient = tl.multiple_of(of_gradient, WIDTH)
    start = tl.multiple_of(start, WIDTH)
    end = tl.multiple_of(end, WIDTH)

    first = tl.load(first_group + layer)
    group = (program - tl.load(first_program + layer)) * GROUPS + tl.arange(0, GROUPS)
    # A share ends within the layer, so these groups exist.
    reached = (group * GROUP < end) & ((group + 1) * GROUP > start)
    element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    held = (element >= start) & (element < end)

    weight = tl.load(weights + distance + element, mask=held, other=0.0).to(tl.float32)
    step = tl.load(scales + first + group, mask=reached, other=1.0).to(tl.float32)
    place = gradients + of_gradient + element
    gradient = tl.load(place, mask=held, other=0.0).to(tl.float32)
    ratio, rounded, code = _code(weight, step[:, None], LOW, HIGH)
    outside = (code != rounded) & (rounded == rounded)  # NaN differs from itself
    slope = tl.where(outside, code, rounded - ratio)
    of_theta = tl.sum(slope * gradient, axis=1) * step
    tl.store(theta_gradient + first + group, of_theta, mask=reached)
    zero = tl.zeros([GROUPS, GROUP], dtype=gradients.dtype.element_ty)
    tl.store(place, zero, mask=outside & held)


@dataclass(frozen=True)
class _Plan:
    """Which program works on what; integers on the device."""

    programs: int
    layer_of_program: Tensor
    first_program: Tensor
    first_group: Tensor


@functools.cache
def _plan(groups: tuple[int, ...], groups_a_program: int, device: torch.device) -> _Plan:
    programs = torch.tensor([-(-count // groups_a_program) for count in groups])
    layer_of_program = torch.arange(len(groups)).repeat_interleave(programs)
    first_program = programs.cumsum(0) - programs
    first_group = torch.tensor([0, *groups]).cumsum(0)
    return _Plan(
        len(layer_of_program),
        layer_of_program.to(device, torch.int32),
        first_program.to(device, torch.int32),
        first_group.to(device),
    )


def quantize_layers(
    weights: Sequence[Tensor], scales: Tensor, w_hat: Tensor, *, bits: int, group_size: int
) -> None:
    """See :func:`grace_core.quantization.straight_through.quantize_layers`."""
    low, high = code_range(bits)
    per_program = _groups_a_program(group_size)
    plan = _plan(_groups(weights, group_size), per_program, scales.device)
    distances = [_distance(weight, weights[0]) for weight in weights]
    _quantize_kernel[(plan.programs,)](
        weights[0],
        scales,
        w_hat,
        _integers(tuple(distances), scales.device),
        plan.layer_of_program,
        plan.first_program,
        plan.first_group,
        LOW=float(low),
        HIGH=float(high),
        GROUP=group_size,
        GROUPS=per_program,
        WIDTH=_width(distances, weights[0]),
        num_warps=NUM_WARPS,
    )


def map_gradients(
    weights: Sequence[Tensor],
    scales: Tensor,
    shares: Sequence[GradientShare | None],
    theta_gradient: Tensor,
    *,
    bits: int,
    group_size: int,
) -> None:
    """See :func:`grace_core.quantization.straight_through.map_gradients`."""
    held = [share for share in shares if share is not None]
    if not held:
        return
    low, high = code_range(bits)
    base = held[0].gradient
    of_weights = [_distance(weight, weights[0]) for weight in weights]
    # A share's first element is the layer's element `start`.
    of_gradients = [_distance(s.gradient, base) - s.start if s is not None else 0 for s in shares]
    starts = [share.start if share is not None else 0 for share in shares]
    ends = [share.start + share.gradient.numel() if share is not None else 0 for share in shares]
    distances = [*of_weights, *of_gradients, *starts, *ends]
    per_program = _groups_a_program(group_size)
    plan = _plan(_groups(weights, group_size), per_program, scales.device)
    _map_kernel[(plan.programs,)](
        weights[0],
        scales,
        base,
        theta_gradient,
        _integers(tuple(distances), scales.device),
        len(weights),
        plan.layer_of_program,
        plan.first_program,
        plan.first_group,
        LOW=float(low),
        HIGH=float(high),
        GROUP=group_size,
        GROUPS=per_program,
        WIDTH=_width(distances, base),
        num_warps=NUM_WARPS,
    )


@functools.lru_cache(maxsize=1024)
def _integers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, since a copy to the GPU is waited for; distances are the same step after step."""
    return torch.tensor(values, device=device)


def _groups(weights: Sequence[Tensor], group_size: int) -> tuple[int, ...]:
    return tuple(weight.numel() // group_size for weight in weights)


def _groups_a_program(group_size: int) -> int:
    return max(1, WEIGHTS_A_PROGRAM // group_size)


def _distance(tensor: Tensor, base: Tensor) -> int:
    """From one tensor's first element to another's, in elements; the kernels step by these."""
    assert tensor.dtype == base.dtype and tensor.device == base.device
    elements, rest = divmod(tensor.data_ptr() - base.data_ptr(), base.element_size())
    assert rest == 0, "a tensor lies between the elements of another"
    return elements


def _width(distances: Sequence[int], wider: Tensor) -> int:
    """Elements that a thread loads at a time, of each of the tensors alike.

    That is the most of the wider dtype: loads of different widths would have values exchanged
    between threads. The first addresses' own alignment Triton finds out by itself.

    Args:
        wider: a tensor of the larger of the dtypes.
    """
    width = WIDEST_LOAD // wider.element_size()
    return width if all(distance % width == 0 for distance in distances) else 1
