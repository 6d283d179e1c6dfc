"""The configuration tree of a run.

Every section is frozen and refuses unknown keys, so a typing error fails instead of leaving a
default in place. Every default is written once, here. A stage receives its own sections and never
the whole tree. Hyper-parameter defaults are the official GRACE script's for Qwen3-VL (paper
arXiv 2601.22709, Eq. numbers in the descriptions).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["w8", "w4"]
BenchmarkName = Literal["toy-choice", "toy-yesno"]

BITS: dict[Precision, int] = {"w8": 8, "w4": 4}


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent type coercion of strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CheckpointSource(Section):
    """A Hugging Face checkpoint: a directory on this machine or a repository of the Hub."""

    path: str = Field(
        description="Directory (relative to the project root, or absolute) or Hub repository "
        "`owner/name`."
    )
    revision: str | None = Field(
        None, description="Commit of the Hub repository; pin it for a run that can be repeated."
    )


class Models(Section):
    """Teacher and student. Both must share one vocabulary and one model family's tokenizer."""

    teacher: CheckpointSource
    student: CheckpointSource


class ToyData(Section):
    """Generated pictures of shapes with conversations, in ShareGPT4V's schema."""

    kind: Literal["toy"] = "toy"
    records: PositiveInt = Field(2400, description="training records to generate")
    wrong_answer_share: Fraction = Field(
        0.1, description="share of training answers that are wrong, as in machine-made annotations"
    )


class ShareGPT4VData(Section):
    """ShareGPT4V annotation files (JSON array or JSON Lines) and the root of their pictures."""

    kind: Literal["sharegpt4v"] = "sharegpt4v"
    annotations: tuple[str, ...] = Field(
        min_length=1,
        description="annotation files, relative to `root` or absolute; read in this order",
    )
    root: str = Field(
        description="folder below which every picture must lie; `${GRACE_DATA_ROOT}` is expanded"
    )
    limit: PositiveInt | None = Field(None, description="use the first so many records only")


class Data(Section):
    """Where the records come from and how they become tokens."""

    source: Annotated[ToyData | ShareGPT4VData, Field(discriminator="kind")]
    max_tokens: PositiveInt = Field(
        8192, description="tokens; a longer record is quarantined, never cut"
    )
    min_pixels: PositiveInt = Field(784, description="pixels; smaller pictures are enlarged")
    max_pixels: PositiveInt = Field(200_704, description="pixels; larger pictures are reduced")
    max_decoded_pixels: PositiveInt = Field(
        100_000_000, description="pixels; a picture file that decodes to more is quarantined"
    )
    held_out_share: Fraction = Field(
        0.0, description="share of records kept from training, for the held-out loss"
    )

    @model_validator(mode="after")
    def _pixels_in_order(self) -> Data:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels ({self.min_pixels}) is above max_pixels ({self.max_pixels}); "
                "exchange them"
            )
        return self


class Distillation(Section):
    """The gated decoupled distillation term (Eq. 1-6) and its ablations."""

    kind: Literal["gated-decoupled", "decoupled", "plain", "none"] = Field(
        "gated-decoupled",
        description="gated-decoupled: GRACE; decoupled: DKD without the gate; plain: KL; none: off",
    )
    temperature: float = Field(2.0, gt=0, description="softmax temperature T")
    alpha: float = Field(1.0, ge=0, description="weight of the target-class term TCKD")
    beta_dkd: float = Field(4.0, ge=0, description="weight of the non-target term NCKD")


class Relational(Section):
    """Relational CKA on visual tokens (Eq. 10-13)."""

    enabled: bool = True
    omega: float = Field(3.0, ge=0, description="weight of the term once warmed up")
    warmup_steps: int = Field(400, ge=0, description="optimizer steps of the linear warm-up")


class Controller(Section):
    """The adaptive information-bottleneck controller of beta (Eq. 18-20)."""

    kind: Literal["adaptive", "fixed"] = "adaptive"
    beta_init: float = Field(0.5, ge=0, description="beta of the first step, or of all when fixed")
    beta_min: float = Field(0.1, ge=0)
    beta_max: float = Field(1.0, ge=0)
    tau: float = Field(3.0, description="target of the distillation loss, inside its trajectory")
    eta: float = Field(0.003, ge=0, description="step of the dual ascent")
    ema_decay: float = Field(0.99, ge=0, lt=1)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Controller:
        if not self.beta_min <= self.beta_init <= self.beta_max:
            raise ValueError(
                f"beta_init ({self.beta_init}) must lie in [beta_min, beta_max] = "
                f"[{self.beta_min}, {self.beta_max}]"
            )
        return self


class Objective(Section):
    """L = L_CE + beta * L_GDKD + omega * L_RCKA (Eq. 21)."""

    cross_entropy: bool = True
    distillation: Distillation = Distillation()
    relational: Relational = Relational()
    controller: Controller = Controller()

    @property
    def needs_teacher(self) -> bool:
        return self.distillation.kind != "none" or self.relational.enabled

    @model_validator(mode="after")
    def _something_to_minimise(self) -> Objective:
        if not self.cross_entropy and not self.needs_teacher:
            raise ValueError("every term is switched off; leave at least one on")
        return self


