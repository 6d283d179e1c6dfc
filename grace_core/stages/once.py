"""What all stages share: doing a thing once, and saying how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_core.artifacts import (
    Artifact,
    ArtifactWriter,
    Parent,
    digest_folder,
    find_artifact,
    fingerprint,
    new_artifact,
)
from grace_core.config.model import GraceConfig
from grace_core.events import Event
from grace_core.models.loading import CheckpointFolder


def _ignore(_event: Event) -> None:
    """Events go nowhere."""


@dataclass(frozen=True)
class StageContext:
    """Where a stage reports to while it runs."""

    on_event: Callable[[Event], None] = _ignore


def stage_folder(config: GraceConfig, stage: str, key: str) -> Path:
    """Directory of the artifact that `stage` makes under the fingerprint `key`."""
    return config.run_dir / "artifacts" / f"{stage}-{key[:12]}"


def once(
    config: GraceConfig,
    stage: str,
    section: Mapping[str, Any],
    parents: Mapping[str, Parent],
    make: Callable[[ArtifactWriter], None],
) -> Artifact:
    """The stage's artifact: found, or made."""
    folder = stage_folder(config, stage, fingerprint(stage, section, parents))
    found = find_artifact(folder)
    if found is not None:
        return found
    with new_artifact(folder, stage, section, parents) as writer:
        make(writer)
    made = find_artifact(folder)
    assert made is not None
    return made


def checkpoint_parent(folder: CheckpointFolder) -> Parent:
    """A checkpoint from outside as an input of an artifact."""
    return Parent(
        kind="checkpoint",
        path=str(folder.path),
        digest=digest_folder(folder.path),
        revision=folder.revision,
    )


def progress(stage: str, step: int, values: Mapping[str, float]) -> Event:
    """What a stage without optimizer steps reports."""
    return Event(time.time(), stage, step, "progress", values)
