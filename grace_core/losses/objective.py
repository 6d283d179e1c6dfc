"""The whole objective over one accumulation cycle (Eq. 21), normalised over the global batch.

    L = CE_sum / N  +  beta * sum_i g_i KD_i / sum_i g_i  +  omega * sum_images (1 - CKA) / M

N, sum g and M run over every row of the optimizer step on every rank. They are known before the
student's first backward pass, because the teacher goes over all rows of the cycle first: it keeps
the supervised final states, the gates and the visual relations. Each row's loss is then already
divided by the global counts, rows and ranks simply add up, and the result does not depend on how
the batch was cut.

Logits exist for a chunk of supervised tokens at a time, for both models, and only in the forward
pass (:mod:`grace_core.losses.fused_head`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from grace_core.config.objective import Objective
from grace_core.losses.controller import (
    AdaptiveController,
    BetaController,
    ControllerSettings,
    FixedBeta,
)
from grace_core.losses.fused_head import (
    SupervisedHead,
    Supervision,
    TaughtRows,
    gates_of_rows,
    supervised_head,
    supervised_loss,
)
from grace_core.losses.relational import TeacherRelation, relational_sum, teacher_relations
from grace_core.losses.truncated_teacher import TruncatedRows
from grace_core.models.families import Family
from grace_core.models.forward import RowStates, row_states
from grace_core.models.frozen_tower import TowerStates
from grace_core.models.rows import PackedRow, groups_of_rows, joined_row

# dims: N supervised tokens of a row, d width


@dataclass(frozen=True)
class Teacher:
    """The frozen teacher, wherever its weights are."""

    states: Callable[[PackedRow], RowStates]
    """A row's hidden states."""

    head: SupervisedHead

    @staticmethod
    def of(model: Any, family: Family) -> Teacher:
        """A model loaded for packed rows, whole on its device."""
        return Teacher(partial(row_states, model, family), supervised_head(model))


@dataclass(frozen=True)
class TeacherRow:
    """What the student's pass needs of the teacher for one row."""

    taught: TaughtRows | TruncatedRows
    """Its N supervised tokens; gates are ones where the gate is off."""

    relations: list[TeacherRelation]
    """One for each picture of the row; empty where the relational term is off."""

    @property
    def gates(self) -> Tensor:
        """(N,) fp32 weights of the distillation loss."""
        return self.taught.gates


@dataclass(frozen=True)
class GlobalCounts:
    """Denominators over all rows and ranks of one optimizer step.

    They stay on the device: the host would wait there for the teacher's passes, when it could
    already start the student's.
    """

    tokens: Tensor
    """Supervised ones; scalar fp64, as the others."""

    gates: Tensor
    """Their sum."""

    pictures: Tensor
    """Those that count in the relational term."""

    def stacked(self) -> Tensor:
        """(3,): tokens, gates, pictures."""
        return torch.stack([self.tokens, self.gates, self.pictures])

    @staticmethod
    def of(rows: Sequence[PackedRow], taught: Sequence[TeacherRow | None]) -> GlobalCounts:
        """Of this rank's rows alone."""
        tokens = sum(len(row.labels) for row in rows)
        assert tokens > 0, "a step supervises at least one token"
        zero = rows[0].labels.new_zeros((), dtype=torch.float64)
        teachers = [teacher for teacher in taught if teacher is not None]
        relations = [relation for teacher in teachers for relation in teacher.relations]
        gates = [teacher.gates.double().sum() for teacher in teachers]
        return GlobalCounts(
            tokens=zero + tokens,
            gates=torch.stack(gates).sum() if gates else zero,
            pictures=torch.stack([r.counts for r in relations]).sum().double()
            if relations
            else zero,
        )


@dataclass(frozen=True)
class TermWeights:
    """Factors of the row sums in the loss: the terms' weights over the global counts; fp64."""

    supervised: Tensor
    """(2,): of cross-entropy and of distillation."""

    relational: Tensor
    """Scalar."""

    @staticmethod
    def of(objective: Objective, counts: GlobalCounts, *, beta: float, omega: float) -> TermWeights:
        nothing = torch.zeros_like(counts.tokens)
        distils = objective.distillation.kind != "none"
        supervised = torch.stack(
            [
                1.0 / counts.tokens if objective.cross_entropy else nothing,
                beta / counts.gates if distils else nothing,
            ]
        )
        if not objective.relational.enabled:
            return TermWeights(supervised, nothing)
        # Where no picture counts the sum is 0 as well.
        return TermWeights(supervised, omega / counts.pictures.clamp(min=1.0))


