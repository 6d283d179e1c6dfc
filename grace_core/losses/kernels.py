"""The terms of supervised rows, their gradient and the gate as Triton kernels.

Equations and numerics: :mod:`grace_core.losses.distillation`, :mod:`grace_core.losses.gate`. One
program takes one row. A first sweep over the vocabulary makes every sum, each relative to a running
maximum that a lane keeps for itself, so that lanes meet only at the row's end. A second one writes
the gradient over the student's logits. Arithmetic is fp32; CE's and KD's gradients are added before
they are rounded.

With t the maximum of the tokens summed over, E_j = exp((z_j - t) / T) and s = sum_j E_j, for the
student (S) and the teacher (T) alike, and the target left out of all sums:

    margin = (z_y - t) / T - log s
    NCKD   = sum_j (E_T,j / s_T) ((z_T,j - t_T) - (z_S,j - t_S)) / T - log(s_T / s_S)

Cross-entropy is -logsigmoid of the margin at T = 1, exact in both tails as well. Plain distillation
has the same sums with the target in them.

Bytes moved for bf16 logits, a token and entry: 4 in the first sweep, 6 in the second.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton import language as tl

from grace_core.config.objective import Distillation

NUM_WARPS = 16
PER_LANE = 8
"""Neighbouring logits that one lane takes at a time: 16 bytes of bf16, the widest load."""

_LANES = 32 * NUM_WARPS
_ELEMENTS_SCALED = 8192
_KINDS = {"none": 0, "plain": 1, "decoupled": 2, "gated-decoupled": 2}

_PLAIN = tl.constexpr(1)
_DECOUPLED = tl.constexpr(2)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Stands for what is not summed over. Finite, because infinities of both models would make NaN.
_ABSENT = tl.constexpr(-1e30)


@triton.jit
def _tile(first, LANES: tl.constexpr, PER_LANE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of the tile at `first`, (LANES, PER_LANE): a lane's columns are neighbours."""
    lane = tl.arange(0, LANES)[:, None] * PER_LANE
    return first + (lane + tl.arange(0, PER_LANE)[None, :])


