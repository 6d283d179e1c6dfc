"""The objective of a training, section `objective` of each training stage.

Defaults are the official GRACE script's for Qwen3-VL (paper arXiv 2601.22709, Eq. numbers in the
descriptions).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from grace_core.config.section import Float, Int, Section


class Distillation(Section):
    """The gated decoupled distillation term (Eq. 1-6) and its ablations."""

    kind: Literal["gated-decoupled", "decoupled", "plain", "none"] = Field(
        "gated-decoupled",
        description="gated-decoupled: GRACE; decoupled: DKD without the gate; plain: KL; none: off",
    )
    temperature: Float = Field(2.0, gt=0, description="softmax temperature T")
    alpha: Float = Field(1.0, ge=0, description="weight of the target-class term TCKD")
    beta_dkd: Float = Field(4.0, ge=0, description="weight of the non-target term NCKD")


class Relational(Section):
    """Relational CKA on visual tokens (Eq. 10-13)."""

    enabled: bool = True
    omega: Float = Field(3.0, ge=0, description="weight of the term once warmed up")
    warmup_steps: Int = Field(400, ge=0, description="optimizer steps of the linear warm-up")


class Controller(Section):
    """The adaptive information-bottleneck controller of beta (Eq. 18-20)."""

    kind: Literal["adaptive", "fixed"] = "adaptive"
    beta_init: Float = Field(0.5, ge=0, description="beta of the first step, or of all when fixed")
    beta_min: Float = Field(0.1, ge=0, description="least beta of the adaptive controller")
    beta_max: Float = Field(1.0, ge=0, description="greatest beta of the adaptive controller")
    tau: Float = Field(
        3.0, gt=0, description="target of the distillation loss, inside its trajectory"
    )
    eta: Float = Field(0.003, ge=0, description="step of the dual ascent")
    ema_decay: Float = Field(0.99, ge=0, lt=1, description="of the loss's running mean, a step")


class Objective(Section):
    """L = L_CE + beta * L_GDKD + omega * L_RCKA (Eq. 21)."""

    cross_entropy: bool = True
    distillation: Distillation = Distillation()
    relational: Relational = Relational()
    controller: Controller = Controller()

    @property
    def needs_teacher(self) -> bool:
        return self.distillation.kind != "none" or self.relational.enabled
