"""What this machine says about a configuration: its checkpoints, data, GPUs and accounts.

Reads small text files and the headers of weight files, and asks no network. What cannot run
anywhere is an error; what is merely not here is a warning.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_core.config.model import (
    CheckpointSource,
    GraceConfig,
    HubDestination,
    ShareGPT4VData,
    TrainingStage,
)
from grace_core.errors import ConfigError

_GPUS = Path("/proc/driver/nvidia/gpus")  # one folder a GPU, where NVIDIA's driver is loaded
_MAX_HEADER = 100_000_000  # bytes; the format's own bound


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as far as its small files tell; None where they are not here."""

    source: CheckpointSource
    folder: Path | None
    config: dict[str, Any]
    processor: dict[str, Any]
    parameters: int | None

    def of_text(self, name: str) -> Any:
        """A value of the language decoder's configuration."""
        return self.config.get("text_config", self.config).get(name)

    @property
    def pixels_per_token(self) -> int | None:
        """Pixels behind one merged visual token."""
        patch, merge = self.processor.get("patch_size"), self.processor.get("merge_size")
        return (patch * merge) ** 2 if isinstance(patch, int) and isinstance(merge, int) else None


@dataclass(frozen=True)
class Findings:
    """Both checkpoints, and what a user should know before starting."""

    teacher: Checkpoint
    student: Checkpoint
    warnings: list[str]


def check_machine(config: GraceConfig, source: str) -> Findings:
    """Look at everything that `config` names.

    Raises ConfigError, for the file `source`, listing what cannot run anywhere.
    """
    problems: list[str] = []
    found = {}
    for role in ("teacher", "student"):
        checkpoint: CheckpointSource = getattr(config.models, role)
        folder = _folder(checkpoint)
        if folder is None and not _may_be_on_hub(checkpoint.path):
            problems.append(
                f"models.{role}.path: no folder {checkpoint.path} here ({Path.cwd()}), and that is "
                "no Hub repository `owner/name`; mend the path, or run in the folder it starts from"
            )
        found[role] = _read(checkpoint, folder, f"models.{role}.path", problems)
    teacher, student = found["teacher"], found["student"]
    problems += _misfits(config, teacher, student)
    if problems:
        raise ConfigError(source, problems)
    return Findings(teacher, student, [*_warnings(config, teacher, student)])


