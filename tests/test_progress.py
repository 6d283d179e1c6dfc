"""How far and how long yet: against estimates worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grace_core.artifacts import Parent, new_artifact
from grace_core.config import GraceConfig, load_config
from grace_core.events import Event, EventWriter
from grace_core.plan import earlier_seconds, planned_stages
from grace_core.progress import (
    RunMeter,
    StageMeter,
    clock,
    left_text,
    measured_text,
    position_text,
)
from tests.conftest import ROOT

FIT = "teacher_fit={training: {steps: 2, row_tokens: 1024, rows_per_step: 4}}"


def train(step: int, moment: float, steps: float = 100.0) -> Event:
    return Event(moment, "bf16", step, "train", {"steps": steps, "cross_entropy": 1.0})


def checkpoint(step: int, moment: float, seconds: float) -> Event:
    return Event(moment, "bf16", step, "checkpoint", {"seconds": seconds, "bytes": 5.0})


def resume(step: int, moment: float) -> Event:
    return Event(moment, "bf16", step, "resume", {"steps": 100.0})


def measured(*events: Event, since: float = 0.0) -> StageMeter:
    meter = StageMeter("bf16", since)
    for event in events:
        meter.take(event)
    return meter


def config_at(run_dir: Path, *overrides: str) -> GraceConfig:
    return load_config(ROOT / "configs" / "toy.yaml", [f"run_dir={run_dir}", *overrides])


def test_nothing_is_known_before_two_reports() -> None:
    progress = measured().progress
    assert (progress.fraction, progress.seconds_left) == (None, None)
    progress = measured(train(1, 50.0)).progress
    assert (progress.done, progress.total, progress.fraction) == (1, 100, 0.01)
    assert progress.seconds_left is None, "the first step alone holds warming up"


def test_the_median_step_passes_over_a_slow_one() -> None:
    moments = [10.0, 12.0, 14.0, 44.0, 46.0, 48.0]  # steps of 2, 2, 30, 2, 2 seconds
    events = [train(step, moment) for step, moment in enumerate(moments, start=1)]
    assert measured(*events).progress.seconds_left == pytest.approx(94 * 2.0)


def test_a_machine_that_became_slower_is_noticed() -> None:
    fast = [train(step, float(step)) for step in range(1, 51)]
    slow = [train(step, 50.0 + 3 * (step - 50)) for step in range(51, 75)]
    assert measured(*fast, *slow).progress.seconds_left == pytest.approx(26 * 3.0)


def test_checkpoints_count_with_their_share() -> None:
    """Four steps made of 2 s, one checkpoint of 8 s among them: 2 + 8/4 = 4 s a step."""
    events = [
        *(train(1, 100.0), train(2, 102.0), train(3, 104.0)),
        *(checkpoint(3, 112.0, 8.0), train(4, 114.0), train(5, 116.0)),
    ]
    assert measured(*events).progress.seconds_left == pytest.approx(95 * 4.0)


def test_a_resumed_run_counts_only_steps_made_now() -> None:
    before = [train(step, 1000.0 * step) for step in range(1, 31)]  # a slow machine
    meter = measured(*before, resume(20, 90_000.0))
    assert (meter.progress.done, meter.progress.total) == (20, 100)
    assert meter.progress.seconds_left is None
    meter.take(train(21, 90_010.0))
    assert meter.progress.seconds_left is None
    meter.take(train(22, 90_013.0))
    assert meter.progress.seconds_left == pytest.approx(78 * 3.0)


def test_events_of_an_ended_attempt_say_how_far_but_not_how_fast() -> None:
    """What is read again from the file, where the resume itself was not reported."""
    old = [train(1, 10.0), train(2, 20.0), checkpoint(2, 25.0, 5.0), train(3, 30.0)]
    meter = measured(*old, train(4, 105.0), since=100.0)
    assert (meter.progress.done, meter.progress.seconds_left) == (4, None)
    meter.take(train(5, 107.0))
    assert meter.progress.seconds_left == pytest.approx(95 * 2.0)


def test_work_that_begins_anew_is_measured_anew() -> None:
    meter = measured(train(8, 10.0), train(9, 11.0), train(1, 60.0), train(2, 65.0))
    assert meter.progress.seconds_left == pytest.approx(98 * 5.0)


def test_other_stages_report_units_of_their_own() -> None:
    def report(done: float, moment: float) -> Event:
        return Event(moment, "data", int(done), "progress", {"done": done, "total": 700.0})

    meter = measured(report(100, 10.0), report(200, 15.0), report(400, 25.0))
    assert meter.progress.fraction == pytest.approx(4 / 7)
    assert meter.progress.seconds_left == pytest.approx(300 * 0.05)


def test_the_way_to_each_goal(tmp_path: Path) -> None:
    config = config_at(tmp_path, "quantize.variants=[w4]", FIT)
    assert planned_stages(config, "data") == ["world", "data"]
    assert planned_stages(config, "distill") == ["world", "data", "teacher", "bf16"]
    assert planned_stages(config, "publish") == [
        *("benchmarks", "world", "data", "teacher", "bf16", "w4", "release-bf16", "release-w4"),
        *("evaluate-teacher", "evaluate-baseline", "evaluate-bf16", "evaluate-w4"),
        *("report", "publish"),
    ]
    recorded = config_at(tmp_path, "teacher_outputs={}", "quantize.variants=[w4]", FIT)
    assert planned_stages(recorded, "quantize") == [
        *("world", "data", "teacher", "teacher-outputs", "bf16", "w4"),
    ]
    plain = config_at(tmp_path, "data.source={kind: sharegpt4v, annotations: [a.json], root: /r}")
    assert planned_stages(plain, "distill") == ["data", "bf16"]


def test_a_run_is_at_stage_k_of_n(tmp_path: Path) -> None:
    meter = RunMeter(config_at(tmp_path), "distill", now=lambda: 0.0)  # world, data, bf16
    assert meter.progress is None
    meter.started("data")
    assert meter.progress is not None
    assert (position_text(meter.progress), meter.progress.fraction) == ("stage 2 of 3", 1 / 3)
    meter.ended("data")
    assert (meter.progress, meter.finished) == (None, ["data"])
    meter.started("bf16")
    for event in (train(24, 1.0), train(25, 2.0)):
        meter.take(event)
    assert meter.progress.fraction == pytest.approx((2 + 0.25) / 3)
    assert meter.progress.seconds_left == pytest.approx(75.0), "nothing comes after it"
    assert meter.values["cross_entropy"] == 1.0


def test_without_a_way_the_number_of_stages_is_unknown() -> None:
    meter = RunMeter()
    meter.started("w4")
    assert meter.progress is not None
    assert (meter.progress.of, meter.progress.fraction, meter.progress.seconds_left) == (None,) * 3
    assert position_text(meter.progress) == "stage 1"


def made(
    config: GraceConfig, stage: str, seconds: float, settings: dict[str, object], *, number: int
) -> str:
    """An artifact that took `seconds`; returns its folder's name."""
    name = f"{stage}-{number:012d}"
    parents = {"x": Parent(kind="checkpoint", path="x", digest=str(number))}
    folder = config.run_dir / "artifacts" / name
    with new_artifact(folder, stage, settings, parents, config.model_dump(mode="json")):
        pass
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"seconds": seconds, "created": f"2026-01-02T03:04:{number:02d}+00:00"}
    del manifest["checksum"]  # it is that of the durations before
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return name


