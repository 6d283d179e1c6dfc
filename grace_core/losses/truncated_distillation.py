"""Distillation from a truncated teacher, per token: Eq. 1-3 over the target, k others and a tail.

With the tail as one class, q(tail) = sum of q_j over its tokens for teacher and student alike,

    TCKD          is exact: it needs P_T(y) alone, which is exact
    NCKD_k        = sum_{j kept} q_T,j log(q_T,j / q_S,j) + q_T(tail) log(q_T(tail) / q_S(tail))
    KL_k          = TCKD + (1 - P_T(y)) NCKD_k                                 (plain distillation)

Taking tokens together never raises a divergence (log sum inequality), so NCKD_k <= NCKD for every
k, with equality at k = V - 1 and wherever teacher and student agree within the tail. What is lost
is NCKD - NCKD_k = q_T(tail) * KL(teacher || student, both within the tail).

q_S(tail) is a sum over the tail's own logits, never 1 - sum of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grace_core.config.objective import Distillation
from grace_core.losses.distillation import expected_log_ratio, target_divergence
from grace_core.losses.truncated_teacher import ABSENT, TruncatedRows


def truncated_distillation(
    settings: Distillation, logits_NV: Tensor, labels_N: Tensor, teacher: TruncatedRows
) -> Tensor:
    """Distillation loss of every supervised token, before the gate.

    Args:
        settings: kind and constants; the temperature is the one that the rows were truncated for.
        logits_NV: (N, V) finite student logits, any floating dtype. Gets the gradient.
        labels_N: (N,) int64 token ids in [0, V).
        teacher: the same tokens.

    Returns:
        (N,) in nats times T^2, >= 0 up to rounding, at least fp32.
    """
    temperature = settings.temperature
    with torch.no_grad():
        margin_T_N, log_q_T_NC = teacher.log_q(temperature)
        alpha, beta_N = term_weights(settings, margin_T_N)
    margin_S_N, log_q_S_NC = _student(logits_NV, labels_N, teacher.ids.long(), temperature)
    tckd_N = target_divergence(margin_T_N, margin_S_N)
    nckd_N = expected_log_ratio(log_q_T_NC.exp(), log_q_T_NC, log_q_S_NC)
    return temperature**2 * (alpha * tckd_N + beta_N * nckd_N)


def term_weights(settings: Distillation, margin_T_N: Tensor) -> tuple[float, Tensor]:
    """Weights of TCKD and, for each token, of NCKD."""
    if settings.kind == "plain":
        return 1.0, torch.sigmoid(-margin_T_N)
    return settings.alpha, torch.full_like(margin_T_N, settings.beta_dkd)


def _student(
    logits_NV: Tensor, labels_N: Tensor, ids_Nk: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `TruncatedRows.log_q`, for the student."""
    tempered_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    labels_N1 = labels_N[:, None]
    rest_NV = tempered_NV.scatter(-1, labels_N1, ABSENT)
    largest_N1 = rest_NV.detach().amax(-1, keepdim=True)
    tail_NV = rest_NV.scatter(-1, ids_Nk, ABSENT) - largest_N1
    kept_Nk = tempered_NV.gather(-1, ids_Nk) - largest_N1
    classes_NC = torch.cat([kept_Nk, tail_NV.logsumexp(-1, keepdim=True)], -1)
    of_all_N1 = classes_NC.logsumexp(-1, keepdim=True)
    margin_N1 = tempered_NV.gather(-1, labels_N1) - largest_N1 - of_all_N1
    return margin_N1[:, 0], classes_NC - of_all_N1
