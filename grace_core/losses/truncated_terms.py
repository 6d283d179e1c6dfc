"""Cross-entropy and distillation from a truncated teacher, and their gradient, in one go.

As :mod:`grace_core.losses.supervised_terms`, which see. With p_j the student's probability of a
token within the tail, c = beta g T and e = P_S(y) - P_T(y), the gradient with respect to z_S is

    a kept token    c (q_S,j - q_T,j) - alpha g T e q_S,j
    in the tail     c (q_S,j - q_T(tail) p_j) - alpha g T e q_S,j
    the target      alpha g T e

and cross-entropy's softmax is added. All that depends on a token of the tail is a multiple of
exp(z_j / T) or of exp(z_j), whose factors are the row's. So the vocabulary is read once for the
sums and once for the gradient; everything else is done on k + 1 logits a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grace_core.config.objective import Distillation
from grace_core.losses.distillation import expected_log_ratio, target_divergence
from grace_core.losses.kernel_choice import kernels_for
from grace_core.losses.supervised_terms import terms_by_autograd_
from grace_core.losses.truncated_distillation import term_weights, truncated_distillation
from grace_core.losses.truncated_teacher import ABSENT, TruncatedRows


def truncated_terms_and_gradient_(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher: TruncatedRows,
    *,
    distillation: Distillation,
    weights: Tensor,
    with_gradient: bool,
) -> Tensor:
    """Sums of the terms over rows of logits; the gradient goes where the student's logits were.

    Args:
        logits_NV: (N, V) finite student logits, any floating dtype, V >= 2. Overwritten: with
            `with_gradient` by the gradient, in their dtype, of

                weights[0] * sum_i CE_i + weights[1] * sum_i g_i KD_i

        labels_N: (N,) int64 token ids in [0, V).
        teacher: the same tokens, truncated for the temperature of `distillation`.
        distillation: kind and constants of KD, other than `none`.
        weights: (2,) of cross-entropy and of distillation, on the logits' device.

    Returns:
        (2,): sum of CE in nats and of g_i KD_i in nats times T^2; fp32, fp64 for fp64 logits.
    """
    assert distillation.kind != "none"
    fused = kernels_for(logits_NV) is not None
    compute = fused_truncated_terms_and_gradient_ if fused else plain_truncated_terms_and_gradient_
    return compute(
        logits_NV,
        labels_N,
        teacher,
        distillation=distillation,
        weights=weights,
        with_gradient=with_gradient,
    )


def plain_truncated_terms_and_gradient_(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher: TruncatedRows,
    *,
    distillation: Distillation,
    weights: Tensor,
    with_gradient: bool,
) -> Tensor:
    """The same by autograd over the terms' own functions."""

    def gated_sum(logits: Tensor) -> Tensor:
        per_token = truncated_distillation(distillation, logits, labels_N, teacher)
        return (teacher.gates * per_token).sum()

    return terms_by_autograd_(
        logits_NV,
        labels_N,
        gated_sum,
        weights=weights,
        with_gradient=with_gradient,
    )


@torch.no_grad()
def fused_truncated_terms_and_gradient_(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher: TruncatedRows,
    *,
    distillation: Distillation,
    weights: Tensor,
    with_gradient: bool,
) -> Tensor:
    """The same in closed form, over the vocabulary by Triton kernels; bf16 or fp32."""
    from grace_core.losses import truncated_kernels as kernels

    if not len(logits_NV):
        return logits_NV.new_zeros(2, dtype=torch.float32)
    temperature = distillation.temperature
    labels_N1, ids_Nk = labels_N[:, None], teacher.ids.long()
    target_N1 = logits_NV.gather(-1, labels_N1).float()
    kept_Nk = logits_NV.gather(-1, ids_Nk).float()
    logits_NV.scatter_(-1, labels_N1, ABSENT).scatter_(-1, ids_Nk, ABSENT)
    # Of the tail, relative to its largest logit.
    largest_N1, sum_T_N1, sum_1_N1 = kernels.tail_sums(logits_NV, temperature)

    pivot_N1 = torch.maximum(kept_Nk.amax(-1, keepdim=True), largest_N1)
    target_N1, kept_Nk = target_N1 - pivot_N1, kept_Nk - pivot_N1
    top_N1 = largest_N1 - pivot_N1
    tail_1_N1 = top_N1 + sum_1_N1.log()
    log_rest_1_N1 = torch.cat([kept_Nk, tail_1_N1], -1).logsumexp(-1, keepdim=True)
    margin_1_N1 = target_N1 - log_rest_1_N1
    tail_T_N1 = top_N1 / temperature + sum_T_N1.log()
    classes_NC = torch.cat([kept_Nk / temperature, tail_T_N1], -1)
    log_rest_T_N1 = classes_NC.logsumexp(-1, keepdim=True)
    log_q_S_NC = classes_NC - log_rest_T_N1
    margin_S_N = (target_N1 / temperature - log_rest_T_N1)[:, 0]

    margin_T_N, log_q_T_NC = teacher.log_q(temperature)
    alpha, beta_N = term_weights(distillation, margin_T_N)
    q_T_NC = log_q_T_NC.exp()
    tckd_N = target_divergence(margin_T_N, margin_S_N)
    nckd_N = expected_log_ratio(q_T_NC, log_q_T_NC, log_q_S_NC)
    distilled_N = temperature**2 * (alpha * tckd_N + beta_N * nckd_N)
    sums = torch.stack([-F.logsigmoid(margin_1_N1).sum(), (teacher.gates * distilled_N).sum()])
    if not with_gradient:
        return sums

    # P_S(y) - P_T(y) without the cancellation where both are near 1.
    excess_N = torch.sigmoid(-margin_T_N) * torch.sigmoid(margin_S_N)
    excess_N -= torch.sigmoid(margin_T_N) * torch.sigmoid(-margin_S_N)
    of_cross_entropy, of_distillation = weights.float()
    factor_N1 = (of_distillation * temperature * teacher.gates)[:, None]
    of_target_N1 = factor_N1 * alpha * excess_N[:, None]
    of_q_T_N1 = factor_N1 * beta_N[:, None]
    of_q_S_N1 = of_q_T_N1 - of_target_N1
    of_1_N1 = of_cross_entropy * torch.sigmoid(-margin_1_N1)

    kernels.tail_gradient_(
        logits_NV,
        largest_N1,
        of_q_S_N1 * torch.exp(top_N1 / temperature - log_rest_T_N1)
        - of_q_T_N1 * q_T_NC[:, -1:] / sum_T_N1,
        of_1_N1 * torch.exp(top_N1 - log_rest_1_N1),
        temperature,
    )
    of_kept_Nk = of_q_S_N1 * log_q_S_NC[:, :-1].exp() - of_q_T_N1 * q_T_NC[:, :-1]
    of_kept_Nk += of_1_N1 * torch.exp(kept_Nk - log_rest_1_N1)
    logits_NV.scatter_(-1, ids_Nk, of_kept_Nk.to(logits_NV.dtype))
    logits_NV.scatter_(-1, labels_N1, (of_target_N1 - of_1_N1).to(logits_NV.dtype))
    return sums
