"""Relational alignment of visual tokens by centred kernel alignment, L_RCKA (Eq. 10-13).

For one image with n visual tokens, V holds the l2-normalised hidden states as rows and
K = V V^T their cosine similarities. With H = I - 11^T / n and K~ = H K H,

    CKA = tr(K~_T K~_S) / sqrt(tr(K~_T K~_T) tr(K~_S K~_S)),    loss = 1 - CKA.

Only the relations between tokens are compared, so teacher and student widths may differ.

H is never formed: H K H = (H V)(H V)^T, and H V is V minus the mean of its rows. Centring before
the product also keeps the digits that subtracting nearly equal cosines would lose.

With C = H V (n x d), every trace is the squared Frobenius norm of a product, taken on its smaller
side, since tr(C_T C_T^T C_S C_S^T) = ||C_T^T C_S||^2:

    n <= d_T   n x n Grams, at a cost of n^2 d (every image of at most d_T visual tokens)
    n >  d_T   the d_T x d_S cross-covariance, at n d_T d_S, and no n x n matrix
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TOKENS = 4
"""Images with fewer visual tokens are left out (not in the paper; from the official code)."""

MIN_GRAM_NORM = 1e-8
"""Frobenius norm of K~ below which all tokens are alike and CKA is 0/0 (official code)."""

_SHORTEST_ROW = 1e-12
"""Rows shorter than this have no direction and are taken as zero."""


@dataclass(frozen=True, eq=False)
class TeacherRelation:
    """What the student's pass needs of the teacher for one image."""

    centred: Tensor
    """Centred Gram K~_T (n, n) if `is_gram`, else centred unit rows (n, d_T). At least fp32."""

    is_gram: bool
    num_tokens: int

    gram_norm: Tensor
    """sqrt(tr(K~_T K~_T)), scalar, at least fp32."""

    @property
    def counts(self) -> Tensor:
        """Whether the image counts in the average, by its tokens and the teacher alone; scalar.

        Known before the student runs, so the global count is, too. Written so that a teacher with
        non-finite states counts and spoils the loss visibly, rather than dropping out.
        """
        return ~(self.gram_norm < MIN_GRAM_NORM) & (self.num_tokens >= MIN_TOKENS)


def teacher_relations(states: Sequence[Tensor]) -> list[TeacherRelation]:
    """Relations between the visual tokens of each image, as the teacher sees them.

    Call it under `torch.no_grad` or outside, but not in `torch.inference_mode`: the student's
    backward needs the result.

    Args:
        states: (n, d_T) hidden states of each image's visual tokens at the penultimate decoder
            layer, any floating dtype. n may be 0.
    """
    return [teacher_relation(of_image) for of_image in states]


@torch.no_grad()
def teacher_relation(teacher_states_nd: Tensor) -> TeacherRelation:
    """:func:`teacher_relations` of one image, (n, d_T)."""
    rows = _centred_directions(teacher_states_nd)
    product = _smaller_product(rows)
    num_tokens, width = rows.shape
    is_gram = num_tokens <= width
    return TeacherRelation(
        centred=product if is_gram else rows,
        is_gram=is_gram,
        num_tokens=num_tokens,
        gram_norm=torch.linalg.vector_norm(product),
    )


def relational_loss(relation: TeacherRelation, student_states_nd: Tensor) -> Tensor:
    """1 - CKA between teacher and student for one image; 0 for one that does not count.

    Where the student's centred Gram vanishes (norm below `MIN_GRAM_NORM`) the loss is exactly 0
    and so is its gradient: the image still counts, and every rank agrees on how many do.

    Args:
        relation: of the same image.
        student_states_nd: (n, d_S), any floating dtype. Gets the gradient; rows of length below
            1e-12 get none.

    Returns:
        Scalar in [0, 1] up to rounding, at least fp32.
    """
    assert student_states_nd.shape[0] == relation.num_tokens, (
        f"{student_states_nd.shape[0]} student and {relation.num_tokens} teacher tokens: "
        "both must be the same image's"
    )
    rows = _centred_directions(student_states_nd)
    if relation.is_gram:
        gram = rows @ rows.T
        overlap = (relation.centred * gram).sum()
        squared_norm = gram.square().sum()
    else:
        overlap = (relation.centred.T @ rows).square().sum()
        squared_norm = _smaller_product(rows).square().sum()

    # Divide by 1 where the result is discarded: 0 * inf in its backward would be NaN. No branch on
    # the value, which would make the host wait for the device.
    vanishes = (squared_norm < MIN_GRAM_NORM**2) | ~relation.counts
    student_norm = torch.where(vanishes, 1.0, squared_norm).sqrt()
    teacher_norm = torch.where(vanishes, 1.0, relation.gram_norm)
    alignment = overlap / (teacher_norm * student_norm)
    return torch.where(vanishes, 0.0, 1.0 - alignment)


def relational_sum(
    relations: Sequence[TeacherRelation], student_states: Sequence[Tensor]
) -> Tensor:
    """Sum of 1 - CKA over the images that count.

    Args:
        relations: one per image, as the teacher sees it.
        student_states: the same images in the same order, each (n, d_S).

    Returns:
        Scalar sum, at least fp32. Without an image that has tokens enough it is a constant 0 (on
        the CPU) that needs no gradient.
    """
    losses = [
        relational_loss(relation, states)
        for relation, states in zip(relations, student_states, strict=True)
        if relation.num_tokens >= MIN_TOKENS
    ]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def _centred_directions(states_nd: Tensor) -> Tensor:
    """H V: rows scaled to unit length, minus their mean. (n, d), at least fp32."""
    states_nd = states_nd.to(torch.promote_types(states_nd.dtype, torch.float32))
    length_n1 = torch.linalg.vector_norm(states_nd, dim=-1, keepdim=True)
    # Both `where`s are needed: the inner one keeps 1/0 out of the backward, the outer one keeps a
    # row without direction from being handed a gradient.
    is_zero_n1 = length_n1 < _SHORTEST_ROW
    unit_nd = states_nd / torch.where(is_zero_n1, 1.0, length_n1)
    unit_nd = torch.where(is_zero_n1, 0.0, unit_nd)
    return unit_nd - unit_nd.mean(dim=0)


def _smaller_product(rows_nd: Tensor) -> Tensor:
    """C C^T or C^T C, whichever is smaller: both have the same Frobenius norm."""
    num_rows, width = rows_nd.shape
    return rows_nd @ rows_nd.T if num_rows <= width else rows_nd.T @ rows_nd
