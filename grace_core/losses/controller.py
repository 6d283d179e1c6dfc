"""The weight beta of L_GDKD, set once per optimizer step (Eq. 18-20).

The information-bottleneck constraint L_GDKD <= tau is enforced by its multiplier beta: while the
student is further from the teacher than tau, beta grows, and it shrinks when closer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from grace_core.errors import GraceError

State = dict[str, float | None]
"""JSON-able; floats survive JSON exactly."""


class BetaController(Protocol):
    """What the training loop needs of a controller."""

    @property
    def beta(self) -> float:
        """Weight of L_GDKD in the coming step."""

    @property
    def ema(self) -> float | None:
        """Running mean of L_GDKD, where the controller keeps one."""

    def update(self, gdkd: float) -> None:
        """Take in the step's L_GDKD, normalised over the whole global batch.

        Raises:
            GraceError: `gdkd` is not finite; the state is left as it was.
        """

    def state_dict(self) -> State:
        """All that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Continue from `state_dict()`.

        Raises:
            GraceError: the state does not belong to this controller.
        """


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """Constants of Eq. 18-20."""

    tau: float
    """Target of L_GDKD, in its units (nats times T^2); should sit inside its trajectory."""
    eta: float
    """Step size of the ascent, per optimizer step, >= 0."""
    beta_min: float
    beta_max: float
    beta_init: float
    """In [beta_min, beta_max]."""
    decay: float = 0.99
    """Of the running mean, in [0, 1)."""

    def __post_init__(self) -> None:
        assert all(map(math.isfinite, vars(self).values())), self
        assert 0 <= self.beta_min <= self.beta_init <= self.beta_max, self
        assert self.eta >= 0, self
        assert 0 <= self.decay < 1, self


class AdaptiveController:
    """Projected dual ascent on a running mean of L_GDKD.

    EMA <- decay * EMA + (1 - decay) * L_GDKD             (Eq. 18; starts at the first value)
    beta <- clip(beta + eta * (EMA - tau), beta_min, beta_max)                  (Eq. 19-20)

    Plain Python floats, so that every rank computes the same beta from the same all-reduced loss.
    """

    def __init__(self, settings: ControllerSettings) -> None:
        self.settings = settings
        self.beta = settings.beta_init
        self.ema: float | None = None

    def update(self, gdkd: float) -> None:
        _require_finite(gdkd)
        s = self.settings
        self.ema = gdkd if self.ema is None else s.decay * self.ema + (1 - s.decay) * gdkd
        ascended = self.beta + s.eta * (self.ema - s.tau)
        self.beta = min(max(ascended, s.beta_min), s.beta_max)

    def state_dict(self) -> State:
        return {"beta": self.beta, "ema": self.ema}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        beta, ema = _read(state)
        s = self.settings
        if not s.beta_min <= beta <= s.beta_max:
            raise GraceError(
                f"controller state: beta {beta} lies outside [{s.beta_min}, {s.beta_max}]; resume "
                "with the beta_min and beta_max of the run that wrote the checkpoint"
            )
        self.beta, self.ema = beta, ema


class FixedBeta:
    """Constant beta, for the ablation without controller."""

    ema = None

    def __init__(self, beta: float) -> None:
        assert math.isfinite(beta) and beta >= 0, beta
        self.beta = beta

    def update(self, gdkd: float) -> None:
        _require_finite(gdkd)

    def state_dict(self) -> State:
        return {"beta": self.beta, "ema": None}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        beta, ema = _read(state)
        if beta != self.beta or ema is not None:
            raise GraceError(
                f"controller state: it is (beta {beta}, EMA {ema}), but this run fixes beta at "
                f"{self.beta}; resume with the settings of the run that wrote the checkpoint"
            )


def _require_finite(gdkd: float) -> None:
    if not math.isfinite(gdkd):
        raise GraceError(
            f"L_GDKD of this step is {gdkd}: training has diverged or a model's logits are not "
            "finite; resume from the last checkpoint with a lower learning rate"
        )


def _read(state: Mapping[str, float | None]) -> tuple[float, float | None]:
    if set(state) != {"beta", "ema"}:
        raise GraceError(
            f"controller state: expected beta and ema, found {sorted(state)}; the checkpoint is "
            "damaged or not of this version, take another one"
        )
    beta, ema = state["beta"], state["ema"]
    if beta is None or not math.isfinite(beta) or (ema is not None and not math.isfinite(ema)):
        raise GraceError(
            f"controller state: beta {beta} and EMA {ema} must be finite; the checkpoint is "
            "damaged, take an earlier one"
        )
    return beta, ema
