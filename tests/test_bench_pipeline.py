"""What each stage of a run takes, noted while stand-ins make the artifacts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from grace_core.bench.pipeline import PipelineCosts, StageMeter
from grace_core.cli.chain import Chain
from grace_core.config import load_config
from grace_core.events import Event
from tests.stand_in_stages import STEPS, StandIns

TOY = Path("configs/toy.yaml")
REAL_SIZE = Path("configs/real-size.yaml")


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StageMeter:
    StandIns().install(monkeypatch)
    noted = StageMeter()
    Chain(load_config(TOY, [f"run_dir={tmp_path / 'run'}"]), noted).evaluations()
    return noted


def test_every_stage_is_noted_once_in_order(meter: StageMeter) -> None:
    assert [cost.stage for cost in meter.costs] == [
        *("benchmarks", "world", "data", "bf16", "w8", "w4"),
        *("release-bf16", "release-w8", "release-w4"),
        *("evaluate-teacher", "evaluate-baseline"),
        *("evaluate-bf16", "evaluate-w8", "evaluate-w4"),
    ]
    assert all(cost.seconds > 0 for cost in meter.costs)
    assert all(cost.bytes > 0 for cost in meter.costs)


def test_trainings_tell_their_steps(meter: StageMeter) -> None:
    trained = {cost.stage for cost in meter.costs if cost.steps == STEPS}
    assert trained == {"bf16", "w8", "w4"}


def training_step(seconds: float, memory: float) -> Event:
    values = {"seconds": seconds, "tokens_per_second": 900 / seconds, "loss": 1.0}
    return Event(time.time(), "bf16", 1, "train", values | {"memory_allocated_gib": memory})


def test_a_typical_step_leaves_the_first_out() -> None:
    meter = StageMeter()
    meter.started("bf16")
    for seconds, memory in ((90.0, 20.0), (2.0, 41.0), (4.0, 40.0), (3.0, 40.0)):
        meter.on_event(training_step(seconds, memory))
    (cost,) = meter.costs
    assert cost.typical_step == 3.0
    assert cost.typical_rate == 300.0
    assert cost.memory_gib == 41.0


def test_costs_are_shown_and_kept() -> None:
    meter = StageMeter()
    with meter.beside("checkpoints") as cost:
        cost.bytes = 21_800_000_000
    environment = {"cpu": "a CPU", "torch": "2.11.0", "transformers": "5.17.0"}
    costs = PipelineCosts("real-size", environment, meter.costs)
    assert "| checkpoints | 0.0 |  | 21.80 |" in costs.to_markdown()
    (stage,) = json.loads(costs.to_json())["stages"]
    assert stage["bytes"] == 21_800_000_000
    assert "real-size on a CPU" in costs.to_markdown()


def test_the_configuration_at_real_size_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_CHECKPOINTS", "/models")
    config = load_config(REAL_SIZE, [])
    assert config.models.teacher.path == "/models/teacher"
    assert config.data.min_pixels == config.data.max_pixels == 448 * 448
