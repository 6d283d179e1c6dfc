"""What a model card is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from grace_core.errors import GraceError
from grace_core.lineage.graph import Lineage

Precision = Literal["bf16", "w8", "w4"]
Form = Literal["safetensors", "compressed-tensors", "awq"]

PAPER = "Gated Relational Alignment via Confidence-based Distillation for Efficient VLMs"
AUTHORS = ("Yanlong Chen", "Amirhossein Habibian", "Luca Benini", "Yawei Li")
VENUE = "ICML 2026"
ARXIV = "2601.22709"

_NON_COMMERCIAL_DATA = {"sharegpt4v": "cc-by-nc-4.0"}
"""Data sets whose licence is known: part of the name, in lower case -> licence."""


@dataclass(frozen=True)
class ZooEntry:
    """One model of the family of releases."""

    repository: str
    """`owner/name` on the Hub, or the name of a local release."""

    backbone: str
    precision: Precision
    group_size: int | None
    """Of a quantized model."""

    description: str

    @property
    def bits(self) -> str:
        """As the published zoo says it: bf16, int8, int4."""
        return {"bf16": "bf16", "w8": "int8", "w4": "int4"}[self.precision]


@dataclass(frozen=True)
class Quantization:
    """How a quantized release was made."""

    bits: Literal[4, 8]
    group_size: int
    """Consecutive input weights that share one scale."""

    layers: int
    """Linear layers that are quantized."""


@dataclass(frozen=True)
class BenchmarkFacts:
    """What was asked of a benchmark, and how it was scored."""

    title: str
    dataset: str | None = None
    """Hub id of the data set that the items came from; None where they came from none."""

    revision: str | None = None
    """The data set's commit."""

    config: str | None = None
    """The data set's configuration; None where there is only one, "*" for all."""

    split: str | None = None

    declared: bool = False
    """Whether that is the benchmark's own data set, configuration and split."""

    part: str | None = None
    """What was asked, such as "50 of 1,500 items", where that is not the whole benchmark."""

    prompt: str | None = None
    """Style of the prompts; None where the benchmark has words of its own, or it is not known."""

    metric: str = "accuracy"
    """What the score is, in percent."""


@dataclass(frozen=True)
class Results:
    """What was measured of a release, and of the models beside it."""

    scores: Mapping[str, float | None]
    """This release's own percent, by the benchmark's name; None where items were missing."""

    table: str
    """All models, in Markdown."""

    summary: str = ""
    """What the table says, in a sentence or two."""

    benchmarks: Mapping[str, BenchmarkFacts] = field(default_factory=dict)
    """By name; one that is not here is called by its name."""

    date: str | None = None
    """When it was scored, ISO 8601."""

    pixels: tuple[int, int] | None = None
    """Fewest and most of a picture as the model saw it; None: all of one size, or unknown."""

    def facts(self, name: str) -> BenchmarkFacts:
        return self.benchmarks.get(name, BenchmarkFacts(name))

    @property
    def whole(self) -> dict[str, float]:
        """The scores that may be called the benchmark's: there is one, and not of a part."""
        return {
            name: score
            for name, score in self.scores.items()
            if score is not None and self.facts(name).part is None
        }


@dataclass(frozen=True)
class Release:
    """Everything a card says about a release, except its scores."""

    repository: str
    precision: Precision
    form: Form
    base_model: str
    """Hub id of the model this one was made from: the original for BF16, BF16 for W8 and W4."""

    backbone: str
    """Hub id of the student before any training."""

    teacher: str
    dataset: str
    dataset_licence: str | None
    """Identifier of the Hub; None where it is not stated."""

    licence: str
    zoo: Sequence[ZooEntry]
    training: Mapping[str, str | int | float]
    """Setting -> value, listed as they are."""

    files: Sequence[str]
    parameters: int
    """Packed ones counted one by one; a head that is the embeddings is not counted twice."""

    size: int
    """Bytes of the files that hold the weights."""

    lineage: Lineage
    """Its published form, with this release as the one model asked for."""

    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if (self.quantization is None) != (self.precision == "bf16"):
            raise GraceError(
                f"card of {self.repository}: a {self.precision} release "
                f"{'needs' if self.quantization is None else 'has no'} quantization details"
            )
        assert (self.quantization is None) == (self.form == "safetensors")

    @property
    def name(self) -> str:
        """Without its owner."""
        return self.repository.split("/")[-1]

    @property
    def data_licence(self) -> str | None:
        """As stated, or as known of the data set."""
        known = (
            licence
            for name, licence in _NON_COMMERCIAL_DATA.items()
            if name in self.dataset.lower()
        )
        return self.dataset_licence or next(known, None)

    @property
    def non_commercial(self) -> bool:
        """Whether the data's licence forbids commercial use."""
        return "nc" in (self.data_licence or "").lower().split("-")
