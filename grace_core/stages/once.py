"""What all stages share: doing a thing once, and saying how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_core.artifacts import (
    OUTSIDE,
    Artifact,
    ArtifactDamaged,
    ArtifactWriter,
    Parent,
    digest_folder,
    find_artifact,
    fingerprint,
    new_artifact,
    read_artifact,
    remove_partials,
    set_aside,
    verify_artifact,
    verify_sizes,
)
from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.events import Event
from grace_core.locks import sole_maker

if TYPE_CHECKING:
    from grace_core.models.loading import CheckpointFolder

_COMMANDS = {
    **dict.fromkeys(("world", "data"), "data"),
    **dict.fromkeys(("teacher", "bf16"), "distill"),
    **dict.fromkeys(("w8", "w4"), "quantize"),
    "release": "release",
    **dict.fromkeys(("benchmarks", "evaluate"), "evaluate"),
    "report": "evaluate",
    "publish": "publish",
}
"""Which command and which deployment run a stage, by the first word of its name."""


def _ignore(_event: Event) -> None:
    """Events go nowhere."""


@dataclass(frozen=True)
class StageContext:
    """Where a stage reports to while it runs, and whether it may."""

    on_event: Callable[[Event], None] = _ignore
    finished_only: bool = False
    """Stages are found, never run: one that is not done is an error."""


def stage_folder(config: GraceConfig, stage: str, key: str) -> Path:
    """Directory of the artifact that `stage` makes under the fingerprint `key`."""
    return config.run_dir / "artifacts" / f"{stage}-{key[:12]}"


def once(
    config: GraceConfig,
    context: StageContext,
    stage: str,
    section: Mapping[str, Any],
    parents: Mapping[str, Parent],
    make: Callable[[ArtifactWriter], None],
) -> Artifact:
    """The stage's artifact: found, or made.

    While another process makes it, this one waits and takes what it made. Before the work starts,
    the parents' files are compared with their manifests.

    Raises GraceError when an artifact or a parent is damaged; it is set aside by then, so that
    running again makes it anew. Raises it too when the stage is not done and `context` allows
    finished ones only.
    """
    folder = stage_folder(config, stage, fingerprint(stage, section, parents))
    with _damage_set_aside():
        found = find_artifact(folder)
        if found is None and context.finished_only:
            command = _COMMANDS[stage.split("-")[0]]
            raise GraceError(
                f"stage {stage} is not done for this configuration: there is no {folder}; run "
                f"`grace {command} CONFIG` with the same settings, or the deployment "
                f"grace-{command}/{command}, and then this again"
            )
        if found is None:
            with sole_maker(folder):
                found = find_artifact(folder)
                if found is None:
                    remove_partials(folder)
                    for parent in parents.values():
                        if parent.kind not in OUTSIDE:
                            verify_artifact(read_artifact(Path(parent.path)))
                    whole = config.model_dump(mode="json")
                    with new_artifact(folder, stage, section, parents, whole) as writer:
                        make(writer)
                    found = find_artifact(folder)
                    assert found is not None
        verify_sizes(found)
    return found


@contextmanager
def _damage_set_aside() -> Iterator[None]:
    """Whatever is found damaged loses its name, so that the next run makes it anew."""
    try:
        yield
    except ArtifactDamaged as error:
        if error.aside is not None:  # a stage within this one has seen to it
            raise
        aside = set_aside(error.folder)
        raise ArtifactDamaged(error.folder, error.problems, aside) from error


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
