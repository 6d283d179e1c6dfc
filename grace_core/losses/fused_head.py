"""A language-model head together with the losses of its logits.

Logits are by far the largest tensors of a step, and the losses need of them only sums and the
gradient. So they exist for a chunk of supervised rows at a time: logits by a matrix product, sums
and gradient from :mod:`grace_core.losses.supervised_terms` in their place, and from these the
chunk's share of the gradients with respect to hidden states and head. All of it happens in the
forward pass, and no product is made twice; the backward pass only scales what is there.

The teacher's logits are needed for less time than the student's, whose gradient waits for the
chunk's products, so they come in smaller chunks. Every chunk of the student's adds to the head's
gradient. Two chunks do so in the head's dtype, the smaller one first, so that its rounding weighs
little; more of them, or two alike, in fp32 (:class:`_HeadGradient`).

Under ZeRO-3 a head's weight is whole while its module is called, and only then. Therefore the
computation runs inside of the call of both heads (:class:`SupervisedHead`).

Shapes: N supervised rows, V vocabulary, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grace_core.config.objective import Distillation
from grace_core.errors import GraceError
from grace_core.losses.kernel_choice import kernels_for
from grace_core.losses.supervised_terms import (
    PLAIN_BYTES,
    gates_of_logits,
    terms_and_gradient_,
)
from grace_core.losses.truncated_teacher import TruncatedRows, joined_rows, truncated
from grace_core.losses.truncated_terms import truncated_terms_and_gradient_

_ROW_MULTIPLE = 128
"""Matrix products are cut into tiles of so many rows."""

_TEACHER_SHARE = 5
"""The student's logits exist for so many times the rows of the teacher's."""

_ROUNDED_SHARE = 0.4
"""Of the rows: a first chunk up to here may be rounded before the second is added. Where the
head's gradient is nothing but its roundings, the error grows by sqrt(1 + share) = 1.18 at most."""

_VOCABULARY_SLICE = 16_384
"""Rows of the head whose gradient is added in fp32 at one time."""


class SupervisedHead(nn.Linear):
    """A language-model head in whose call more may be computed than logits.

    Stands in the head's place under the same name and shares its parameters, tied ones too, so
    that neither ZeRO nor Hugging Face nor a checkpoint sees a difference.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        self.weight = linear.weight
        self.bias = linear.bias
        self.train(linear.training)

    def forward(
        self, input: Tensor, *, use: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None
    ) -> Any:
        """Logits (..., V), or what `use(input, weight, bias)` returns while the weight is whole."""
        if use is None:
            return F.linear(input, self.weight, self.bias)
        return use(input, self.weight, self.bias)


def supervised_head(model: Any) -> SupervisedHead:
    """The head of a Hugging Face model, put into its place on the first call.

    Call it before DeepSpeed is given the model, whose hooks sit on modules.

    Raises:
        GraceError: the head is no plain linear layer.
    """
    head = model.lm_head
    if isinstance(head, SupervisedHead):
        return head
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        raise GraceError(
            f"the language-model head is a {type(head).__name__}, not a plain linear layer; load a "
            "checkpoint whose lm_head is neither quantized nor adapted"
        )
    model.lm_head = SupervisedHead(head)
    return model.lm_head


@dataclass(frozen=True)
class TaughtRows:
    """The teacher's side of the supervised rows."""

    head: SupervisedHead
    states: Tensor
    """(N, d_T) final states."""

    gates: Tensor
    """(N,) weights g_i of the distillation loss."""


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What the rows are trained towards, and how much each term counts."""

    labels: Tensor
    """(N,) int64 token ids."""

    teacher: TaughtRows | TruncatedRows | None
    """None: cross-entropy alone."""

    distillation: Distillation
    weights: Tensor
    """(2,) of cross-entropy and of distillation, on the rows' device."""

    logits_bytes: int
    """What may be held at one time in logits of both models and in copies of them."""


