"""What is kept of the teacher's logits: the largest ones, the target's, and the sum of the rest.

Of the V logits of a supervised token the target's and the k largest others are kept as they are.
All others are taken together as one class, the tail, of which the sum of exp(z_j / T) is known. So
probabilities of the target, of the k others and of the tail are the exact ones, at the one
temperature T that the sum was made for. The gate, which is made of all logits at temperature 1, is
kept as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_core.losses.supervised_terms import gates_of_logits

ABSENT = -1e30
"""In the place of a logit that is summed elsewhere. Finite, because infinities of both models would
make NaN where k is all that there is."""


@dataclass(frozen=True)
class TruncatedRows:
    """The teacher's side of N supervised rows, truncated to k logits besides the target's."""

    ids: Tensor
    """(N, k) int32 tokens other than the target, from the largest logit to the smallest."""

    logits: Tensor
    """(N, k) their logits, in the dtype in which the teacher made them."""

    target_logits: Tensor
    """(N,) logits of the labels, in the same dtype."""

    tails: Tensor
    """(N,) fp32: log of the sum of exp(z_j / T) over the tail, less the largest kept z / T. About
    `ABSENT` where the tail is empty."""

    gates: Tensor
    """(N,) fp32 weights g_i of the distillation loss; -log g_i is the entropy h_i of Eq. 4."""

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: slice) -> TruncatedRows:
        """Some of the rows."""
        return self.moved(lambda tensor: tensor[rows])

    def moved(self, move: Callable[[Tensor], Tensor]) -> TruncatedRows:
        """The same with `move` done to every tensor."""
        return TruncatedRows(**{name: move(value) for name, value in vars(self).items()})

    def log_q(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-odds of the target (N,), and log q_T of the kept others and of the tail (N, k + 1).

        At least fp32. Everything is relative to the largest kept logit, so that no digits go.
        """
        dtype = torch.promote_types(self.logits.dtype, torch.float32)
        kept = self.logits.to(dtype)
        largest = kept[:, :1]
        classes = torch.cat([(kept - largest) / temperature, self.tails.to(dtype)[:, None]], -1)
        of_all = classes.logsumexp(-1, keepdim=True)
        margin = (self.target_logits.to(dtype)[:, None] - largest) / temperature - of_all
        return margin[:, 0], classes - of_all


@torch.no_grad()
def truncated(
    logits_NV: Tensor, labels_N: Tensor, *, top_k: int, temperature: float
) -> TruncatedRows:
    """Truncate rows of the teacher's logits.

    Args:
        logits_NV: (N, V) finite logits, any floating dtype.
        labels_N: (N,) int64 ground-truth token ids in [0, V).
        top_k: how many logits besides the target's are kept, at least 1; no more than V - 1 are.
        temperature: T of distillation.
    """
    assert top_k >= 1 and temperature > 0
    gates = gates_of_logits(logits_NV)
    labels_N1 = labels_N[:, None]
    rest_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
    rest_NV.scatter_(-1, labels_N1, ABSENT)
    largest, ids = rest_NV.topk(min(top_k, logits_NV.shape[-1] - 1), dim=-1)
    rest_NV.scatter_(-1, ids, ABSENT)
    tails = rest_NV.sub_(largest[:, :1]).div_(temperature).logsumexp(-1)
    return TruncatedRows(
        ids=ids.int(),
        logits=logits_NV.gather(-1, ids),
        target_logits=logits_NV.gather(-1, labels_N1).squeeze(-1),
        tails=tails.clamp(min=ABSENT).float(),
        gates=gates.float(),
    )


def joined_rows(parts: list[TruncatedRows]) -> TruncatedRows:
    """Rows one after the other."""
    names = vars(parts[0])
    return TruncatedRows(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    )
