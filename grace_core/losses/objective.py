"""The whole objective over one accumulation cycle (Eq. 21), normalised over the global batch.

    L = CE_sum / N  +  beta * sum_i g_i KD_i / sum_i g_i  +  omega * sum_images (1 - CKA) / M

N, sum g and M run over every row of the optimizer step on every rank. They are known before the
student's first backward pass, because the teacher goes over all rows of the cycle first: it keeps
the supervised final states, the gates and the visual relations. Each row's loss is then already
divided by the global counts, rows and ranks simply add up, and the result does not depend on how
the batch was cut.

Logits exist for a chunk of supervised tokens at a time, for both models; they are recomputed in
the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grace_core.config.model import Distillation, Objective
from grace_core.losses.controller import (
    AdaptiveController,
    BetaController,
    ControllerSettings,
    FixedBeta,
)
from grace_core.losses.cross_entropy import cross_entropy_sum
from grace_core.losses.distillation import decoupled_kd, kullback_leibler
from grace_core.losses.gate import confidence_gate
from grace_core.losses.relational import TeacherRelation, relational_sum, teacher_relation
from grace_core.models.families import Family
from grace_core.models.forward import row_states
from grace_core.models.rows import PackedRow

# dims: N supervised tokens of a row, V vocabulary, d width


@dataclass(frozen=True)
class TeacherRow:
    """What the student's pass needs of the teacher for one row."""

    states: Tensor
    """(N, d_T) final states that predict the supervised tokens."""

    gates: Tensor
    """(N,) fp32 weights of the distillation loss; ones where the gate is off."""

    relations: list[TeacherRelation]
    """One for each picture of the row; empty where the relational term is off."""

    head: Callable[[Tensor], Tensor]
    """The teacher's language-model head: (n, d_T) -> (n, V)."""


@dataclass(frozen=True)
class GlobalCounts:
    """Denominators over all rows and ranks of one optimizer step."""

    tokens: float
    gates: float
    pictures: float

    def __post_init__(self) -> None:
        assert self.tokens > 0, "a step supervises at least one token"


@dataclass(frozen=True)
class TermWeights:
    """Factors of the row sums in the loss: the terms' weights over the global counts."""

    cross_entropy: float
    distillation: float
    relational: float

    @staticmethod
    def of(objective: Objective, counts: GlobalCounts, *, beta: float, omega: float) -> TermWeights:
        distils = objective.distillation.kind != "none"
        relates = objective.relational.enabled and counts.pictures > 0
        return TermWeights(
            cross_entropy=1.0 / counts.tokens if objective.cross_entropy else 0.0,
            distillation=beta / counts.gates if distils else 0.0,
            relational=omega / counts.pictures if relates else 0.0,
        )


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
def teacher_row(
    model: Any, family: Family, objective: Objective, row: PackedRow, *, chunk_tokens: int
) -> TeacherRow:
    """Run the frozen teacher over one row."""
    states = row_states(model, family, row)
    if objective.distillation.kind == "gated-decoupled":
        gates = torch.cat(
            [
                confidence_gate(model.lm_head(chunk))
                for chunk in states.predicting.split(chunk_tokens)
            ]
        )
    else:
        gates = torch.ones(len(row.labels), device=row.labels.device)
    relations = []
    if objective.relational.enabled:
        relations = [teacher_relation(states_of_one) for states_of_one in states.visual]
    return TeacherRow(states.predicting, gates.float(), relations, model.lm_head)


class StudentObjective(nn.Module):
    """The student together with its loss: the module that DeepSpeed trains."""

    def __init__(
        self, model: Any, family: Family, objective: Objective, *, chunk_tokens: int
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.objective = objective
        self.chunk_tokens = chunk_tokens

    def forward(
        self, row: PackedRow, teacher: TeacherRow | None, weights: TermWeights
    ) -> tuple[Tensor, Tensor]:
        """One row's share of the loss.

        Returns:
            Scalar loss (the row's sums times `weights`), and the three detached sums themselves,
            (3,) fp32: cross-entropy, gated distillation, relational.
        """
        states = row_states(self.model, self.family, row)
        cross_entropy = distillation = states.predicting.new_zeros((), dtype=torch.float32)
        for start in range(0, len(row.labels), self.chunk_tokens):
            part = slice(start, start + self.chunk_tokens)
            ce, kd = self._chunk(states.predicting[part], row.labels[part], teacher, part)
            cross_entropy = cross_entropy + ce
            distillation = distillation + kd
        relational = torch.zeros_like(cross_entropy)
        if teacher is not None and self.objective.relational.enabled:
            total, _ = relational_sum(teacher.relations, states.visual)
            relational = total.to(cross_entropy.device, torch.float32)
        loss = (
            weights.cross_entropy * cross_entropy
            + weights.distillation * distillation
            + weights.relational * relational
        )
        return loss, torch.stack([cross_entropy, distillation, relational]).detach()

    def _chunk(
        self, states: Tensor, labels: Tensor, teacher: TeacherRow | None, part: slice
    ) -> tuple[Tensor, Tensor]:
        # Under ZeRO-3 a parameter has no elements outside its module's passes, which the
        # checkpoint's own shape check would take for a difference.
        return checkpoint(
            self._chunk_sums,
            states,
            labels,
            teacher,
            part,
            use_reentrant=False,
            determinism_check="none",
            preserve_rng_state=False,
        )

    def _chunk_sums(
        self, states: Tensor, labels: Tensor, teacher: TeacherRow | None, part: slice
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and gated distillation summed over a chunk of supervised tokens."""
        logits = self.model.lm_head(states)
        cross_entropy = cross_entropy_sum(logits, labels)
        if teacher is None or self.objective.distillation.kind == "none":
            return cross_entropy, torch.zeros_like(cross_entropy)
        with torch.no_grad():
            teacher_logits = teacher.head(teacher.states[part])
        per_token = _distillation(self.objective.distillation, logits, teacher_logits, labels)
        return cross_entropy, (teacher.gates[part] * per_token).sum()


def _distillation(
    settings: Distillation, logits: Tensor, teacher_logits: Tensor, labels: Tensor
) -> Tensor:
    """(N,) distillation loss of each token, before the gate."""
    if settings.kind == "plain":
        return kullback_leibler(logits, teacher_logits, temperature=settings.temperature)
    return decoupled_kd(
        logits,
        teacher_logits,
        labels,
        temperature=settings.temperature,
        alpha=settings.alpha,
        beta=settings.beta_dkd,
    ).total_N
