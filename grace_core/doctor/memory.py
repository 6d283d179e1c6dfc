"""How much memory a training needs, by the headers of the checkpoints' files.

The arithmetic is :mod:`grace_core.training.memory`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

from grace_core.config.training import Training, TrainingStage
from grace_core.config.tree import GraceConfig
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.models.families import FAMILIES
from grace_core.training.memory import (
    BF16,
    TEACHER,
    Decoder,
    FrozenTeacher,
    Memory,
    Trained,
    recording_memory,
    training_memory,
)

_PIXEL_BYTES = 12  # three channels of fp32
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
)


@dataclass(frozen=True)
class Need:
    """What one process of a training holds."""

    stage: str
    memory: Memory
    teacher: float
    """Bytes of the frozen teacher, part of what is held."""

    @property
    def state(self) -> float:
        """Weights, gradients, the optimizer's state and a step's rows."""
        return self.memory.state - self.teacher

    @property
    def total(self) -> float:
        return self.memory.peak


def training_stages(config: GraceConfig) -> dict[str, TrainingStage]:
    """The training stages' sections by artifact stage, in their order."""
    stages: dict[str, TrainingStage] = {}
    if config.teacher_fit is not None:
        stages["teacher"] = config.teacher_fit
    if "bf16" in config.students:
        stages["bf16"] = config.distill
    return stages | {name: config.quantize for name in config.quantize.variants}


def trained_checkpoint(stage: str, teacher: Checkpoint, student: Checkpoint) -> Checkpoint:
    return teacher if stage == "teacher" else student


def needs(
    config: GraceConfig,
    teacher: Checkpoint,
    student: Checkpoint,
    *,
    zero_stage: int | None = None,
    recomputed: int | None = None,
) -> list[Need] | None:
    """One need a training stage, and one of the stage in which the teacher's outputs are recorded:
    it holds weights alone, and the students' trainings then have no teacher. None where a model's
    size is not known.

    Args:
        zero_stage, recomputed: instead of the configured ones.
    """
    found = []
    taught = _frozen_teacher(config, teacher)
    if config.records_teacher:
        if taught is None:
            return None
        memory = recording_memory(taught)
        found.append(Need("teacher-outputs", memory, memory.held[TEACHER]))
    for stage, section in training_stages(config).items():
        own = trained_checkpoint(stage, teacher, student)
        along = section.objective.needs_teacher and not config.records_teacher
        quantized = stage in config.quantize.variants
        model = trained_model(
            own, section.training, group_size=config.quantize.group_size if quantized else None
        )
        if model is None or (along and taught is None):
            return None
        training = section.training
        if zero_stage is not None:
            training = training.model_copy(update={"zero_stage": zero_stage})
        memory = training_memory(
            model,
            training,
            processes=config.launch.world_size,
            teacher=taught if along else None,
            row_bytes=_row_bytes(own, teacher if along else None),
            recomputed=recomputed,
            on_gpu=config.launch.device != "cpu",
        )
        found.append(Need(stage, memory, memory.held[TEACHER]))
    return found


def _frozen_teacher(config: GraceConfig, checkpoint: Checkpoint) -> FrozenTeacher | None:
    """None where its number of weights is not known."""
    if checkpoint.parameters is None:
        return None
    sizes = [checkpoint.of_text(name) for name in ("vocab_size", "hidden_size")]
    sharded = config.models.teacher_weights == "sharded"
    return FrozenTeacher(
        weights=checkpoint.parameters,
        head=math.prod(size or 0 for size in sizes),
        shards=config.launch.world_size if sharded else 1,
    )


def trained_model(
    checkpoint: Checkpoint, training: Training, *, group_size: int | None
) -> Trained | None:
    """Sizes of the model that is trained; None where nothing tells its number of weights.

    Where only that number is known, everything counts as trained, and passes are not counted.

    group_size: of quantized training; None without.
    """
    weights = checkpoint.parameters
    if weights is None:
        return None
    trained = checkpoint.trained_shapes(training.trainable)
    sizes = list(map(math.prod, trained.values())) or [weights]
    return Trained(
        weights=weights,
        trained=sum(sizes),
        largest=max(sizes) if trained else 0,
        quantized=checkpoint.quantized_weights() if group_size else 0,
        group_size=group_size or 1,
        decoder=_decoder(checkpoint, training) if trained else None,
    )


def _decoder(checkpoint: Checkpoint, training: Training) -> Decoder | None:
    text = {name: checkpoint.of_text(name) for name in (*_REQUIRED, "head_dim")}
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    if family is None or any(text[name] is None for name in _REQUIRED):
        return None
    return Decoder.of(SimpleNamespace(**text), family, fused=training.kernels == "auto")


def _row_bytes(trained: Checkpoint, teacher: Checkpoint | None) -> int:
    """Of a token: it is a picture's or supervised, never both."""
    frames = trained.processor.get("temporal_patch_size", 1)  # a picture is repeated so often
    pixels = (trained.pixels_per_token or 0) * _PIXEL_BYTES * int(frames)
    width = (teacher.of_text("hidden_size") if teacher is not None else None) or 0
    return max(pixels, BF16 * width)


def in_units(size: float) -> str:
    """Bytes for people: 1 GB is 10^9 bytes."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"