def make_controller(objective: Objective) -> BetaController:
    """The controller of beta that the configuration asks for."""
    settings = objective.controller
    if settings.kind == "fixed":
        return FixedBeta(settings.beta_init)
    return AdaptiveController(
        ControllerSettings(
            tau=settings.tau,
            eta=settings.eta,
            beta_min=settings.beta_min,
            beta_max=settings.beta_max,
            beta_init=settings.beta_init,
            decay=settings.ema_decay,
        )
    )


def omega_at(objective: Objective, step: int) -> float:
    """Weight of the relational term at a 0-based optimizer step: linear warm-up, then constant."""
    relational = objective.relational
    if not relational.enabled:
        return 0.0
    if relational.warmup_steps == 0:
        return relational.omega
    return relational.omega * min(1.0, (step + 1) / relational.warmup_steps)


@torch.no_grad()
def teacher_rows(
    teacher: Teacher,
    objective: Objective,
    rows: Sequence[PackedRow],
    *,
    logits_bytes: int,
    row_tokens: int | None = None,
) -> list[TeacherRow]:
    """Run the frozen teacher over the rows of a step, short ones together.

    Args:
        logits_bytes: what may be held at one time in logits and copies of them.
        row_tokens: as `groups_of_rows` takes it.
    """
    taught = []
    for group in groups_of_rows(rows, row_tokens):
        states = teacher.states(joined_row(group))
        taught += _by_row(teacher.head, objective, group, states, logits_bytes)
    return taught


def _by_row(
    head: SupervisedHead,
    objective: Objective,
    rows: Sequence[PackedRow],
    states: RowStates,
    logits_bytes: int,
) -> list[TeacherRow]:
    tokens = [len(row.labels) for row in rows]
    if objective.distillation.kind == "gated-decoupled":
        gates = gates_of_rows(head, states.predicting, logits_bytes=logits_bytes).float()
    else:
        gates = torch.ones(sum(tokens), device=states.predicting.device)
    relations = teacher_relations(states.visual) if objective.relational.enabled else []
    pictures = iter(relations)
    return [
        TeacherRow(
            TaughtRows(head, of_row, gates_of_row),
            relations=list(islice(pictures, len(row.visual_spans))),
        )
        for row, of_row, gates_of_row in zip(
            rows, states.predicting.split(tokens), gates.split(tokens), strict=True
        )
    ]


def recorded_teacher_row(
    objective: Objective, rows: TruncatedRows, relations: list[TeacherRelation]
) -> TeacherRow:
    """The same from the teacher's recorded outputs.

    Args:
        rows: the row's supervised tokens.
        relations: its pictures.
    """
    if objective.distillation.kind != "gated-decoupled":
        rows = replace(rows, gates=torch.ones_like(rows.gates))
    return TeacherRow(rows, relations if objective.relational.enabled else [])


class StudentObjective(nn.Module):
    """The student together with its loss: the module that DeepSpeed trains.

    Puts a :class:`SupervisedHead` in the place of the model's head.
    """

    def __init__(
        self, model: Any, family: Family, objective: Objective, *, logits_bytes: int
    ) -> None:
        super().__init__()
        supervised_head(model)
        self.model = model
        self.family = family
        self.objective = objective
        self.logits_bytes = logits_bytes

    def forward(
        self,
        row: PackedRow,
        teacher: TeacherRow | None,
        weights: TermWeights,
        tower: TowerStates | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One row's share of the loss.

        Args:
            tower: what the frozen vision tower has made of the row's pictures before, if it has.

        Returns:
            Scalar loss (the row's sums times `weights`), and the three detached sums themselves,
            (3,) fp32: cross-entropy, gated distillation, relational.
        """
        states = row_states(self.model, self.family, row, tower)
        taught = None
        if teacher is not None and self.objective.distillation.kind != "none":
            taught = teacher.taught
        supervision = Supervision(
            labels=row.labels,
            teacher=taught,
            distillation=self.objective.distillation,
            weights=weights.supervised,
            logits_bytes=self.logits_bytes,
        )
        loss, sums = supervised_loss(self.model.lm_head, states.predicting, supervision)
        relational = torch.zeros_like(loss)
        if teacher is not None and self.objective.relational.enabled:
            total = relational_sum(teacher.relations, states.visual)
            relational = total.to(loss.device, loss.dtype)
        loss = loss + weights.relational.to(loss.dtype) * relational
        return loss, torch.cat([sums, relational.detach()[None]])
