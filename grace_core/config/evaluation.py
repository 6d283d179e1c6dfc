"""Section `evaluation`: the benchmarks, and what a model must score to be published."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from grace_core.config.section import Float, PositiveInt, Section

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


Percent = Annotated[Float, Field(ge=0.0, le=100.0)]

OTHERS = "others"
"""Benchmarks without a limit of their own."""


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
        None,
        description="questions, from the first, each with all its items (MMBench's rotations); "
        "null: as for all benchmarks",
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
    complete: bool = Field(
        True,
        description="every item of every benchmark must have an answer; a part of a benchmark is "
        "not enough",
    )
    floors: dict[str, Float] = Field(
        {}, description="percent at least, by benchmark or for `average`"
    )
    retention: Kept = Kept()
    min_gain: Float | None = Field(
        None, description="points of the average at least above the baseline's; null: any"
    )
    max_parse_failures: dict[str, Percent] = Field(
        {},
        description="percent of a benchmark's answers at most that nothing can be read from, by "
        "benchmark or for all `others`; one number is that of all",
    )
    override: str | None = Field(
        None, min_length=1, description="why it is published all the same; recorded with it"
    )

    @field_validator("max_parse_failures", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        if value is None:
            return {}
        return {OTHERS: value} if isinstance(value, int | float) else value

    def most_parse_failures(self, benchmark: str) -> float | None:
        """Percent of its answers; None: any."""
        return self.max_parse_failures.get(benchmark, self.max_parse_failures.get(OTHERS))


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
    min_pixels: PositiveInt | None = Field(
        None,
        description="pixels; smaller pictures are enlarged, where the family's pictures differ in "
        "size; null: as the checkpoint's image processor says",
    )
    max_pixels: PositiveInt | None = Field(
        None,
        description="pixels; larger pictures are reduced; null: as the checkpoint's image "
        "processor says, however small data.max_pixels is",
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
