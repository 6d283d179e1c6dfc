"""What the rows of the table share: models, rows of samples, and one cycle of the real training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_core.bench import plain
from grace_core.bench.measure import GIB
from grace_core.bench.random_models import random_model, twin
from grace_core.bench.samples import RandomRows, folder_without_weights
from grace_core.bench.shapes import GROUP_SIZE, Shapes
from grace_core.config.objective import Objective
from grace_core.config.training import Training
from grace_core.losses.objective import (
    GlobalCounts,
    StudentObjective,
    Teacher,
    TermWeights,
    teacher_rows,
)
from grace_core.models.activations import layer_activations, layers_to_recompute
from grace_core.models.families import Family, set_trainable
from grace_core.models.frozen_tower import tower_states
from grace_core.models.fused_forward import choose_forward
from grace_core.models.loading import expect_packed_rows
from grace_core.models.rows import PackedRow
from grace_core.quantization.convert import convert, quantizable_linears
from grace_core.quantization.cycle import QuantizationCycle
from grace_core.quantization.scales import ScaleBank
from grace_core.quantization.straight_through import GradientShare
from grace_core.training.recompute import recompute_layers

BITS = 4
"""Of the rows that quantize: the smaller release."""

MEMORY_GOAL_GIB = 10.0
"""Of the BF16 step on one H200, gradients included."""

_BESIDE_ACTIVATIONS_GIB = 2.0
"""Of it where it is highest, between forward and backward pass: the head's logits and gradient, the
teacher's states. Other gradients come as activations go, and are fewer."""

_DIFFERENT_ROWS = 2
"""Reading pictures takes the CPU longer than a step takes a GPU."""


