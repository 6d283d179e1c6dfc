"""The configuration tree of a run.

Every section is frozen and refuses unknown keys, so a typing error fails instead of leaving a
default in place. Every default is written once, here. A stage receives its own sections and never
the whole tree. Hyper-parameter defaults are the official GRACE script's for Qwen3-VL (paper
arXiv 2601.22709, Eq. numbers in the descriptions).

What one value alone must satisfy stands at its field; what several values must satisfy together
is in `rules`, and holds for every `GraceConfig`. Descriptions are quoted in messages, so they say
the unit. Relative paths are taken from the working directory, which is the project root for `make`
and for the deployments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from grace_core.config.rules import broken_rules


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is meant, not true or false (in YAML also yes, no, on, off)")
    return value


def _layers(value: Any) -> Any:
    if value in ("auto", "none", "all") or (type(value) is int and value >= 0):
        return value
    raise ValueError("should be auto, none, all, or a number of layers")


Int = Annotated[int, BeforeValidator(_no_switch)]
Float = Annotated[float, BeforeValidator(_no_switch)]
PositiveInt = Annotated[Int, Field(gt=0)]
Share = Annotated[Float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[Float, Field(gt=0.0, le=1.0)]
RepositoryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
SlurmValue = Annotated[str, Field(pattern=r"^\S+$")]
SlurmOption = Annotated[str, Field(pattern=r"^-[^\r\n]+$")]
Layers = Annotated[Literal["auto", "none", "all"] | int, PlainValidator(_layers)]
Precision = Literal["w8", "w4"]
TeacherWeights = Literal["whole", "sharded"]
BenchmarkName = Literal[
    "hallusionbench",
    "mmbench",
    "scienceqa",
    "ai2d",
    "ai2d-no-mask",
    "mmmu",
    "seedbench",
    "mmstar",
    "vqav2",
    "gqa",
    "textvqa",
    "vizwiz",
    "pope",
    "mme",
    "toy-choice",
    "toy-yesno",
]
PromptStyle = Literal["llava", "qwen3-vl", "vlmevalkit", "grace"]

BITS: dict[Precision, int] = {"w8": 8, "w4": 4}

RULES_BROKEN = "rules_broken"
"""Type of the error that `GraceConfig` raises for values that do not fit together."""


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CheckpointSource(Section):
    """A Hugging Face checkpoint: a directory on this machine or a repository of the Hub."""

    path: str = Field(
        min_length=1, description="directory on this machine, or Hub repository `owner/name`"
    )
    revision: str | None = Field(
        None, description="commit of the Hub repository; pin it for a run that can be repeated"
    )


class Models(Section):
    """Teacher and student. Both must share one vocabulary and one model family's tokenizer."""

    teacher: CheckpointSource
    student: CheckpointSource
    teacher_weights: TeacherWeights = Field(
        "whole",
        description="where the frozen teacher's weights are while it teaches: whole on every GPU, "
        "or sharded over all of them (ZeRO-3), for a teacher that does not fit; slower",
    )