@triton.jit
def _log_sigmoid(x):  # type: ignore[no-untyped-def]
    small = tl.exp(-tl.abs(x))
    whole = 1.0 + small
    # log1p: the rounding of 1 + small is made good, which keeps the tail's digits.
    lost = whole == 1.0
    log1p = tl.where(lost, small, tl.log(whole) * (small / tl.where(lost, 1.0, whole - 1.0)))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def _terms_kernel(  # type: ignore[no-untyped-def]
    student,
    teacher,
    labels,
    gates,
    weights,  # (2,): of cross-entropy, of distillation
    values,  # (2, N): cross-entropy, gated distillation
    student_stride,
    teacher_stride,
    num_tokens,
    vocabulary,
    temperature,
    alpha,
    beta,
    KIND: tl.constexpr,
    POWER: tl.constexpr,  # exp(z) = exp(z / T)^POWER; 0 where T is neither 1 nor 2
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
):
    TILE: tl.constexpr = LANES * PER_LANE
    DISTILS: tl.constexpr = KIND != 0
    LEAVES_OUT: tl.constexpr = KIND != _PLAIN
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    label = tl.load(labels + row)
    is_token = (label >= 0) & (label < vocabulary)
    target = label.to(tl.int32)
    slope = _LOG2_E / temperature
    cross_entropy_weight = tl.load(weights)
    distillation_weight = tl.load(weights + 1)
    # Now, since other warps may have written the gradient over it by the time it is used.
    y_S = tl.load(student + label, mask=is_token, other=0.0).to(tl.float32)

    top_S = tl.full([LANES], _ABSENT, tl.float32)
    sum_S = tl.zeros([LANES], tl.float32)
    sum_1 = tl.zeros([LANES], tl.float32)  # of exp(z_S - t_S), at temperature 1
    top_T = tl.full([LANES], _ABSENT, tl.float32)
    sum_T = tl.zeros([LANES], tl.float32)
    gap_T = tl.zeros([LANES], tl.float32)  # of E_T ((z_T - t_T) - (z_S - t_S))

    # Each tile is asked for while the one before is worked on.
    columns = _tile(0, LANES, PER_LANE)
    next_S = tl.load(student + columns, mask=columns < vocabulary, other=_ABSENT)
    if DISTILS:
        next_T = tl.load(teacher + columns, mask=columns < vocabulary, other=_ABSENT)
    for first in range(0, vocabulary, TILE):
        columns = _tile(first, LANES, PER_LANE)
        ahead = _tile(first + TILE, LANES, PER_LANE)
        z_S = next_S.to(tl.float32)
        next_S = tl.load(student + ahead, mask=ahead < vocabulary, other=_ABSENT)
        if LEAVES_OUT:
            z_S = tl.where(columns == target, _ABSENT, z_S)
        new_top = tl.maximum(top_S, tl.max(z_S, axis=1))
        shift_S = top_S - new_top
        z_S -= new_top[:, None]
        shrink = tl.exp2(shift_S * slope)
        e_S = tl.exp2(z_S * slope)
        sum_S = sum_S * shrink + tl.sum(e_S, axis=1)
        if POWER == 2:
            sum_1 = sum_1 * (shrink * shrink) + tl.sum(e_S * e_S, axis=1)
        elif POWER == 0:
            shrink = tl.exp2(shift_S * _LOG2_E)
            sum_1 = sum_1 * shrink + tl.sum(tl.exp2(z_S * _LOG2_E), axis=1)
        top_S = new_top
        if DISTILS:
            z_T = next_T.to(tl.float32)
            next_T = tl.load(teacher + ahead, mask=ahead < vocabulary, other=_ABSENT)
            if LEAVES_OUT:
                z_T = tl.where(columns == target, _ABSENT, z_T)
            new_top = tl.maximum(top_T, tl.max(z_T, axis=1))
            shift_T = top_T - new_top
            z_T -= new_top[:, None]
            shrink = tl.exp2(shift_T * slope)
            e_T = tl.exp2(z_T * slope)
            gap_T = (gap_T + sum_T * (shift_T - shift_S)) * shrink
            gap_T += tl.sum(e_T * (z_T - z_S), axis=1)
            sum_T = sum_T * shrink + tl.sum(e_T, axis=1)
            top_T = new_top

    t_S = tl.max(top_S, axis=0)
    s_S = tl.sum(sum_S * tl.exp2((top_S - t_S) * slope), axis=0)
    if POWER == 1:
        s_1 = s_S
    else:
        s_1 = tl.sum(sum_1 * tl.exp2((top_S - t_S) * _LOG2_E), axis=0)
    y_S -= t_S
    if LEAVES_OUT:
        margin_1 = y_S - tl.log(s_1)
        wrong_1 = tl.sigmoid(-margin_1)  # 1 - P(y) at temperature 1
        cross_entropy = -_log_sigmoid(margin_1)
        of_1 = cross_entropy_weight * wrong_1 / s_1
    else:
        cross_entropy = tl.log(s_1) - y_S
        wrong_1 = 1.0 - tl.exp(y_S) / s_1
        of_1 = cross_entropy_weight / s_1
    of_target = -cross_entropy_weight * wrong_1
    of_S = 0.0
    of_T = 0.0
    t_T = 0.0
    distillation = 0.0
    if DISTILS:
        t_T = tl.max(top_T, axis=0)
        shift_T = top_T - t_T
        shrink = tl.exp2(shift_T * slope)
        s_T = tl.sum(sum_T * shrink, axis=0)
        gap = tl.sum((gap_T + sum_T * (shift_T - (top_S - t_S))) * shrink, axis=0)
        y_T = tl.load(teacher + label, mask=is_token, other=0.0).to(tl.float32) - t_T
        # Rounded, so that equal sums have a quotient of exactly 1.
        divergence = gap / s_T / temperature - tl.log(tl.div_rn(s_T, s_S))
        gate = tl.load(gates + row)
        factor = distillation_weight * gate * temperature
        if KIND == _DECOUPLED:
            margin_S = y_S / temperature - tl.log(s_S)
            margin_T = y_T / temperature - tl.log(s_T)
            right_T, wrong_T = tl.sigmoid(margin_T), tl.sigmoid(-margin_T)
            of_right = _log_sigmoid(margin_T) - _log_sigmoid(margin_S)
            of_wrong = _log_sigmoid(-margin_T) - _log_sigmoid(-margin_S)
            binary = right_T * of_right + wrong_T * of_wrong
            distillation = alpha * binary + beta * divergence
            # P_S(y) - P_T(y) without the cancellation where both are near 1.
            excess = wrong_T * tl.sigmoid(margin_S) - right_T * tl.sigmoid(-margin_S)
            of_S = factor * (beta - alpha * excess) / s_S
            of_T = factor * beta / s_T
            of_target += factor * alpha * excess
        else:
            distillation = divergence
            of_S = factor / s_S
            of_T = factor / s_T
            of_target += of_S * tl.exp2(y_S * slope) - of_T * tl.exp2(y_T * slope)
        distillation *= gate * temperature * temperature
    invalid = float("nan")
    tl.store(values + row, tl.where(is_token, cross_entropy, invalid))
    tl.store(values + num_tokens + row, tl.where(is_token, distillation, invalid))

    if GRADIENT:
        of_target = tl.where(is_token, of_target, invalid)
        of_1 = tl.where(is_token, of_1, invalid)
        # Backwards: what the first sweep read last may still be in the cache.
        last = (vocabulary - 1) // TILE * TILE
        columns = _tile(last, LANES, PER_LANE)
        next_S = tl.load(student + columns, mask=columns < vocabulary, other=_ABSENT)
        if DISTILS:
            next_T = tl.load(teacher + columns, mask=columns < vocabulary, other=_ABSENT)
        for back in range(0, vocabulary, TILE):
            columns = _tile(last - back, LANES, PER_LANE)
            ahead = _tile(last - back - TILE, LANES, PER_LANE)
            z_S = next_S.to(tl.float32)
            next_S = tl.load(student + ahead, mask=ahead >= 0, other=_ABSENT)
            e_S = tl.exp2((z_S - t_S) * slope)
            if POWER == 2:
                gradient = e_S * (of_1 * e_S + of_S)
            elif POWER == 1:
                gradient = e_S * (of_1 + of_S)
            else:
                gradient = of_S * e_S + of_1 * tl.exp2((z_S - t_S) * _LOG2_E)
            if DISTILS:
                z_T = next_T.to(tl.float32)
                next_T = tl.load(teacher + ahead, mask=ahead >= 0, other=_ABSENT)
                gradient -= of_T * tl.exp2((z_T - t_T) * slope)
            gradient = tl.where(columns == target, of_target, gradient)
            tl.store(
                student + columns, gradient.to(student.dtype.element_ty), mask=columns < vocabulary
            )