def _may_be_on_hub(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith(("/", ".", "~"))


def _folder(source: CheckpointSource) -> Path | None:
    """Where a checkpoint lies on this machine, the Hub's cache included."""
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        return folder
    if not _may_be_on_hub(source.path):
        return None
    from huggingface_hub import try_to_load_from_cache  # slow to import

    file = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
    return Path(file).parent if isinstance(file, str) else None


def _read(
    source: CheckpointSource, folder: Path | None, key: str, problems: list[str]
) -> Checkpoint:
    if folder is None:
        return Checkpoint(source, None, {}, {}, None)
    weights = sorted(folder.glob("*.safetensors"))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        processor_file = folder / "preprocessor_config.json"
        processor = (
            json.loads(processor_file.read_text(encoding="utf-8"))
            if processor_file.is_file()
            else {}
        )
        parameters = sum(map(_count_parameters, weights)) if weights else None
    except (OSError, ValueError, struct.error) as error:
        problems.append(f"{key}: {folder} is no readable Hugging Face checkpoint: {error}")
        return Checkpoint(source, folder, {}, {}, None)
    if not weights and Path(source.path).expanduser().is_dir():
        problems.append(f"{key}: {folder} holds no *.safetensors; only safetensors are read")
    return Checkpoint(source, folder, config, processor, parameters)


def _count_parameters(file: Path) -> int:
    """Number of values in a safetensors file, from its header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MAX_HEADER:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(length))
    return sum(
        math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
    )


def _misfits(config: GraceConfig, teacher: Checkpoint, student: Checkpoint) -> Iterator[str]:
    """What no machine can run."""
    sizes = teacher.of_text("vocab_size"), student.of_text("vocab_size")
    if None not in sizes and sizes[0] != sizes[1]:
        yield (
            f"models: the teacher's vocabulary has {sizes[0]} entries, the student's {sizes[1]}; "
            "distillation compares them one by one, choose two models of one vocabulary"
        )
    group = config.quantize.group_size
    widths = {name: student.of_text(name) for name in ("hidden_size", "intermediate_size")}
    bad = [f"{name} {width}" for name, width in widths.items() if width and width % group]
    if bad:
        yield (
            f"quantize.group_size ({group}) does not divide the student's {' and '.join(bad)}; "
            "choose one that does, or another student"
        )
    area = student.pixels_per_token
    if area is not None and config.data.min_pixels // area >= config.data.max_tokens:
        yield (
            f"data.min_pixels ({config.data.min_pixels}) makes at least "
            f"{config.data.min_pixels // area} tokens of every picture, which is all of "
            f"data.max_tokens ({config.data.max_tokens}) or more; lower the one or raise the other"
        )


def _warnings(config: GraceConfig, teacher: Checkpoint, student: Checkpoint) -> Iterator[str]:
    for role, checkpoint in (("teacher", teacher), ("student", student)):
        source = checkpoint.source
        if checkpoint.folder is None:
            yield f"models.{role}: {source.path} is not on this machine; a run downloads it"
        if source.revision is None and not Path(source.path).expanduser().is_dir():
            yield f"models.{role}: pin `revision` to a commit, so that the run can be repeated"
    yield from _missing_data(config)
    yield from _processors(config)
    area = student.pixels_per_token
    if area is not None and config.data.max_pixels // area >= config.data.max_tokens:
        yield (
            f"data.max_pixels: a picture of {config.data.max_pixels} pixels makes "
            f"{config.data.max_pixels // area} tokens; with data.max_tokens "
            f"{config.data.max_tokens} its record goes to quarantine"
        )
    for name, stage in training_stages(config).items():
        yield from _slow_warmup(name, stage)
    destination = config.publish.destination
    if isinstance(destination, HubDestination) and config.publish.enabled:
        if not os.environ.get("HF_TOKEN"):
            yield "publish.destination: HF_TOKEN is not set; publishing to the Hub needs it"


def training_stages(config: GraceConfig) -> dict[str, TrainingStage]:
    """The training stages' sections by artifact stage, in their order."""
    stages: dict[str, TrainingStage] = {}
    if config.teacher_fit is not None:
        stages["teacher"] = config.teacher_fit
    stages["bf16"] = config.distill
    return stages | {name: config.quantize for name in config.quantize.variants}


def _missing_data(config: GraceConfig) -> Iterator[str]:
    source = config.data.source
    if not isinstance(source, ShareGPT4VData):
        return
    root = Path(source.root).expanduser()
    files = [root / name for name in source.annotations]
    missing = [str(path) for path in (root, *files) if not path.exists()]
    if missing:
        shown = missing[0] if not root.exists() else ", ".join(missing)
        yield f"data.source: not on this machine: {shown}; set data.source.root or GRACE_DATA_ROOT"


def _processors(config: GraceConfig) -> Iterator[str]:
    launch = config.launch
    gpus = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
    if launch.device == "cuda" and not gpus:
        yield "launch.device: no NVIDIA GPU on this machine; a run needs one"
    if launch.device != "cpu" and 0 < gpus < launch.processes:
        yield f"launch.processes: {launch.processes} processes, but {gpus} GPUs on this machine"
    cores = len(os.sched_getaffinity(0))
    threads = launch.processes * launch.threads_per_process
    on_cpu = launch.device == "cpu" or (launch.device == "auto" and not gpus)
    if threads > cores and on_cpu:
        yield f"launch: {threads} threads in all, but {cores} CPU cores on this machine"


def _slow_warmup(name: str, stage: TrainingStage) -> Iterator[str]:
    relational, steps = stage.objective.relational, stage.training.steps
    if relational.enabled and steps is not None and relational.warmup_steps >= steps:
        yield (
            f"{name}: relational.warmup_steps ({relational.warmup_steps}) is not over within "
            f"{steps} steps; omega never reaches {relational.omega:g}"
        )
