"""Confidence gate: how much a token's teacher distribution is worth imitating (Eq. 4-6)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def normalised_entropy(teacher_logits_NV: Tensor) -> Tensor:
    """Entropy of the teacher's output distribution over log V, h_i of Eq. 4.

    Always at temperature 1, whatever the temperature of distillation: the gate asks how sure the
    teacher is, not how soft its targets were made.

    Args:
        teacher_logits_NV: (N, V) finite logits, any floating dtype, V >= 2.

    Returns:
        (N,) in [0, 1], at least fp32: 0 where all mass is on one token, 1 where it is uniform.
        No gradient.
    """
    vocabulary = teacher_logits_NV.shape[-1]
    assert vocabulary >= 2, f"entropy over {vocabulary} token(s) has no scale"
    dtype = torch.promote_types(teacher_logits_NV.dtype, torch.float32)
    log_p_NV = F.log_softmax(teacher_logits_NV, dim=-1, dtype=dtype)
    entropy_N = -log_p_NV.exp().mul_(log_p_NV).sum(-1)
    # Rounding can carry a uniform row a few ulp beyond log V.
    return (entropy_N / math.log(vocabulary)).clamp_(0.0, 1.0)


def confidence_gate(teacher_logits_NV: Tensor) -> Tensor:
    """Weight of each token in L_GDKD, g_i = exp(-h_i) of Eq. 5.

    L_GDKD = sum_i g_i L_DKD_i / sum_i g_i over all supervised tokens of the optimizer step (Eq. 6).

    Args:
        teacher_logits_NV: (N, V) finite logits, any floating dtype, V >= 2.

    Returns:
        (N,) in [1/e, 1], at least fp32, no gradient.
    """
    return torch.exp(-normalised_entropy(teacher_logits_NV))