class ToyData(Section):
    """Generated pictures of shapes with conversations, in ShareGPT4V's schema."""

    kind: Literal["toy"] = "toy"
    records: PositiveInt = Field(2400, description="training records to generate")
    wrong_answer_share: Share = Field(
        0.1,
        description="share (0.1 is 10 %) of training answers that are wrong, as in machine-made "
        "annotations",
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
    held_out_share: Share = Field(
        0.0, description="share (0.1 is 10 %) of records kept from training, for the held-out loss"
    )


class Distillation(Section):
    """The gated decoupled distillation term (Eq. 1-6) and its ablations."""

    kind: Literal["gated-decoupled", "decoupled", "plain", "none"] = Field(
        "gated-decoupled",
        description="gated-decoupled: GRACE; decoupled: DKD without the gate; plain: KL; none: off",
    )
    temperature: Float = Field(2.0, gt=0, description="softmax temperature T")
    alpha: Float = Field(1.0, ge=0, description="weight of the target-class term TCKD")
    beta_dkd: Float = Field(4.0, ge=0, description="weight of the non-target term NCKD")


class Relational(Section):
    """Relational CKA on visual tokens (Eq. 10-13)."""

    enabled: bool = True
    omega: Float = Field(3.0, ge=0, description="weight of the term once warmed up")
    warmup_steps: Int = Field(400, ge=0, description="optimizer steps of the linear warm-up")


class Controller(Section):
    """The adaptive information-bottleneck controller of beta (Eq. 18-20)."""

    kind: Literal["adaptive", "fixed"] = "adaptive"
    beta_init: Float = Field(0.5, ge=0, description="beta of the first step, or of all when fixed")
    beta_min: Float = Field(0.1, ge=0, description="least beta of the adaptive controller")
    beta_max: Float = Field(1.0, ge=0, description="greatest beta of the adaptive controller")
    tau: Float = Field(
        3.0, gt=0, description="target of the distillation loss, inside its trajectory"
    )
    eta: Float = Field(0.003, ge=0, description="step of the dual ascent")
    ema_decay: Float = Field(0.99, ge=0, lt=1, description="of the loss's running mean, a step")


class Objective(Section):
    """L = L_CE + beta * L_GDKD + omega * L_RCKA (Eq. 21)."""

    cross_entropy: bool = True
    distillation: Distillation = Distillation()
    relational: Relational = Relational()
    controller: Controller = Controller()

    @property
    def needs_teacher(self) -> bool:
        return self.distillation.kind != "none" or self.relational.enabled


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


class LocalLaunch(Section):
    """On this machine, below the process that runs the stage."""

    kind: Literal["local"] = "local"


class SlurmLaunch(Section):
    """As a batch job of SLURM, submitted and watched from a machine that needs no GPU."""

    kind: Literal["slurm"] = "slurm"
    partition: SlurmValue | None = Field(None, description="null: the cluster's default")
    account: SlurmValue | None = None
    qos: SlurmValue | None = None
    constraint: SlurmValue | None = Field(None, description="features that the nodes must have")
    gpus_per_node: Int | None = Field(
        None, ge=0, description="GPUs; null: launch.processes, or none where launch.device is cpu"
    )
    memory_gb: PositiveInt | None = Field(
        None, description="GiB of memory on each node; null: the partition's default"
    )
    time_limit_minutes: PositiveInt | None = Field(
        None, description="minutes of one start of the job; null: the partition's limit"
    )
    warning_seconds: Int = Field(
        180,
        ge=1,
        le=65535,
        description="seconds before the time limit at which the training saves and is requeued",
    )
    max_restarts: Int = Field(
        50, ge=0, description="how often a job may have been requeued to be requeued once more"
    )
    poll_seconds: Float = Field(
        15.0, ge=1, le=600, description="seconds between questions to slurmctld"
    )
    setup: tuple[str, ...] = Field((), description="shell lines run first on each node")
    options: tuple[SlurmOption, ...] = Field(
        (), description="more options of sbatch, such as --reservation=course"
    )


class Launch(Section):
    """How a training stage's processes are started."""

    nodes: PositiveInt = Field(1, description="machines that train together")
    processes: PositiveInt = Field(1, description="processes (one a GPU) on each node")
    threads_per_process: PositiveInt = Field(1, description="CPU threads of each process")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_hours: Float | None = Field(
        None, gt=0, le=2000, description="hours (not seconds) a training stage may take; null: any"
    )
    grace_seconds: Float = Field(
        20.0,
        gt=0,
        lt=30,
        description="seconds from SIGTERM to SIGKILL, below the 30 after which Prefect kills",
    )
    backend: Annotated[LocalLaunch | SlurmLaunch, Field(discriminator="kind")] = LocalLaunch()

    @property
    def world_size(self) -> int:
        """Processes of a training, over all nodes."""
        return self.nodes * self.processes

    @property
    def seconds_to_save(self) -> float:
        """Seconds that a training told to stop has for writing a checkpoint."""
        if isinstance(self.backend, SlurmLaunch):
            return float(self.backend.warning_seconds)
        return self.grace_seconds


class ChosenBenchmark(Section):
    """A benchmark to be scored on; its name alone is enough where its declaration holds."""

    name: BenchmarkName
    path: str | None = Field(
        None,
        min_length=1,
        description="file of rows, or folder of them, on this machine, instead of the Hub",
    )
    repository: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$",
        description="data set of the Hub, `owner/name`; null: as declared",
    )
    config: str | None = Field(None, description="configuration of the data set; null: as declared")
    split: str | None = Field(
        None, description="split, or several joined by `+`; null: as declared"
    )
    revision: str | None = Field(
        None, description="commit of the data set; pin it for a run that can be repeated"
    )
    pictures: str | None = Field(
        None, description="folder below which pictures that rows name by path lie; null: the rows'"
    )
    items: PositiveInt | None = Field(
        None, description="questions, from the first; null: as for all benchmarks"
    )
    prompt: PromptStyle | None = Field(
        None, description="style of the prompts; null: as for all benchmarks"
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Kept(Section):
    """Percent of the BF16 student's average that quantized students must keep."""

    w8: Float | None = Field(None, ge=0, description="percent; null: any")
    w4: Float | None = Field(None, ge=0, description="percent; null: any")


class Gate(Section):
    """What every released model must score before anything is published."""

    decides: Literal["value", "lower_bound", "upper_bound"] = Field(
        "value",
        description="what is held against the demands: the measured value; the lower end of its "
        "95 % interval, so that reaching them is shown; the upper end, so that only a shortfall "
        "that is shown counts",
    )
    complete: bool = Field(True, description="every item of every benchmark must have an answer")
    floors: dict[str, Float] = Field(
        {}, description="percent at least, by benchmark or for `average`"
    )
    retention: Kept = Kept()
    min_gain: Float | None = Field(
        None, description="points of the average at least above the baseline's; null: any"
    )
    max_parse_failures: Float | None = Field(
        None,
        ge=0,
        le=100,
        description="percent of a benchmark's answers at most that nothing can be read from",
    )
    override: str | None = Field(
        None, min_length=1, description="why it is published all the same; recorded with it"
    )


class Evaluation(Section):
    """Benchmarks every model of the results table is scored on."""

    benchmarks: tuple[ChosenBenchmark, ...] = Field(
        (ChosenBenchmark(name="toy-choice"), ChosenBenchmark(name="toy-yesno")),
        min_length=1,
        description="names, or sections with a name and what differs from the declaration",
    )
    items: PositiveInt | None = Field(
        None, description="questions of each benchmark, from its first; null: all"
    )
    prompt: PromptStyle = Field("llava", description="style of the prompts: docs/benchmarks.md")
    max_new_tokens: PositiveInt | None = Field(
        None, description="tokens of an answer at most; null: as each benchmark declares"
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="what generates answers; vllm must be installed, and has a GPU"
    )
    batch_tokens: PositiveInt | None = Field(
        None,
        description="tokens answered at once, prompts and answers padded to the longest; null: by "
        "the device and its free memory",
    )
    processes: PositiveInt | None = Field(
        None, description="processes that share the questions; null: one for each GPU, or one"
    )
    gate: Gate = Gate()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(benchmark.name for benchmark in self.benchmarks)


class DirectoryDestination(Section):
    kind: Literal["directory"] = "directory"
    path: str = Field(
        "releases", min_length=1, description="folder, relative to `run_dir` or absolute"
    )


class HubDestination(Section):
    """The Hugging Face Hub; the token is in HF_TOKEN or a Prefect Secret block, never here."""

    kind: Literal["hub"] = "hub"
    namespace: RepositoryName = Field(
        description="user or organisation that owns the repositories, of letters, digits, dots, "
        "underscores and hyphens"
    )
    private: bool = Field(
        True, description="false: made public once the whole release is there and verified"
    )
    endpoint: str = Field(
        "https://huggingface.co",
        pattern=r"^https?://\S+$",
        description="base address of the Hub's API",
    )
    tag: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="git tag of the release in every repository, such as v2026.11.0; it is never "
        "moved. null: named by the content",
    )
    token_secret: str | None = Field(
        None,
        description="name of the Prefect Secret block that holds the token, for deployments whose "
        "environment has no HF_TOKEN",
    )


