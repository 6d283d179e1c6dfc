"""Stage `teacher-outputs`: what decides its result, and trainings that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grace_core import stages
from grace_core.artifacts import Artifact, new_artifact, read_artifact
from grace_core.config import GraceConfig, load_config
from grace_core.errors import GraceError
from grace_core.events import Event, read_events
from grace_core.failure import Kind, failure_of
from grace_core.launch.backend import Program
from grace_core.stages import StageContext, training
from grace_core.stages.training_plan import plan_bf16, plan_teacher_outputs
from grace_core.training.job import METRICS

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "data.source.records=40",
    *(f"{part}.training.{key}" for part in ("distill", "quantize") for key in ("steps=2",)),
    "quantize.variants=[w4]",
)
RECORDED = "teacher_outputs={top_k: 511, shard_samples: 16}"


def toy(run_dir: Path, *overrides: str) -> GraceConfig:
    return load_config(ROOT / "configs/toy.yaml", [f"run_dir={run_dir}", *SMALL, *overrides])


def prepared(folder: Path, content: str = "samples") -> Artifact:
    """An artifact of the stage `data` as far as plans look at it."""
    with new_artifact(folder, "data", {}, {}) as writer:
        (writer.path / "content").write_text(content, encoding="utf-8")
    return read_artifact(folder)


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_fingerprint_is_of_all_that_decides_the_outputs(in_root: None, tmp_path: Path) -> None:
    data = prepared(tmp_path / "data-1")

    def folder(*overrides: str, data: Artifact = data) -> str:
        config = toy(tmp_path, *(overrides or (RECORDED,)))
        return plan_teacher_outputs(config, data, None).job.work.name

    same = folder()
    assert same.startswith("teacher-outputs-")
    assert folder(RECORDED, "distill.training.row_tokens=2048") == same
    assert folder(RECORDED, "seed=3", "quantize.objective.distillation.kind=none") == same
    assert folder(RECORDED, "distill.objective.relational.enabled=false") == same
    both = ("distill", "quantize")
    others = [
        folder("teacher_outputs={top_k: 510, shard_samples: 16}"),
        folder("teacher_outputs={top_k: 511, shard_samples: 17}"),
        folder(RECORDED, *(f"{part}.objective.distillation.temperature=3" for part in both)),
        folder(RECORDED, "data.max_pixels=15000"),
        folder(RECORDED, "models.teacher.path=assets/toy/student"),
        folder(data=prepared(tmp_path / "data-2", "other samples")),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_a_training_that_learns_from_outputs_has_no_teacher(in_root: None, tmp_path: Path) -> None:
    config, data = toy(tmp_path, RECORDED), prepared(tmp_path / "data-1")
    with new_artifact(tmp_path / "teacher-outputs-1", "teacher-outputs", {}, {}) as writer:
        (writer.path / "content").write_text("", encoding="utf-8")
    outputs = read_artifact(tmp_path / "teacher-outputs-1")
    plan = plan_bf16(config, data, outputs)
    assert plan.job.teacher is None and plan.job.teacher_outputs == outputs.path / "outputs"
    assert plan.parents["teacher"] == outputs.as_parent()
    online = plan_bf16(config, data, None)
    assert online.job.teacher_outputs is None and online.artifact != plan.artifact
    alone = plan_bf16(
        toy(
            tmp_path,
            "distill.objective.distillation.kind=none",
            "distill.objective.relational.enabled=false",
        ),
        data,
        outputs,
    )
    assert "teacher" not in alone.parents
    assert (alone.job.teacher, alone.job.teacher_outputs) == (None, None)


def test_where_the_teachers_weights_are_decides_no_result(in_root: None, tmp_path: Path) -> None:
    data = prepared(tmp_path / "data-1")
    for plan in (plan_bf16, plan_teacher_outputs):
        whole, sharded = (
            plan(toy(tmp_path, RECORDED, f"models.teacher_weights={weights}"), data, None)
            for weights in ("whole", "sharded")
        )
        assert (whole.job.teacher_weights, sharded.job.teacher_weights) == ("whole", "sharded")
        assert whole.job.work == sharded.job.work


def test_a_pass_that_was_told_to_stop_says_how_it_goes_on(
    in_root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped:
        def run(self, program: Program, *, on_poll: Any) -> None:
            assert program.module == "grace_core.training.teacher_worker"

    monkeypatch.setattr(training, "backend_of", lambda launch: Stopped())
    with pytest.raises(GraceError, match=r"continue from what it left in .*shards") as raised:
        data = prepared(tmp_path / "artifacts" / "data-1")
        stages.record_teacher(toy(tmp_path, RECORDED), data, None, StageContext())
    assert failure_of(raised.value, tmp_path, stage="teacher-outputs").kind is Kind.STOPPED
    assert not list((tmp_path / "artifacts").glob("teacher-outputs-*"))


@pytest.mark.slow
def test_students_learn_the_same_from_recorded_outputs(in_root: None, tmp_path: Path) -> None:
    """With all 511 logits kept, recorded outputs and the teacher itself are one to rounding."""
    config = toy(tmp_path, RECORDED)
    seen: list[Event] = []
    context = StageContext(seen.append)
    stages.generate_world(config, context)
    data = stages.prepare_data(config, context)
    seen.clear()
    outputs = stages.record_teacher(config, data, None, context)
    assert seen[-1].values == {"done": 40.0, "total": 40.0}
    assert outputs.manifest.metrics["samples"] == 40
    assert outputs.manifest.metrics["tokens"] == data.manifest.metrics["tokens"]
    assert outputs.manifest.environment["world_size"] == "2"
    assert not list((tmp_path / "work").glob("teacher-outputs-*/outputs"))

    def steps(made: Artifact) -> list[dict[str, Any]]:
        events = read_events(tmp_path / "work" / made.path.name / METRICS)
        return [dict(event.values) for event in events if event.kind == "train"]

    recorded = stages.distill(config, data, outputs, context)
    online = stages.distill(toy(tmp_path), data, None, context)
    # The first step starts from equal weights; Adam then makes steps of roundings' signs.
    for here, there, relative in zip(steps(recorded), steps(online), (2e-3, 2e-2), strict=True):
        assert here["supervised_tokens"] == there["supervised_tokens"]
        for name in ("cross_entropy", "distillation", "relational"):
            assert here[name] == pytest.approx(there[name], rel=relative), name
    assert steps(recorded)[0]["cross_entropy"] == steps(online)[0]["cross_entropy"]
    w4 = stages.quantize(config, "w4", data, outputs, recorded, context)
    assert w4.manifest.parents["teacher"] == outputs.as_parent()
    assert len(list((tmp_path / "artifacts").glob("teacher-outputs-*"))) == 1
    assert stages.record_teacher(config, data, None, StageContext(finished_only=True)) == outputs
