"""The controller of beta against trajectories worked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from grace_core.errors import GraceError
from grace_core.losses.controller import (
    AdaptiveController,
    BetaController,
    ControllerSettings,
    FixedBeta,
)


def adaptive(**changes: float) -> AdaptiveController:
    values = {"tau": 3.0, "eta": 0.003, "beta_min": 0.1, "beta_max": 1.0, "beta_init": 0.5}
    return AdaptiveController(ControllerSettings(**{**values, **changes}))


BOTH: list[Callable[[], BetaController]] = [adaptive, lambda: FixedBeta(0.5)]


def test_hand_worked_trajectory_with_clipping() -> None:
    controller = adaptive(tau=3, eta=0.1, decay=0.5)
    trajectory = []
    for gdkd in (5.0, 9.0, 3.0, 1.0, 0.0, -12.0):
        controller.update(gdkd)
        trajectory.append((controller.ema, controller.beta))
    expected = [
        (5.0, 0.7),  # EMA starts at the first value; 0.5 + 0.1 * 2
        (7.0, 1.0),  # 0.7 + 0.4 = 1.1, clipped
        (5.0, 1.0),  # 1.0 + 0.2, clipped
        (3.0, 1.0),  # on target
        (1.5, 0.85),  # from the clipped 1.0, not from what lay beyond
        (-5.25, 0.1),  # 0.85 - 0.825 = 0.025, clipped
    ]
    for (ema, beta), (expected_ema, expected_beta) in zip(trajectory, expected, strict=True):
        assert ema == pytest.approx(expected_ema, rel=1e-12)
        assert beta == pytest.approx(expected_beta, rel=1e-12)


def test_default_decay_is_that_of_the_paper() -> None:
    controller = adaptive()
    controller.update(36.0)
    assert controller.ema == 36.0
    assert controller.beta == pytest.approx(0.5 + 0.003 * 33)
    controller.update(26.0)
    assert controller.ema == pytest.approx(35.9)
    assert controller.beta == pytest.approx(0.5 + 0.003 * (33 + 32.9))


def test_constant_loss_moves_beta_linearly() -> None:
    controller = adaptive(tau=3.0, eta=0.01)
    for _ in range(20):
        controller.update(2.0)
    assert controller.beta == pytest.approx(0.5 - 20 * 0.01)


@pytest.mark.parametrize("steps_before", [0, 1, 7])
def test_resumed_run_continues_exactly(steps_before: int) -> None:
    losses = [30 * math.exp(-step / 5) + math.sin(step) for step in range(25)]
    uninterrupted = adaptive()
    for loss in losses[:steps_before]:
        uninterrupted.update(loss)
    resumed = adaptive()
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    for loss in losses[steps_before:]:
        uninterrupted.update(loss)
        resumed.update(loss)
        assert (resumed.beta, resumed.ema) == (uninterrupted.beta, uninterrupted.ema)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("gdkd", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_is_refused_and_changes_nothing(
    make: Callable[[], BetaController], gdkd: float
) -> None:
    controller = make()
    controller.update(4.0)
    before = controller.state_dict()
    with pytest.raises(GraceError, match="diverged"):
        controller.update(gdkd)
    assert controller.state_dict() == before


def test_fixed_beta_stays() -> None:
    controller = FixedBeta(0.7)
    for gdkd in (36.0, 2.0, 0.0):
        controller.update(gdkd)
    assert controller.beta == 0.7
    resumed = FixedBeta(0.7)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert resumed.beta == 0.7


def test_state_of_another_run_is_refused() -> None:
    wide = adaptive(beta_max=2.0, beta_init=1.5)
    wide.update(3.0)
    with pytest.raises(GraceError, match="outside"):
        adaptive().load_state_dict(wide.state_dict())
    with pytest.raises(GraceError, match="fixes beta"):
        FixedBeta(0.5).load_state_dict(wide.state_dict())


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    "state",
    [
        {},
        {"beta": 0.5},
        {"beta": 0.5, "ema": None, "tau": 3.0},
        {"beta": None, "ema": None},
        {"beta": math.nan, "ema": None},
        {"beta": 0.5, "ema": math.inf},
    ],
)
def test_damaged_state_is_refused(
    make: Callable[[], BetaController], state: dict[str, float | None]
) -> None:
    controller = make()
    with pytest.raises(GraceError, match="controller state"):
        controller.load_state_dict(state)
    assert controller.beta == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_init": 0.05},
        {"beta_init": 1.5},
        {"beta_min": -1.0},
        {"eta": -0.1},
        {"decay": 1.0},
        {"tau": math.nan},
    ],
)
def test_impossible_settings_fail(changes: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        adaptive(**changes)
