"""Cross-entropy and gated distillation of rows of logits, and their gradient, in one go.

What is wanted of logits in training is the sum of each term and the gradient of their weighted sum
with respect to the student's logits, nothing else. All weights are known beforehand, so no graph
has to outlive the call: the gradient is written over the logits, which are not needed any more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grace_core.config.objective import Distillation
from grace_core.losses.cross_entropy import cross_entropy_sum
from grace_core.losses.distillation import decoupled_kd, kullback_leibler
from grace_core.losses.gate import confidence_gate
from grace_core.losses.kernel_choice import kernels_for

PLAIN_BYTES = 40
"""Bytes a logit of what :func:`plain_terms_and_gradient_` holds at its peak besides its arguments:
ten fp32 tensors."""


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
    """Sums of the terms over rows of logits; the gradient goes where the student's logits were.

    On a GPU one Triton kernel, which reads both logits twice and writes once.

    Args:
        logits_NV: (N, V) finite student logits, any floating dtype, V >= 2. With `with_gradient`
            they are overwritten by the gradient, in their dtype, of

                weights[0] * sum_i CE_i + weights[1] * sum_i g_i KD_i

        teacher_logits_NV: (N, V) finite logits over the same vocabulary; None leaves KD out.
        labels_N: (N,) int64 token ids in [0, V).
        gates_N: (N,) g_i >= 0, given with the teacher's logits.
        distillation: kind and constants of KD; kind `none` only without the teacher's logits.
        weights: (2,) of cross-entropy and of distillation, on the logits' device, where they may
            still be computed. One may be 0; its term is summed all the same.

    Returns:
        (2,): sum of CE in nats and of g_i KD_i in nats times T^2; fp32, fp64 for fp64 logits.

    Raises:
        IndexError: a label outside [0, V), on the CPU; on a GPU sums and gradient become NaN, or
            a device-side assertion fails.
    """
    assert (teacher_logits_NV is None) == (gates_N is None), "a gate for each taught token"
    assert teacher_logits_NV is None or distillation.kind != "none"
    assert logits_NV.shape[1] >= 2, "a choice is of two tokens or more"
    matrices = [m for m in (logits_NV, teacher_logits_NV) if m is not None]
    kernels = kernels_for(*matrices)
    compute = plain_terms_and_gradient_ if kernels is None else kernels.terms_and_gradient_
    sums: Tensor = compute(
        logits_NV,
        teacher_logits_NV,
        labels_N,
        gates_N,
        distillation=distillation,
        weights=weights,
        with_gradient=with_gradient,
    )
    return sums


def gates_of_logits(teacher_logits_NV: Tensor) -> Tensor:
    """The confidence gate, (N,) at least fp32; on a GPU one Triton kernel that reads once.

    See :func:`grace_core.losses.gate.confidence_gate`.
    """
    kernels = kernels_for(teacher_logits_NV)
    gates: Tensor = (confidence_gate if kernels is None else kernels.confidence_gate)(
        teacher_logits_NV
    )
    return gates


def plain_terms_and_gradient_(
    logits_NV: Tensor,
    teacher_logits_NV: Tensor | None,
    labels_N: Tensor,
    gates_N: Tensor | None,
    *,
    distillation: Distillation,
    weights: Tensor,
    with_gradient: bool,
) -> Tensor:
    """The same by autograd over the terms' own functions."""

    def gated_sum(logits: Tensor) -> Tensor:
        if teacher_logits_NV is None or gates_N is None:
            return logits.new_zeros(())
        return (gates_N * _distillation(distillation, logits, teacher_logits_NV, labels_N)).sum()

    return terms_by_autograd_(
        logits_NV,
        labels_N,
        gated_sum,
        weights=weights,
        with_gradient=with_gradient,
    )


def terms_by_autograd_(
    logits_NV: Tensor,
    labels_N: Tensor,
    gated_sum: Callable[[Tensor], Tensor],
    *,
    weights: Tensor,
    with_gradient: bool,
) -> Tensor:
    """Sums and gradient as :func:`terms_and_gradient_` says, for any kind of distillation.

    Args:
        gated_sum: of the student's logits, at least fp32: sum_i g_i KD_i.
    """
    # The copy makes both terms' gradients meet in fp32, to be rounded once.
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    leaf = logits_NV.detach().to(dtype)
    with torch.set_grad_enabled(with_gradient):
        leaf.requires_grad_(with_gradient)
        cross_entropy = cross_entropy_sum(leaf, labels_N)
        distilled = gated_sum(leaf)
        loss = weights[0].to(dtype) * cross_entropy + weights[1].to(dtype) * distilled
    if with_gradient:
        logits_NV.copy_(torch.autograd.grad(loss, leaf)[0])
    return torch.stack([cross_entropy, distilled]).detach()


def _distillation(
    settings: Distillation, logits_NV: Tensor, teacher_logits_NV: Tensor, labels_N: Tensor
) -> Tensor:
    """(N,) distillation loss of each token, before the gate."""
    if settings.kind == "plain":
        return kullback_leibler(logits_NV, teacher_logits_NV, temperature=settings.temperature)
    return decoupled_kd(
        logits_NV,
        teacher_logits_NV,
        labels_N,
        temperature=settings.temperature,
        alpha=settings.alpha,
        beta=settings.beta_dkd,
    ).total_N
