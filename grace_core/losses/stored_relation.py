"""The teacher's view of one picture in few bytes: what L_RCKA needs of it, in fp16.

Of the centred Gram, which is symmetric, the upper triangle is kept; of a picture with more visual
tokens than the teacher is wide, the centred rows. Values are divided by the largest of them, so
that fp16 holds each to 2^-11 of itself, down to 6e-5 of the largest. CKA is linear in the teacher's
Gram, and roundings of n^2 entries average out: 1 - CKA moves by less than 1e-5 at 90 visual tokens
and more, and by 1e-4 at most where only 4 are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grace_core.losses.relational import TeacherRelation


@dataclass(frozen=True, eq=False)
class StoredRelation:
    """A `TeacherRelation` as it is stored."""

    values: Tensor
    """(n (n + 1) / 2,) fp16 upper triangle, row by row, if `is_gram`, else (n d_T,) rows."""

    scale: float
    """What the values are multiplied by."""

    is_gram: bool
    num_tokens: int
    gram_norm: float
    """Exact, so that the same pictures count."""


@torch.no_grad()
def stored_relation(relation: TeacherRelation) -> StoredRelation:
    """The relation on the CPU, rounded."""
    values = relation.centred.cpu()
    if relation.is_gram:
        values = values[tuple(torch.triu_indices(relation.num_tokens, relation.num_tokens))]
    scale = float(values.abs().max()) if values.numel() else 0.0
    return StoredRelation(
        values=(values / (scale or 1.0)).flatten().half(),
        scale=scale,
        is_gram=relation.is_gram,
        num_tokens=relation.num_tokens,
        gram_norm=float(relation.gram_norm),
    )


@torch.no_grad()
def restored_relation(stored: StoredRelation) -> TeacherRelation:
    """The relation again, in fp32."""
    count = stored.num_tokens
    values = stored.values.float() * stored.scale
    if stored.is_gram:
        rows, columns = torch.triu_indices(count, count)
        centred = values.new_zeros(count, count)
        centred[rows, columns] = values
        centred[columns, rows] = values
    else:
        centred = values.view(count, -1)
    return TeacherRelation(
        centred=centred,
        is_gram=stored.is_gram,
        num_tokens=count,
        gram_norm=values.new_tensor(stored.gram_norm),
    )