class Training(Section):
    """One run of the training loop."""

    steps: PositiveInt | None = Field(None, description="optimizer steps; give this or `epochs`")
    epochs: float | None = Field(None, gt=0, description="passes over the data")
    row_tokens: PositiveInt = Field(
        8192, description="tokens; samples are packed into rows of at most so many"
    )
    rows_per_step: PositiveInt = Field(
        64, description="packed rows in one optimizer step, over all processes"
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak rate of the weights")
    scale_learning_rate: float = Field(
        1e-4, gt=0, description="peak rate of the quantizer's log-scales theta"
    )
    weight_decay: float = Field(1e-3, ge=0, description="of the weights; never of theta")
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_share: Fraction = Field(0.03, description="share of all steps")
    max_grad_norm: float = Field(1.0, gt=0, description="clipping of the global gradient norm")
    zero_stage: Literal[0, 1, 2, 3] = 2
    zero3_persistence_elements: int = Field(
        100_000, ge=0, description="elements; ZeRO-3 keeps smaller parameters whole on every rank"
    )
    data_workers: int = Field(
        0, ge=0, description="processes a rank that decode pictures ahead; 0 decodes in the loop"
    )
    gradient_checkpointing: bool = True
    logits_chunk_tokens: PositiveInt = Field(
        1024, description="supervised tokens whose logits exist at one time"
    )
    checkpoint_every: PositiveInt = Field(200, description="optimizer steps")
    keep_checkpoints: PositiveInt = 2
    trainable: Literal["language", "all"] = Field(
        "language",
        description="language: decoder, embeddings, head and connector; all: the vision tower too",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        return self


class TrainingStage(Section):
    """A training stage: its loop and its objective."""

    training: Training
    objective: Objective = Objective()


class TeacherFit(TrainingStage):
    """Optional first stage: the teacher is fitted to the data with cross-entropy alone."""

    objective: Objective = Objective(
        distillation=Distillation(kind="none"), relational=Relational(enabled=False)
    )

    @model_validator(mode="after")
    def _no_teacher_of_its_own(self) -> TeacherFit:
        if self.objective.needs_teacher:
            raise ValueError(
                "objective: the teacher has no teacher; set distillation.kind: none and "
                "relational.enabled: false"
            )
        return self


class Quantization(TrainingStage):
    """Quantization-aware training, one run per variant, all started from the BF16 student."""

    variants: tuple[Precision, ...] = Field(("w8", "w4"), min_length=1)
    group_size: PositiveInt = Field(128, description="consecutive weights that share one scale")

    @model_validator(mode="after")
    def _variants_once(self) -> Quantization:
        if len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants {list(self.variants)} names one twice; name each once")
        return self


class Launch(Section):
    """How a training stage's processes are started."""

    processes: PositiveInt = Field(1, description="processes (one a GPU) on this machine")
    threads_per_process: PositiveInt = Field(1, description="CPU threads of each process")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_hours: float | None = Field(None, gt=0, description="hours; None waits for ever")
    grace_seconds: float = Field(
        20.0,
        gt=0,
        lt=30,
        description="seconds between SIGTERM and SIGKILL; Prefect itself kills after 30",
    )


class Evaluation(Section):
    """Benchmarks every model of the results table is scored on."""

    benchmarks: tuple[BenchmarkName, ...] = ("toy-choice", "toy-yesno")
    items: PositiveInt | None = Field(None, description="first so many items a benchmark; all")
    batch_size: PositiveInt = Field(32, description="questions answered at once")
    max_new_tokens: PositiveInt = Field(8, description="tokens of an answer")

    @model_validator(mode="after")
    def _benchmarks_once(self) -> Evaluation:
        if len(set(self.benchmarks)) != len(self.benchmarks):
            raise ValueError("benchmarks names one twice; name each once")
        return self


class DirectoryDestination(Section):
    kind: Literal["directory"] = "directory"
    path: str = Field("releases", description="folder, relative to the run's folder or absolute")


class HubDestination(Section):
    """The Hugging Face Hub; the token comes from HF_TOKEN or a Prefect secret, never from here."""

    kind: Literal["hub"] = "hub"
    namespace: str = Field(description="user or organisation that owns the repositories")
    private: bool = True
    endpoint: str = Field("https://huggingface.co", description="base address of the Hub's API")


class Publish(Section):
    """What a release is called and where it goes."""

    enabled: bool = True
    name: str = Field(description="base name; `-BF16`, `-W8G128`, `-W4G128` are appended")
    licence: str = Field("apache-2.0", description="licence identifier of the Hub")
    base_model: str = Field(description="Hub id of the student's base model, for the model card")
    teacher_model: str = Field(description="Hub id of the teacher, for the model card's text")
    dataset: str = Field(description="Hub id or name of the training data, for the model card")
    destination: Annotated[DirectoryDestination | HubDestination, Field(discriminator="kind")] = (
        DirectoryDestination()
    )


class Tracking(Section):
    """MLflow. Runs of one experiment stand side by side."""

    experiment: str = "grace"
    registered_model: str | None = Field(
        None, description="name in the model registry; None registers nothing"
    )


class GraceConfig(Section):
    """The whole run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="lower-case name of the run")
    run_dir: Path = Field(description="folder of all artifacts, relative to the project root")
    seed: int = Field(0, ge=0)
    models: Models
    data: Data
    teacher_fit: TeacherFit | None = None
    distill: TrainingStage
    quantize: Quantization
    launch: Launch = Launch()
    evaluation: Evaluation = Evaluation()
    publish: Publish
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> GraceConfig:
        problems = []
        stages: list[tuple[str, TrainingStage]] = [
            ("distill", self.distill),
            ("quantize", self.quantize),
        ]
        if self.teacher_fit is not None:
            stages.append(("teacher_fit", self.teacher_fit))
        for name, stage in stages:
            if stage.training.rows_per_step % self.launch.processes:
                problems.append(
                    f"{name}.training.rows_per_step ({stage.training.rows_per_step}) must be a "
                    f"multiple of launch.processes ({self.launch.processes})"
                )
            if stage.training.row_tokens < self.data.max_tokens:
                problems.append(
                    f"{name}.training.row_tokens ({stage.training.row_tokens}) is below "
                    f"data.max_tokens ({self.data.max_tokens}): a sample could not fit its row; "
                    "raise the one or lower the other"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self
