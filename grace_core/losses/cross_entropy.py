"""Cross-entropy with the ground truth, L_CE of Eq. 21."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The functional form always has one label that it leaves out. Ours is one that cannot occur, so a
# padding label (-100) fails instead of vanishing from the sum but not from the caller's count.
_NO_IGNORED_LABEL = torch.iinfo(torch.int64).min


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sum of -log P(label) over the supervised tokens, in nats.

    Args:
        logits_NV: (N, V) student logits, any floating dtype; row i predicts `labels_N[i]`
            (already shifted). N may be 0.
        labels_N: (N,) int64 token ids in [0, V).

    Returns:
        Scalar >= 0, fp32 (fp64 for fp64 logits).

    Raises:
        IndexError: a label outside [0, V), on the CPU; CUDA reports it as a device-side assertion.
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(
        logits_NV.to(dtype), labels_N, reduction="sum", ignore_index=_NO_IGNORED_LABEL
    )
