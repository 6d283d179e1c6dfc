"""The plain implementation that every row of the table stands beside.

What one writes first, and what the published code does: samples side by side in a batch,
transformers' own modules with sdpa attention and gradient checkpointing everywhere, logits of both
models at all positions, weights quantized in every forward pass (so twice, with the recomputation),
losses in fp32 over all supervised tokens at once. It shares the losses' plain functions with the
training, which are tested against float64 oracles, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grace_core.config.objective import Objective
from grace_core.losses.cross_entropy import cross_entropy_sum
from grace_core.losses.distillation import decoupled_kd
from grace_core.losses.gate import confidence_gate
from grace_core.losses.relational import relational_loss, teacher_relation
from grace_core.models.families import Family, decoder_layers, set_trainable
from grace_core.models.rows import PackedRow
from grace_core.quantization.convert import quantizable_linears
from grace_core.quantization.lsq import fake_quantize

# dims: B samples of n tokens, N supervised tokens of all of them, V vocabulary


@dataclass(frozen=True)
class Batch:
    """Samples of one length side by side."""

    inputs: dict[str, Tensor]
    """Arguments of transformers' forward pass; tokens are (B, n)."""

    predicting: Tensor
    """(N,) int64 into the B * n positions."""

    labels: Tensor
    """(N,) int64."""

    visual_spans: list[tuple[int, int]]
    """Start within the B * n positions and number of image tokens of each picture."""

    @staticmethod
    def of(row: PackedRow, samples: int, image_token_id: int) -> Batch:
        """A packed row of so many samples, all of one length: nothing has to be padded."""
        ids = row.input_ids.view(samples, -1)
        names = ("pixel_values", "image_grid_thw")
        return Batch(
            inputs={
                "input_ids": ids,
                "mm_token_type_ids": (ids == image_token_id).to(torch.int32),
                **{name: row.pictures[name].to(ids.device) for name in names},
            },
            predicting=row.predicting,
            labels=row.labels,
            visual_spans=row.visual_spans,
        )


def loss_of(
    teacher: Any, student: Any, family: Family, objective: Objective, batch: Batch
) -> Tensor:
    """L_total of Eq. 21 for one batch, normalised over this batch alone; a scalar with a graph."""
    with torch.no_grad():
        teacher_logits, teacher_visual = _forward(teacher, family, batch)
        taught = teacher_logits.flatten(0, 1)[batch.predicting]
    student_logits, student_visual = _forward(student, family, batch)
    predicted = student_logits.flatten(0, 1)[batch.predicting]
    cross_entropy = cross_entropy_sum(predicted, batch.labels) / len(batch.labels)
    distilled = gated_distillation(predicted, taught, batch.labels, objective)
    relational = torch.stack(
        [
            relational_loss(teacher_relation(of_teacher), of_student)
            for of_teacher, of_student in zip(teacher_visual, student_visual, strict=True)
        ]
    ).mean()
    beta, omega = objective.controller.beta_init, objective.relational.omega
    return cross_entropy + beta * distilled + omega * relational


def gated_distillation(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, objective: Objective
) -> Tensor:
    """L_GDKD of Eq. 6 from (N, V) logits; a scalar."""
    settings = objective.distillation
    gates = confidence_gate(teacher_logits)
    per_token = decoupled_kd(
        student_logits,
        teacher_logits,
        labels,
        temperature=settings.temperature,
        alpha=settings.alpha,
        beta=settings.beta_dkd,
    ).total_N
    return (gates * per_token).sum() / gates.sum()


def prepare_student(model: Any, family: Family) -> Any:
    """Set a student up as the plain implementation trains it."""
    set_trainable(model, family, "language")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@contextmanager
def quantized(
    model: nn.Module, family: Family, thetas: Mapping[str, Tensor], *, bits: int, group_size: int
) -> Iterator[None]:
    """Fake-quantize the decoder's projections in every forward pass, inside the block.

    thetas: (O, I / group_size) fp32 log-scales by layer name; leaves, which get gradients.
    """
    linears = quantizable_linears(model, family.decoder)
    for name, linear in linears.items():
        layer = _QuantizedEveryTime(linear, thetas[name], bits, group_size)
        model.set_submodule(name, layer)
    try:
        yield
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)


class _QuantizedEveryTime(nn.Module):
    def __init__(self, linear: nn.Linear, theta: Tensor, bits: int, group_size: int) -> None:
        super().__init__()
        self.weight, self.bias, self.theta = linear.weight, linear.bias, theta
        self.bits, self.group_size = bits, group_size

    def forward(self, input: Tensor) -> Tensor:
        w_hat = fake_quantize(self.weight, self.theta, self.bits, self.group_size)
        return F.linear(input, w_hat, self.bias)


def _forward(model: Any, family: Family, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """(B, n, V) logits, and for each picture its tokens' outputs of the penultimate layer."""
    layers = decoder_layers(model, family)
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handle = layers[len(layers) - 2].register_forward_hook(keep)
    try:
        logits = model(**batch.inputs, use_cache=False).logits
    finally:
        handle.remove()
    penultimate = outputs[0].flatten(0, 1)
    return logits, [penultimate[start : start + count] for start, count in batch.visual_spans]