@triton.jit
def _gate_kernel(  # type: ignore[no-untyped-def]
    teacher,
    gates,
    teacher_stride,
    vocabulary,
    largest_entropy,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
):
    TILE: tl.constexpr = LANES * PER_LANE
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    top = tl.full([LANES], _ABSENT, tl.float32)
    total = tl.zeros([LANES], tl.float32)  # of E = exp(z - top)
    below = tl.zeros([LANES], tl.float32)  # of E (z - top), nowhere positive: nothing cancels
    columns = _tile(0, LANES, PER_LANE)
    following = tl.load(teacher + columns, mask=columns < vocabulary, other=_ABSENT)
    for first in range(0, vocabulary, TILE):
        ahead = _tile(first + TILE, LANES, PER_LANE)
        z = following.to(tl.float32)
        following = tl.load(teacher + ahead, mask=ahead < vocabulary, other=_ABSENT)
        new_top = tl.maximum(top, tl.max(z, axis=1))
        shift = top - new_top
        shrink = tl.exp2(shift * _LOG2_E)
        z -= new_top[:, None]
        e = tl.exp2(z * _LOG2_E)
        below = (below + total * shift) * shrink + tl.sum(e * z, axis=1)
        total = total * shrink + tl.sum(e, axis=1)
        top = new_top
    shift = top - tl.max(top, axis=0)
    shrink = tl.exp2(shift * _LOG2_E)
    below_all = tl.sum((below + total * shift) * shrink, axis=0)
    total_all = tl.sum(total * shrink, axis=0)
    entropy = (tl.log(total_all) - below_all / total_all) / largest_entropy
    # Comparisons that NaN fails, so that it stays NaN.
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    entropy = tl.where(entropy > 1.0, 1.0, entropy)
    tl.store(gates + row, tl.exp(-entropy))


