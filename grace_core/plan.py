"""Which stages a command or a flow goes through, and how long each took when it ran before."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from grace_core.artifacts import MANIFEST, Artifact, read_artifact, stage_folders
from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.events import read_events
from grace_core.training.job import METRICS, work_folder

log = logging.getLogger(__name__)

Goal = Literal["data", "teacher", "distill", "quantize", "release", "evaluate", "publish"]
"""What is asked for; the stages before it are part of the way."""


def planned_stages(config: GraceConfig, goal: Goal) -> list[str]:
    """Names of the stages on the way to `goal`, in the order in which they run.

    Raises:
        GraceError: the configuration has nothing that the goal asks for.
    """
    world = ["world"] if config.data.source.kind == "toy" else []
    teacher = ["teacher"] if config.teacher_fit else []
    outputs = ["teacher-outputs"] if config.records_teacher else []
    if goal == "teacher" and not teacher and not outputs:
        raise GraceError(
            "the configuration has no section teacher_fit, so there is no teacher to fit, and no "
            "outputs of it to record (teacher_outputs): models.teacher is taken as it is"
        )
    students = list(config.students)
    releases = [f"release-{label}" for label in students]
    rows = [f"evaluate-{label}" for label in ("teacher", "baseline", *students)]
    ways: dict[Goal, list[str]] = {
        "data": [*world, "data"],
        "teacher": [*world, "data", *teacher, *outputs],
        "distill": [*world, "data", *teacher, *outputs, "bf16"],
        "quantize": [*world, "data", *teacher, *outputs, *students],
    }
    ways["release"] = ways["quantize"] + releases
    ways["evaluate"] = ["benchmarks", *ways["release"], *rows, "report"]
    ways["publish"] = [*ways["evaluate"], "publish"]
    return ways[goal]


def earlier_seconds(config: GraceConfig, stage: str) -> float | None:
    """Seconds that `stage` took when it last did the same amount of work in this run folder.

    None where it never did. A stage that was resumed does not count: its manifest knows of its
    last attempt alone.
    """
    found: list[tuple[str, float]] = []
    for folder in stage_folders(config.run_dir / "artifacts", stage):
        if not (folder / MANIFEST).is_file():
            continue
        try:
            artifact = read_artifact(folder)
            counts = _same_work(config, artifact) and not _was_resumed(config.run_dir, artifact)
        except GraceError as error:
            # Whoever needs the artifact or its metrics says so; an estimate goes without.
            log.info("not counted for the time left: %s", error)
            continue
        if counts and artifact.manifest.stage == stage:
            found.append((artifact.manifest.created, artifact.manifest.seconds))
    return max(found)[1] if found else None


def _same_work(config: GraceConfig, artifact: Artifact) -> bool:
    """Whether the settings that decide how long a stage takes are those of the configuration."""
    stage, recorded = artifact.manifest.stage, artifact.manifest.config
    wanted: Any
    if stage in ("bf16", "teacher", "w8", "w4"):
        section = {"bf16": config.distill, "teacher": config.teacher_fit}.get(
            stage, config.quantize
        )
        wanted = section.training.model_dump(mode="json") if section else None
        return bool(recorded.get("training") == wanted)
    if stage == "teacher-outputs":
        source = artifact.manifest.run_config.get("data", {}).get("source")
        return bool(source == config.data.source.model_dump(mode="json"))
    if stage in ("world", "data"):
        source = config.data.source.model_dump(mode="json")
        return source.items() <= (recorded if stage == "world" else recorded["source"]).items()
    if stage == "benchmarks" or stage.startswith("evaluate-"):
        names = ["benchmarks", "items", "prompt"]
        if stage != "benchmarks":
            names += ["min_pixels", "max_pixels", "max_new_tokens", "engine"]
        wanted = config.evaluation.model_dump(mode="json")
        before = artifact.manifest.run_config.get("evaluation", {})
        return all(before.get(name) == wanted[name] for name in names)
    return True


def _was_resumed(run_dir: Path, artifact: Artifact) -> bool:
    events = read_events(work_folder(run_dir, artifact.path) / METRICS)
    return any(event.kind == "resume" for event in events)