class Workbench:
    """Models on one device, made when a row first asks for them.

    Weights are held once: the plain implementation's modules refer to the training's.

    Attributes:
        objective: GRACE with its defaults.
        training: the loop's defaults.
        family: the models' family.
    """

    def __init__(
        self,
        shapes: Shapes,
        device: torch.device,
        folder: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        recompute: int | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            folder: an empty one for the few small files that a checkpoint has beside weights.
            recompute: decoder layers that the student computes again in its backward pass; None:
                the fewest with which the BF16 step keeps within `MEMORY_GOAL_GIB`.
        """
        self.shapes = shapes
        self.device = device
        self.dtype = dtype
        self.objective = Objective()
        self.training = Training(steps=1)
        self.checkpoint = folder_without_weights(folder / "student", shapes, "student")
        self.family: Family = self.checkpoint.family
        self._recompute = recompute
        self._seed = seed
        self._rows = RandomRows(shapes, self.checkpoint, seed=seed)

    @property
    def vocabulary(self) -> int:
        return int(self.shapes.config("student").text_config.vocab_size)

    @cached_property
    def teacher(self) -> Any:
        """Frozen, as the training loads it."""
        torch.manual_seed(self._seed)
        model = random_model(self.shapes, "teacher", self.device, dtype=self.dtype)
        expect_packed_rows(model, self.family)
        choose_forward(model, self.family, self.training.kernels)
        return model.requires_grad_(False)

    @cached_property
    def student(self) -> Any:
        """As the training sets it up."""
        model = self.new_student().train()
        set_trainable(model, self.family, "language")
        choose_forward(model, self.family, self.training.kernels)
        return model

    def recompute_for(self, samples: int) -> None:
        """Recompute what rows of so many samples want recomputed, from now on."""
        recompute_layers(self.student, self.family, self.recomputed_layers(samples))

    def recomputed_layers(self, samples: int) -> int:
        """Of the student's decoder for rows of so many samples, within the goal for memory.

        The row of the table that has an optimizer goes by the memory of the device instead.
        """
        if self._recompute is not None:
            return self._recompute
        shapes, text = self.shapes, self.shapes.config("student").text_config
        free = (MEMORY_GOAL_GIB - _BESIDE_ACTIVATIONS_GIB) * GIB
        each = layer_activations(
            text,
            self.family,
            fused=self.device.type == "cuda" and self.training.kernels == "auto",
            element_bytes=self.dtype.itemsize,
        )
        tokens = samples * shapes.sample_tokens
        count, _ = layers_to_recompute(text.num_hidden_layers, tokens, each, int(free))
        return count

    @cached_property
    def plain_teacher(self) -> Any:
        return twin(self.teacher, self.shapes, "teacher")

    @cached_property
    def plain_student(self) -> Any:
        return plain.prepare_student(twin(self.student, self.shapes, "student"), self.family)

    def new_student(self) -> Any:
        """A student as the training loads it; `seed` decides its weights."""
        model = self.new_plain_student()
        expect_packed_rows(model, self.family)
        return model

    def new_plain_student(self) -> Any:
        """The same as transformers makes it."""
        torch.manual_seed(self._seed + 1)
        return random_model(self.shapes, "student", self.device, dtype=self.dtype)

    def forget_student(self) -> None:
        """Make room for one of another kind."""
        for name in ("student", "plain_student"):
            self.__dict__.pop(name, None)

    def rows(self, samples: int, count: int) -> list[PackedRow]:
        """Packed rows on the device; a few different ones taken again and again."""
        made = [self._rows.row(samples).to(self.device) for _ in range(min(count, _DIFFERENT_ROWS))]
        return [made[number % len(made)] for number in range(count)]

    def batch(self, row: PackedRow, samples: int) -> plain.Batch:
        """The row's samples for the plain implementation."""
        return plain.Batch.of(row, samples, self.shapes.config("student").image_token_id)

    def cycle(
        self, rows: Sequence[PackedRow], quantization: QuantizationCycle | None = None
    ) -> Tensor:
        """One accumulation cycle as the training loop makes it, without the optimizer.

        Gradients are left in the student's parameters. Returns the loss of the whole cycle.

        quantization: of the student inside `quantized`; its weights are quantized at the beginning,
        and the gradients mapped at the end.
        """
        student = StudentObjective(
            self.student,
            self.family,
            self.objective,
            logits_bytes=self.training.logits_mib * 2**20,
        )
        taught = teacher_rows(
            Teacher.of(self.teacher, self.family),
            self.objective,
            rows,
            logits_bytes=self.training.logits_mib * 2**20,
        )
        weights = TermWeights.of(
            self.objective,
            GlobalCounts.of(rows, taught),
            beta=self.objective.controller.beta_init,
            omega=self.objective.relational.omega,
        )
        total = torch.zeros((), device=self.device)
        with nullcontext() if quantization is None else quantization.weights_quantized():
            towers = tower_states(self.student, self.family, rows)
            for row, of_row, tower in zip(rows, taught, towers, strict=True):
                loss, _ = student(row, of_row, weights, tower)
                loss.backward()
                total += loss.detach()
        if quantization is not None:
            quantization.map_gradients([whole_share(weight) for weight in quantization.weights])
        return total

    def plain_step(self, batch: plain.Batch) -> Tensor:
        """Forward and backward of the plain implementation; returns its loss."""
        loss = plain.loss_of(
            self.plain_teacher, self.plain_student, self.family, self.objective, batch
        )
        loss.backward()
        return loss.detach()

    def drop_gradients(self) -> None:
        """Both implementations share the parameters, so there is one set of gradients."""
        self.student.zero_grad(set_to_none=True)

    @contextmanager
    def quantized(self) -> Iterator[tuple[ScaleBank, QuantizationCycle]]:
        """Both students with fake-quantized weights, inside the block.

        Yields the scales and the cycle of the training's student.
        """
        linears = quantizable_linears(self.student, self.family.decoder)
        bank = convert(
            self.student, decoder_prefix=self.family.decoder, bits=BITS, group_size=GROUP_SIZE
        )
        thetas = {name: theta.requires_grad_() for name, theta in bank.state_dict().items()}
        try:
            with plain.quantized(
                self.plain_student, self.family, thetas, bits=BITS, group_size=GROUP_SIZE
            ):
                yield bank, QuantizationCycle(self.student, bank)
        finally:
            for name, linear in linears.items():
                self.student.set_submodule(name, linear)


def whole_share(weight: Tensor) -> GradientShare:
    """All of a weight's gradient, as a single process without an optimizer holds it."""
    assert weight.grad is not None, "a backward pass reached every quantized weight"
    return GradientShare(0, weight.grad.view(-1))