class RelatedModel(Section):
    """A model of another run, for the model zoo in the cards."""

    repository: str = Field(min_length=1, description="`owner/name` on the Hub")
    backbone: str
    precision: Literal["bf16", "w8", "w4"]
    group_size: PositiveInt | None = Field(
        None, description="weights that share one scale, of a quantized model"
    )
    description: str = ""


class Publish(Section):
    """What a release is called and where it goes."""

    enabled: bool = True
    approval: bool = Field(
        False,
        description="a person must approve: the pipeline then ends with its results and starts the "
        "deployment grace-publish/publish, which asks and publishes",
    )
    name: RepositoryName = Field(
        description="base name of the repositories without their owner, of letters, digits, dots, "
        "underscores and hyphens; `-BF16`, `-W8G128` and `-W4G128` are appended"
    )
    licence: str = Field(
        "apache-2.0",
        description="licence identifier of the Hub for the weights; the card adds what the data's "
        "licence means",
    )
    base_model: str = Field(description="Hub id of the student's base model, for the model card")
    teacher_model: str = Field(description="Hub id of the teacher, for the model card's text")
    dataset: str = Field(description="Hub id or name of the training data, for the model card")
    dataset_licence: str | None = Field(
        None,
        description="licence identifier of the training data; the card says what one that forbids "
        "commercial use means. null: known for ShareGPT4V, else not stated",
    )
    related: tuple[RelatedModel, ...] = Field(
        (), description="models of other runs that the card's model zoo lists beside these"
    )
    results_files: bool = Field(
        True,
        description="besides the card's metadata, write the scores of benchmarks that have a data "
        "set on the Hub as `.eval_results/*.yaml`",
    )
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

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        description="name of the run, of lower-case letters, digits, dots, underscores and hyphens",
    )
    run_dir: Path = Field(description="folder of everything the run leaves")
    seed: Int = Field(0, ge=0, lt=2**32, description="of data, order and initial values")
    models: Models
    data: Data
    teacher_fit: TeacherFit | None = None
    teacher_outputs: TeacherOutputs | None = None
    distill: TrainingStage
    quantize: Quantization
    launch: Launch = Launch()
    evaluation: Evaluation = Evaluation()
    publish: Publish
    tracking: Tracking = Tracking()

    @property
    def records_teacher(self) -> bool:
        """Whether trainings learn from recorded outputs of the teacher."""
        learners = (self.distill, self.quantize)
        needed = any(stage.objective.needs_teacher for stage in learners)
        return self.teacher_outputs is not None and needed

    @property
    def students(self) -> tuple[str, ...]:
        """Labels of the models that a run trains and releases."""
        return (*(() if self.quantize.start else ("bf16",)), *self.quantize.variants)

    @field_validator("run_dir")
    @classmethod
    def _home_is_meant(cls, run_dir: Path) -> Path:
        if run_dir == Path():
            raise ValueError("the working directory itself; name a folder such as runs/first")
        return run_dir.expanduser()

    @model_validator(mode="after")
    def _values_fit_together(self) -> GraceConfig:
        problems = broken_rules(self)
        if problems:
            raise PydanticCustomError(RULES_BROKEN, "{text}", {"text": "; ".join(problems)})
        return self
