"""The training stages: sections `distill`, `teacher_fit`, `teacher_outputs` and `quantize`.

Defaults are the official GRACE script's for Qwen3-VL.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from grace_core.config.models import CheckpointSource
from grace_core.config.objective import Distillation, Objective, Relational
from grace_core.config.section import Float, Int, PositiveInt, Rate, Section, Share


def _layers(value: Any) -> Any:
    if value in ("auto", "none", "all") or (type(value) is int and value >= 0):
        return value
    raise ValueError("should be auto, none, all, or a number of layers")


Layers = Annotated[Literal["auto", "none", "all"] | int, PlainValidator(_layers)]

Precision = Literal["w8", "w4"]

BITS: dict[Precision, int] = {"w8": 8, "w4": 4}


class Training(Section):
    """One run of the training loop."""

    steps: PositiveInt | None = Field(None, description="optimizer steps; give this or `epochs`")
    epochs: Float | None = Field(None, gt=0, description="passes over the data")
    row_tokens: PositiveInt = Field(
        8192, description="tokens; samples are packed into rows of at most so many"
    )
    rows_per_step: PositiveInt = Field(
        64, description="packed rows in one optimizer step, over all processes"
    )
    learning_rate: Rate = Field(1e-5, description="peak rate of the weights")
    scale_learning_rate: Rate = Field(
        1e-4, description="peak rate of the quantizer's log-scales theta"
    )
    weight_decay: Float = Field(1e-3, ge=0, le=1, description="of the weights; never of theta")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Adam's two decay rates")
    warmup_share: Share = Field(
        0.03, description="share of all steps, not their number: 0.03 is 3 %"
    )
    max_grad_norm: Float = Field(1.0, gt=0, description="clipping of the global gradient norm")
    zero_stage: Literal[0, 1, 2, 3] = 2
    zero3_persistence_elements: Int = Field(
        100_000, ge=0, description="elements; ZeRO-3 keeps smaller parameters whole on every rank"
    )
    data_workers: Int = Field(
        0, ge=0, description="processes a rank that decode pictures ahead; 0 decodes in the loop"
    )
    recompute: Layers = Field(
        "auto",
        description="decoder layers computed again in the backward pass instead of kept: none, "
        "all, so many, or auto: on a GPU as many as do not fit, on a CPU none",
    )
    kernels: Literal["auto", "plain"] = Field(
        "auto", description="auto: fused kernels on a GPU; plain: the library's own everywhere"
    )
    logits_mib: PositiveInt = Field(
        896,
        description="MiB that logits of student and teacher, and copies of them, may take at one "
        "time; supervised tokens are taken in chunks that fit",
    )
    checkpoint_every: PositiveInt = Field(200, description="optimizer steps")
    keep_checkpoints: PositiveInt = 2
    trainable: Literal["language", "all"] = Field(
        "language",
        description="language: decoder, embeddings, head and connector; all: the vision tower too",
    )


class TrainingStage(Section):
    """A training stage: its loop and its objective."""

    training: Training
    objective: Objective = Objective()


class TeacherFit(TrainingStage):
    """Optional first stage: the teacher is fitted to the data with cross-entropy alone."""

    objective: Objective = Objective(
        distillation=Distillation(kind="none"), relational=Relational(enabled=False)
    )


class TeacherOutputs(Section):
    """Optional stage: what the teacher says of the data, recorded once for all trainings.

    Without this section the teacher runs along in every training.
    """

    top_k: PositiveInt = Field(
        128, description="logits kept of each supervised token besides the target's"
    )
    shard_samples: PositiveInt = Field(
        1024, description="samples in one file; a stopped run makes the unfinished files again"
    )


class Quantization(TrainingStage):
    """Quantization-aware training, one run per variant, all started from the BF16 student."""

    variants: tuple[Precision, ...] = Field(("w8", "w4"), min_length=1)
    group_size: PositiveInt = Field(128, description="consecutive weights that share one scale")
    start: CheckpointSource | None = Field(
        None,
        description="quantized checkpoint, as `grace import` makes, to train on from with its "
        "scales; then no BF16 student is trained",
    )
    awq: bool = Field(
        True,
        description="release W4 as AWQ GEMM too, for runtimes that read it; an error where a scale "
        "does not fit into its fp16",
    )
