"""What a scheduled run looks at before it works: are the data or the teacher new?

The answer is by digest, against a record that is written when a scheduled run has completed, so
that a run which failed is tried again by the next one. What was trained is not looked at here: the
stages find what is done by their fingerprints, which hold the same inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from pydantic import BaseModel, ConfigDict, ValidationError

from grace_core.artifacts import digest_folder, fingerprint
from grace_core.config.data import ShareGPT4VData
from grace_core.config.load import config_digest
from grace_core.config.models import CheckpointSource
from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.hub_transport import TransportError
from grace_core.stages.sources import (
    annotations_parent,
    pictures_parent,
    sharegpt4v_files,
    world_section,
)
from grace_core.whole_files import write_whole

RECORD = "scheduled-inputs.json"
_SHOWN = 12  # characters of a digest in messages


class TrainingInputs(BaseModel):
    """Digests of what a run learns from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    """Of the annotation files' content and the listing of the pictures; of the generator's settings
    for toy data."""
    teacher: str
    """Commit of the Hub repository, or digest of the folder's content."""


@dataclass(frozen=True)
class Comparison:
    """The inputs as they are, and as the last completed scheduled run found them."""

    now: TrainingInputs
    before: TrainingInputs | None

    @property
    def is_new(self) -> bool:
        return self.now != self.before

    def describe(self) -> str:
        """What was compared, for people; digests are shortened."""
        if self.before is None:
            return (
                f"no scheduled run has completed yet; data {self.now.data[:_SHOWN]}, teacher "
                f"{self.now.teacher[:_SHOWN]}"
            )
        return ", ".join(
            f"{name} {new[:_SHOWN]} (unchanged)"
            if new == old
            else f"{name} {new[:_SHOWN]} (was {old[:_SHOWN]})"
            for name, new, old in (
                ("data", self.now.data, self.before.data),
                ("teacher", self.now.teacher, self.before.teacher),
            )
        )


def compare_inputs(config: GraceConfig) -> Comparison:
    """Look at the data and the teacher; the Hub is asked for the teacher's newest commit.

    Raises GraceError where they cannot be found, or the record is damaged.
    """
    now = TrainingInputs(data=_data_digest(config), teacher=_teacher_digest(config.models.teacher))
    return Comparison(now, _read_record(config.run_dir / RECORD))


def record_inputs(config: GraceConfig, inputs: TrainingInputs) -> None:
    """Remember what a scheduled run that has completed started from."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(config.run_dir / RECORD, inputs.model_dump_json(indent=1) + "\n")


def _read_record(file: Path) -> TrainingInputs | None:
    if not file.exists():
        return None
    try:
        return TrainingInputs.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise GraceError(
            f"{file}, the record of the last scheduled run, is damaged; delete it, and the next "
            "scheduled run works whatever the inputs"
        ) from error


def _data_digest(config: GraceConfig) -> str:
    source = config.data.source
    if not isinstance(source, ShareGPT4VData):
        return config_digest(world_section(config))
    root, files = sharegpt4v_files(source)
    parents = {
        "annotations": annotations_parent(files),
        "pictures": pictures_parent(root, config.run_dir),
    }
    return fingerprint("inputs", {"limit": source.limit}, parents)


def _teacher_digest(source: CheckpointSource) -> str:
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        return digest_folder(folder)
    try:
        commit = HfApi().model_info(source.path, revision=source.revision).sha
    except OfflineModeIsEnabled:
        # Seconds to import, and hardly ever needed.
        from grace_core.models.loading import locate_checkpoint

        commit = locate_checkpoint(source).revision  # what such a run would take
    except (HfHubHTTPError, TransportError, OSError, ValueError) as error:
        raise GraceError(
            f"models.teacher: {source.path} is no directory here, and the Hub did not tell its "
            f"commit ({type(error).__name__}); check the name, the revision and the connection"
        ) from error
    assert commit is not None
    return commit