@dataclass(frozen=True)
class ChunkRows:
    """Rows whose logits exist at one time."""

    student: int
    teacher: int

    @staticmethod
    def within(logits_bytes: int, weight: Tensor, teacher_weight: Tensor | None) -> ChunkRows:
        """As many as fit; at least one, and whole tiles of a matrix product where that is possible.

        Args:
            logits_bytes: the budget.
            weight: (V, d) of the student's head.
            teacher_weight: (V, d_T) of the teacher's; None where there is none.
        """
        vocabulary = len(weight)
        heads = [weight] if teacher_weight is None else [weight, teacher_weight]
        of_part = 0 if teacher_weight is None else teacher_weight.element_size()
        if kernels_for(*heads) is None:
            of_part += PLAIN_BYTES
        per_row = vocabulary * (weight.element_size() + of_part / _TEACHER_SHARE)
        rows = int(logits_bytes / per_row)
        multiple = _ROW_MULTIPLE * _TEACHER_SHARE
        rows = max(1, rows - rows % multiple if rows > multiple else rows)
        return ChunkRows(rows, max(1, rows // _TEACHER_SHARE))


def supervised_loss(
    head: SupervisedHead, states_Nd: Tensor, supervision: Supervision
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy and gated distillation of supervised rows, without their logits.

    The gradients are made here, so a backward pass through the loss happens at most once.

    Args:
        head: the student's.
        states_Nd: (N, d) final states that predict the labels, in the head's dtype.

    Returns:
        Scalar loss, weights[0] * sum CE + weights[1] * sum g KD, at least fp32; and the two sums
        themselves, (2,), without gradient.
    """

    def loss(states: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _SupervisedLoss.apply(
            states, weight, bias, supervision, torch.is_grad_enabled()
        )
        return result

    result: tuple[Tensor, Tensor] = head(states_Nd, use=loss)
    return result


@torch.no_grad()
def gates_of_rows(head: SupervisedHead, states_Nd: Tensor, *, logits_bytes: int) -> Tensor:
    """The gate of every supervised row from the teacher's final states, (N,) at least fp32."""

    def gates(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = ChunkRows.within(logits_bytes, weight, weight).teacher
        parts = states.split(rows)
        return torch.cat([gates_of_logits(F.linear(part, weight, bias)) for part in parts])

    result: Tensor = head(states_Nd, use=gates)
    return result


@torch.no_grad()
def truncated_rows(
    head: SupervisedHead,
    states_Nd: Tensor,
    labels_N: Tensor,
    *,
    top_k: int,
    temperature: float,
    logits_bytes: int,
) -> TruncatedRows:
    """What is kept of the teacher's logits of supervised rows, from its final states.

    Args:
        states_Nd: (N, d_T) final states that predict the labels, N >= 1.
        labels_N: (N,) int64 token ids.
        top_k: how many logits besides the label's are kept.
        temperature: T of distillation.
    """

    def of_chunks(states: Tensor, weight: Tensor, bias: Tensor | None) -> list[TruncatedRows]:
        rows = ChunkRows.within(logits_bytes, weight, weight).teacher
        return [
            truncated(F.linear(part, weight, bias), labels, top_k=top_k, temperature=temperature)
            for part, labels in zip(states.split(rows), labels_N.split(rows), strict=True)
        ]

    return joined_rows(head(states_Nd, use=of_chunks))


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        supervision: Supervision,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        needed = [grad_enabled and needs for needs in ctx.needs_input_grad[:3]]
        work = _Work(states, weight, bias, supervision, *needed)
        teacher = supervision.teacher
        if isinstance(teacher, TaughtRows):
            teacher.head(teacher.states, use=work.run)
        else:
            work.run(None, None, None)
        ctx.gradients = [work.grad_states, work.grad_weight, work.grad_bias]
        ctx.mark_non_differentiable(work.sums)
        return work.weights @ work.sums, work.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Let go of here: autograd takes a gradient over without a copy if nobody else holds it.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients of this loss have been taken already"
        for gradient in gradients:
            if gradient is not None:
                _scale_(gradient, grad_loss)
        return (*gradients, None, None)


class _Work:
    """The supervised rows of one call, chunk by chunk."""

    def __init__(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        supervision: Supervision,
        needs_states: bool,
        needs_weight: bool,
        needs_bias: bool,
    ) -> None:
        self.states, self.weight, self.bias = states, weight, bias
        self.supervision = supervision
        self.with_gradient = needs_states or needs_weight or needs_bias
        at_least_fp32 = torch.promote_types(states.dtype, torch.float32)
        self.sums = states.new_zeros(2, dtype=at_least_fp32)
        self.weights = supervision.weights.to(at_least_fp32)
        self.grad_states = torch.empty_like(states) if needs_states else None
        self.grad_weight: Tensor | None = None
        self.needs_weight = needs_weight
        self.grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None

    def run(
        self, teacher_states: Tensor | None, teacher_weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Go over all rows while both heads' weights are whole."""
        rows = ChunkRows.within(self.supervision.logits_bytes, self.weight, teacher_weight)
        total, vocabulary = len(self.states), len(self.weight)
        ends = _chunk_ends(total, rows.student)
        head_gradient = _HeadGradient(self.weight, ends) if self.needs_weight else None
        student = self.states.new_empty(min(rows.student, total), vocabulary)
        teacher = None
        if teacher_states is not None:
            teacher = teacher_states.new_empty(min(rows.teacher, total), vocabulary)
        start = 0
        for end in ends:
            logits = _project(self.states[start:end], self.weight, self.bias, student)
            for first in range(start, end, rows.teacher):
                part = slice(first, min(first + rows.teacher, end))
                taught = None
                if teacher is not None and teacher_states is not None:
                    taught = _project(teacher_states[part], teacher_weight, bias, teacher)
                self._terms(logits[first - start : part.stop - start], taught, part)
            # Now the logits' gradient.
            if self.grad_states is not None:
                torch.mm(logits, self.weight, out=self.grad_states[start:end])
            if head_gradient is not None:
                head_gradient.add(logits, self.states[start:end])
            if self.grad_bias is not None:
                self.grad_bias += logits.sum(0)
            start = end
        del student, teacher, logits
        if head_gradient is not None:
            self.grad_weight = head_gradient.whole()

    def _terms(self, logits: Tensor, teacher_logits: Tensor | None, part: slice) -> None:
        given = self.supervision
        taught = given.teacher
        settings: dict[str, Any] = {
            "distillation": given.distillation,
            "weights": self.weights,
            "with_gradient": self.with_gradient,
        }
        if isinstance(taught, TruncatedRows):
            self.sums += truncated_terms_and_gradient_(
                logits, given.labels[part], taught.part(part), **settings
            )
            return
        gates = None if taught is None else taught.gates[part]
        self.sums += terms_and_gradient_(
            logits, teacher_logits, given.labels[part], gates, **settings
        )


def _chunk_ends(total: int, rows: int) -> list[int]:
    """Where chunks of so many rows end; the first one is the smaller one."""
    first = total % rows or min(rows, total)
    return list(range(first, total + 1, rows)) if total else [0]


class _HeadGradient:
    """dZ^T H, (V, d), summed over chunks of rows."""

    def __init__(self, weight: Tensor, ends: list[int]) -> None:
        rounds_little = len(ends) == 1 or (len(ends) == 2 and ends[0] <= _ROUNDED_SHARE * ends[1])
        dtype = weight.dtype
        if not rounds_little:
            dtype = torch.promote_types(dtype, torch.float32)
        self.dtype = weight.dtype
        self.sum = torch.empty_like(weight, dtype=dtype)
        self.is_empty = True

    def add(self, grad_logits: Tensor, states: Tensor) -> None:
        """Add a chunk's product, (n, V)^T (n, d)."""
        if self.sum.dtype == grad_logits.dtype:
            # Added within the product, so that a chunk rounds the sum once.
            beta = 0.0 if self.is_empty else 1.0
            torch.addmm(self.sum, grad_logits.t(), states, beta=beta, out=self.sum)
        else:
            if self.is_empty:
                self.sum.zero_()
            for first in range(0, len(self.sum), _VOCABULARY_SLICE):
                part = slice(first, first + _VOCABULARY_SLICE)
                self.sum[part] += _product_in_fp32(grad_logits[:, part].t(), states)
        self.is_empty = False

    def whole(self) -> Tensor:
        """The sum, in the weight's dtype."""
        return self.sum.to(self.dtype)


def _product_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Product of bf16 matrices, not rounded to bf16."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _project(states: Tensor, weight: Tensor | None, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Logits of the rows, in the buffer's first rows."""
    assert weight is not None
    logits = buffer[: len(states)]
    if bias is None:
        return torch.mm(states, weight.t(), out=logits)
    return torch.addmm(bias, states, weight.t(), out=logits)


def _scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply in place by a scalar tensor, which is not rounded to the tensor's dtype first."""
    kernels = kernels_for(tensor)
    if kernels is not None:
        kernels.scale_(tensor, factor)
        return
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for block in tensor.split(4096):
        block.copy_(block.to(dtype) * factor)
