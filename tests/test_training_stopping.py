"""SIGTERM sets a flag; whether a checkpoint still fits is decided from measured time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from grace_core.training import stopping
from grace_core.training.stopping import StopSignal


@pytest.fixture
def own_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


def test_a_signal_is_noticed_and_does_not_end_the_process(own_handler: None) -> None:
    stop = StopSignal()
    stop.listen()
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


def test_nothing_fits_before_a_write_was_timed() -> None:
    assert not StopSignal().write_fits(1e9)


def test_the_write_must_fit_into_what_is_left(own_handler: None, clock: list[float]) -> None:
    stop = StopSignal()
    stop.listen()
    stop.write_seconds = 4.0
    os.kill(os.getpid(), signal.SIGTERM)
    clock[0] += 3.0  # the step in progress
    assert stop.write_fits(9.5)  # 3 + 1.5 * 4 = 9
    assert not stop.write_fits(9.0)
    os.kill(os.getpid(), signal.SIGTERM)  # a second signal does not start the grace anew
    clock[0] += 3.0
    assert not stop.write_fits(9.5)
    assert stop.write_fits(12.5)