def test_earlier_durations_count_for_the_same_work_alone(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    training = config.distill.training.model_dump(mode="json")
    assert earlier_seconds(config, "bf16") is None
    made(config, "bf16", 5.0, {"training": training | {"steps": 7}}, number=1)
    assert earlier_seconds(config, "bf16") is None, "other steps take another time"
    made(config, "bf16", 60.0, {"training": training}, number=2)
    made(config, "bf16", 80.0, {"training": training}, number=3)
    assert earlier_seconds(config, "bf16") == 80.0, "the newest"
    resumed = made(config, "bf16", 3.0, {"training": training}, number=4)
    with EventWriter(tmp_path / "work" / resumed / "metrics.jsonl") as events:
        events.write(resume(90, 1.0))
    assert earlier_seconds(config, "bf16") == 80.0, "a manifest knows its last attempt alone"
    damaged = made(config, "bf16", 4.0, {"training": training}, number=5)
    (tmp_path / "artifacts" / damaged / "manifest.json").write_text("{")
    assert earlier_seconds(config, "bf16") == 80.0, "the stage that needs it says so"
    made(config, "evaluate-w4", 11.0, {}, number=1)
    assert earlier_seconds(config, "evaluate-w4") == 11.0
    assert earlier_seconds(config_at(tmp_path, "evaluation.items=3"), "evaluate-w4") is None


def test_the_time_left_of_a_run_is_told_when_every_part_is_known(tmp_path: Path) -> None:
    config = config_at(tmp_path, "quantize.variants=[w4]")  # world, data, bf16, w4
    of_bf16 = {"training": config.distill.training.model_dump(mode="json")}
    of_w4 = {"training": config.quantize.training.model_dump(mode="json")}
    made(config, "bf16", 60.0, of_bf16, number=1)
    now = [1000.0]

    def left() -> float | None:
        meter = RunMeter(config, "quantize", now=lambda: now[0])
        meter.started("bf16")
        now[0] += 20.0  # no event yet: the rest of what it took before
        assert meter.progress is not None
        return meter.progress.seconds_left

    assert left() is None, "w4 never ran"
    made(config, "w4", 90.0, of_w4, number=1)
    assert left() == pytest.approx(40.0 + 90.0)
    meter = RunMeter(config, "quantize", now=lambda: now[0])
    meter.started("bf16")
    for event in (train(1, now[0] + 1, 10.0), train(2, now[0] + 3, 10.0)):
        meter.take(event)
    assert meter.progress is not None
    assert meter.progress.seconds_left == pytest.approx(8 * 2.0 + 90.0), "its own pace, once known"


def test_words() -> None:
    assert [clock(s) for s in (7.9, 750.0, 3723.0)] == ["0:07", "12:30", "1:02:03"]
    assert left_text(None) == "time left unknown"
    assert left_text(61.0) == "1:01 left"
    assert measured_text(train(3, 1.0)) == "step 3/100  cross_entropy 1.000"
    assert measured_text(resume(3, 1.0)) == "continuing after step 3"
    values = {"toy-choice": 4.0, "done": 4.0, "total": 9.0}
    assert measured_text(Event(1.0, "evaluate-w4", 4, "progress", values)) == (
        "44 %  toy-choice 4  done 4  total 9"
    )