@triton.jit
def _scale_kernel(tensor, factor, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(tensor + place, mask=place < size, other=0.0).to(tl.float32)
        tl.store(tensor + place, (value * by).to(tensor.dtype.element_ty), mask=place < size)


def terms_and_gradient_(
    logits_NV: Tensor,
    teacher_logits_NV: Tensor | None,
    labels_N: Tensor,
    gates_N: Tensor | None,
    *,
    distillation: Distillation,
    weights: Tensor,
    with_gradient: bool,
) -> Tensor:
    """See :func:`grace_core.losses.supervised_terms.terms_and_gradient_`; bf16 or fp32."""
    num_tokens, vocabulary = logits_NV.shape
    values = torch.empty((2, num_tokens), device=logits_NV.device)
    if num_tokens == 0:
        return values.sum(1)
    distils = teacher_logits_NV is not None
    teacher = logits_NV if teacher_logits_NV is None else teacher_logits_NV
    gates = values if gates_N is None else gates_N.float().contiguous()
    temperature = distillation.temperature if distils else 1.0
    with torch.cuda.device_of(logits_NV):
        _terms_kernel[(num_tokens,)](
            logits_NV,
            teacher,
            labels_N.contiguous(),
            gates,
            weights.float(),
            values,
            logits_NV.stride(0),
            teacher.stride(0),
            num_tokens,
            vocabulary,
            float(temperature),
            float(distillation.alpha),
            float(distillation.beta_dkd),
            KIND=_KINDS[distillation.kind] if distils else 0,
            POWER={1.0: 1, 2.0: 2}.get(temperature, 0),
            GRADIENT=with_gradient,
            LANES=_LANES,
            PER_LANE=PER_LANE,
            num_warps=NUM_WARPS,
        )
    return values.sum(1)


def confidence_gate(teacher_logits_NV: Tensor) -> Tensor:
    """See :func:`grace_core.losses.gate.confidence_gate`; bf16 or fp32."""
    num_tokens, vocabulary = teacher_logits_NV.shape
    gates = torch.empty(num_tokens, device=teacher_logits_NV.device)
    if num_tokens == 0:
        return gates
    with torch.cuda.device_of(teacher_logits_NV):
        _gate_kernel[(num_tokens,)](
            teacher_logits_NV,
            gates,
            teacher_logits_NV.stride(0),
            vocabulary,
            math.log(vocabulary),
            LANES=_LANES,
            PER_LANE=PER_LANE,
            num_warps=NUM_WARPS,
        )
    return gates


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply in place by a scalar on the device, rounding once; by 1 nothing is touched."""
    size = tensor.numel()
    with torch.cuda.device_of(tensor):
        _scale_kernel[(triton.cdiv(size, _ELEMENTS_SCALED),)](
            tensor, factor, size, BLOCK=_ELEMENTS_SCALED, num_warps=8
        )
