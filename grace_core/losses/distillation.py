"""Distillation of the teacher's next-token distribution, per token (Eq. 1-3).

Let z be a row of logits, T the temperature, P = softmax(z / T), y the ground-truth token, and
q_j = P_j / (1 - P_y) for j != y the distribution over the other tokens. Decoupled distillation
splits KL(P_T || P_S) into its two ingredients and weighs them anew:

    TCKD = KL([P_T(y), 1 - P_T(y)] || [P_S(y), 1 - P_S(y)])        is the target right?
    NCKD = KL(q_T || q_S)                                          and among the rest?
    KL(P_T || P_S) = TCKD + (1 - P_T(y)) * NCKD

In the plain KL a confident teacher's factor 1 - P_T(y) all but removes NCKD, which is where the
teacher's knowledge of alternatives sits; L_DKD = alpha * TCKD + beta * NCKD removes that factor.

Numerics. Neither P nor 1 - P is ever formed: 1 - P loses all digits as P -> 1 and log P overflows
as P -> 0. Instead:

- q needs no division. The normaliser of P cancels, so log q is the log-softmax of z / T with the
  target masked out.
- TCKD depends on P_y only through its log-odds, the margin m = log(P_y / (1 - P_y)). For any k != y

      m = log(P_y / P_k) + log(P_k / (1 - P_y)) = (z_y - z_k) / T + log q_k

  Taking the largest z_k keeps log q_k in [-log(V - 1), 0], so no large terms cancel. Then
  log P_y = logsigmoid(m) and log(1 - P_y) = logsigmoid(-m), and both are exact in both tails.

Gradients follow as dTCKD/dm_S = P_S(y) - P_T(y) and dNCKD/dz_S = (q_S - q_T) / T, both bounded.
Both terms carry a factor T^2 so that gradients keep their size when T changes.

Memory: rows are independent, so a caller short of memory may split N into chunks at will. At
N = 4096, V = 151,936 one full-size fp32 tensor is 2.5 GB; two live on until the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DecoupledKD(NamedTuple):
    """Per-token terms, each (N,), in nats times T^2, >= 0 up to rounding."""

    tckd_N: Tensor
    nckd_N: Tensor
    total_N: Tensor
    """alpha * TCKD + beta * NCKD."""


def decoupled_kd(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    labels_N: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
) -> DecoupledKD:
    """Decoupled distillation loss of every supervised token (Eq. 1-3).

    Args:
        student_logits_NV: (N, V) finite logits, any floating dtype, V >= 2. Gets the gradient.
        teacher_logits_NV: (N, V) finite logits over the same vocabulary. No gradient.
        labels_N: (N,) int64 ground-truth token ids in [0, V).
        temperature: T > 0.
        alpha: weight of TCKD.
        beta: weight of NCKD (the paper's beta_dkd; not the controller's beta).

    Returns:
        Terms per token, at least fp32.
    """
    _check_shapes(student_logits_NV, teacher_logits_NV)
    num_tokens, vocabulary = student_logits_NV.shape
    assert labels_N.shape == (num_tokens,), f"{labels_N.shape} labels for {num_tokens} tokens"
    assert vocabulary >= 2, "without a second token there is nothing to distil"

    with torch.no_grad():
        margin_T_N, log_q_T_NV = _target_and_rest(teacher_logits_NV, labels_N, temperature)
        q_T_NV = log_q_T_NV.exp()
    margin_S_N, log_q_S_NV = _target_and_rest(student_logits_NV, labels_N, temperature)

    tckd_N = target_divergence(margin_T_N, margin_S_N)
    nckd_N = expected_log_ratio(q_T_NV, log_q_T_NV, log_q_S_NV)

    tckd_N = temperature**2 * tckd_N
    nckd_N = temperature**2 * nckd_N
    return DecoupledKD(tckd_N, nckd_N, alpha * tckd_N + beta * nckd_N)


def kullback_leibler(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float
) -> Tensor:
    """Plain distillation for the ablation: T^2 * KL(P_T || P_S) of every supervised token.

    Args:
        student_logits_NV: (N, V) finite logits, any floating dtype. Gets the gradient.
        teacher_logits_NV: (N, V) finite logits over the same vocabulary. No gradient.
        temperature: T > 0.

    Returns:
        (N,) in nats times T^2, >= 0 up to rounding, at least fp32.
    """
    _check_shapes(student_logits_NV, teacher_logits_NV)
    with torch.no_grad():
        log_p_T_NV = F.log_softmax(_tempered(teacher_logits_NV, temperature), dim=-1)
        p_T_NV = log_p_T_NV.exp()
    log_p_S_NV = F.log_softmax(_tempered(student_logits_NV, temperature), dim=-1)
    return temperature**2 * expected_log_ratio(p_T_NV, log_p_T_NV, log_p_S_NV)


def target_divergence(margin_T_N: Tensor, margin_S_N: Tensor) -> Tensor:
    """TCKD without its factor T^2, (N,), from both models' log-odds of the target.

    Gradient reaches the student's only if the teacher's carry none.
    """
    tckd_N = torch.sigmoid(margin_T_N) * (F.logsigmoid(margin_T_N) - F.logsigmoid(margin_S_N))
    return tckd_N + torch.sigmoid(-margin_T_N) * (
        F.logsigmoid(-margin_T_N) - F.logsigmoid(-margin_S_N)
    )


def _check_shapes(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> None:
    assert student_logits_NV.ndim == 2, f"logits must be (N, V), got {student_logits_NV.shape}"
    assert student_logits_NV.shape == teacher_logits_NV.shape, (
        f"student {tuple(student_logits_NV.shape)} and teacher {tuple(teacher_logits_NV.shape)} "
        "logits must cover the same tokens and vocabulary"
    )


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """A new tensor logits / T in the accumulation dtype."""
    assert temperature > 0, temperature
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _target_and_rest(
    logits_NV: Tensor, labels_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-odds m (N,) of the target and log q (N, V), whose entry at the target means nothing."""
    labels_N1 = labels_N[:, None]
    rest_NV = _tempered(logits_NV, temperature)
    # In place, as the quotient is ours alone. Finite rather than -inf: q is still exactly 0 at the
    # target, and 0 * (log q_T - log q_S) stays 0 where infinities would make it NaN.
    masked = torch.finfo(rest_NV.dtype).min / 4
    rest_NV = rest_NV.scatter_(-1, labels_N1, masked)
    runner_up_N1 = rest_NV.detach().argmax(-1, keepdim=True)
    log_q_NV = F.log_softmax(rest_NV, dim=-1)

    # From the caller's logits: picking from the quotient would keep it alive until the backward.
    picked_N2 = _tempered(
        logits_NV.gather(-1, torch.cat([labels_N1, runner_up_N1], -1)), temperature
    )
    log_q_runner_up_N = log_q_NV.gather(-1, runner_up_N1).squeeze(-1)
    margin_N = picked_N2[:, 0] - picked_N2[:, 1] + log_q_runner_up_N
    return margin_N, log_q_NV


def expected_log_ratio(p_NV: Tensor, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """sum_j p_j (log p_j - log q_j), (N,); gradient reaches log q only.

    Entry by entry, so that equal distributions give exactly 0, and not as a dot product, which on
    a GPU may run in TF32.
    """
    return (log_p_NV - log_q_NV).mul_(p_NV).sum(-1)
