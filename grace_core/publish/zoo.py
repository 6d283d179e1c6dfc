"""The model zoo: every released model below a folder, with what is known of it, in one table."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grace_core.artifacts import Artifact
from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import BENCHMARKS
from grace_core.export.amounts import in_bytes
from grace_core.export.release import release_folders
from grace_core.lineage.collect import artifacts_below, lineage_of, node_of
from grace_core.lineage.graph import SHORT, Lineage
from grace_core.lineage.published import RELEASE_MANIFEST, PublishedManifest
from grace_core.publish.content import PICTURE

log = logging.getLogger(__name__)

BITS_SHOWN = {"bf16": "bf16", "w8": "int8", "w4": "int4"}
_ORDER = [*BITS_SHOWN]
_FORMS = {"": "compressed-tensors", "-AWQ": "awq"}


@dataclass(frozen=True)
class ZooModel:
    """One released model; None where something is not recorded."""

    name: str
    precision: str
    """bf16, w8 or w4."""

    form: str
    """safetensors, compressed-tensors or awq."""

    backbone: str
    group_size: int | None
    size: int
    """Bytes on disk."""

    scores: Mapping[str, float | None]
    """Percent, by the benchmark's name."""

    digest: str
    """Of the release that it is a form of."""

    released: str | None = None
    """UTC, ISO 8601."""

    where: str | None = None
    """Address or directory that it was published to."""

    lineage: Lineage | None = None
    lineage_file: Path | None = None
    """Its picture, where one lies on disk."""

    tokens_per_second: float | None = None
    """Decoding one sequence."""

    memory: float | None = None
    """GiB of its weights where they are at work."""

    measured_on: str | None = None
    """Device of the two."""

    @property
    def average(self) -> float | None:
        """Unweighted mean; None unless every benchmark has a score."""
        known = [score for score in self.scores.values() if score is not None]
        return sum(known) / len(known) if known and len(known) == len(self.scores) else None


@dataclass(frozen=True)
class Zoo:
    """Models of one family side by side, the full-precision one first."""

    models: tuple[ZooModel, ...]
    source: str
    """Where they were found, for people."""

    benchmarks: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = dict.fromkeys(name for model in self.models for name in model.scores)
        object.__setattr__(self, "benchmarks", tuple(names))

    @property
    def has_speed(self) -> bool:
        return any(model.tokens_per_second is not None for model in self.models)

    def kept(self, model: ZooModel) -> float | None:
        """Percent of the average of the full-precision model that this one was trained from."""
        if model.precision == "bf16" or model.average is None:
            return None
        for other in self.models:
            related = other.precision == "bf16" and _students(other) & _students(model)
            if related and other.average and other.scores.keys() == model.scores.keys():
                return 100.0 * model.average / other.average
        return None


def find_zoo(root: Path) -> Zoo:
    """All released models below a folder: of runs, or published directories.

    Raises GraceError where there are none.
    """
    if not root.is_dir():
        raise GraceError(f"{root} is no folder; give a run's folder, or one of published models")
    known = artifacts_below(root)
    models = [
        model
        for artifact in known
        if artifact.manifest.stage.startswith("release-")
        for model in _of_artifact(artifact, known)
    ]
    if not models:
        models = [_published(file.parent) for file in sorted(root.rglob(RELEASE_MANIFEST))]
    if not models:
        raise GraceError(
            f"{root} holds no released model: neither artifacts of a release stage nor a published "
            f"directory with a {RELEASE_MANIFEST}"
        )
    return zoo_of(models, root.name)


def zoo_of(models: Iterable[ZooModel], source: str) -> Zoo:
    """The models in the zoo's order: by backbone, then by run, then by precision."""

    def place(model: ZooModel) -> tuple[str, str, int, str]:
        base = model.name.rsplit("-", 1)[0].removesuffix("-AWQ")
        return (model.backbone, base, _ORDER.index(model.precision), model.name)

    return Zoo(tuple(sorted(models, key=place)), source)


def with_speed(zoo: Zoo, file: Path) -> Zoo:
    """The zoo with what `grace bench decode` measured, of the models in the same precision.

    Raises GraceError when the file is none of its results.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        lines = {
            line["weights"]: line
            for line in table["lines"]
            if line["what"] == "decode" and line["batch"] == 1 and line["tokens_per_second"]
        }
        device = str(table["device"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraceError(
            f"{file} holds no results of `grace bench decode` ({type(error).__name__}: {error}); "
            "give the JSON file that it wrote"
        ) from error

    def measured(model: ZooModel) -> ZooModel:
        line = lines.get(model.precision)
        if line is None or model.form == "awq":  # that program reads the other form
            return model
        return replace(
            model,
            tokens_per_second=line["tokens_per_second"],
            memory=line["weights_gib"],
            measured_on=device,
        )

    return replace(zoo, models=tuple(measured(model) for model in zoo.models))


def to_markdown(zoo: Zoo, beside: Path | None = None) -> str:
    """A table in GitHub's Markdown.

    beside: folder of the file that will hold it; pictures of lineages are linked from there.
    """
    head = ["Model", "Bits", "Group", "Format", "Size", "Average", "of BF16"]
    head += ["Tokens/s", "Weights in memory"] if zoo.has_speed else []
    head += [titled(name) for name in zoo.benchmarks]
    head += ["Backbone", "Lineage"]
    lines = ["| " + " | ".join(head) + " |"]
    right = {"Group", "Size", "Average", "of BF16", "Tokens/s", "Weights in memory"}
    right |= {titled(name) for name in zoo.benchmarks}
    lines.append("|" + "".join("---:|" if name in right else "---|" for name in head))
    for model in zoo.models:
        cells = [_linked(model), *identity(model)]
        cells += [score(model.average), score(zoo.kept(model), " %")]
        cells += speed(model) if zoo.has_speed else []
        cells += [score(model.scores.get(name)) for name in zoo.benchmarks]
        cells += [model.backbone, _lineage_cell(model, beside)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    devices = sorted({model.measured_on for model in zoo.models if model.measured_on})
    if devices:
        lines += ["", f"Tokens/s: one sequence, decoded on {', '.join(devices)}."]
    return "\n".join(lines) + "\n"


def titled(benchmark: str) -> str:
    """A benchmark as people call it."""
    known = BENCHMARKS.get(benchmark)
    return benchmark if known is None else known.title


def identity(model: ZooModel) -> list[str]:
    """Bits, group, format, size."""
    group = "" if model.group_size is None else str(model.group_size)
    return [BITS_SHOWN[model.precision], group, model.form, in_bytes(model.size)]


def speed(model: ZooModel) -> list[str]:
    """Tokens a second and memory."""
    rate, memory = model.tokens_per_second, model.memory
    return [
        "–" if rate is None else f"{rate:,.0f}",
        "–" if memory is None else f"{memory:.2f} GiB",
    ]


def score(value: float | None, unit: str = "") -> str:
    return "–" if value is None else f"{value:.1f}{unit}"


def _linked(model: ZooModel) -> str:
    return (
        f"[{model.name}]({model.where})" if (model.where or "").startswith("http") else model.name
    )


def _lineage_cell(model: ZooModel, beside: Path | None) -> str:
    short = f"`{model.digest[:SHORT]}`"
    if model.where is not None and model.where.startswith("http"):
        return f"[{short}]({model.where}/blob/main/{PICTURE})"
    if model.lineage_file is not None and beside is not None:
        way = Path(os.path.relpath(model.lineage_file, beside)).as_posix()
        return f"[{short}]({way})"
    return short


def _of_artifact(artifact: Artifact, known: Sequence[Artifact]) -> Iterable[ZooModel]:
    """The forms of one release of a run."""
    precision = artifact.manifest.stage.removeprefix("release-")
    config = artifact.manifest.run_config
    name = node_of(artifact).name
    lineage = lineage_of([artifact], known)
    scores: dict[str, float | None] = {}
    places: dict[str, Mapping[str, Any]] = {}
    for other in known:  # oldest first: the newest says the last word
        parents = other.manifest.parents.values()
        if artifact.digest not in (parent.digest for parent in parents):
            continue
        if other.manifest.stage.startswith("evaluate-"):
            scores = _scores(other)
        index = other.path / "index.json"
        if other.manifest.stage == "publish" and index.is_file():
            places |= json.loads(index.read_text(encoding="utf-8"))["models"]
    for suffix, folder in release_folders(artifact.path).items():
        place = places.get(f"{precision}{suffix.lower()}")
        yield ZooModel(
            name=name + suffix,
            precision=precision,
            form="safetensors" if precision == "bf16" else _FORMS[suffix],
            backbone=config["publish"]["base_model"],
            group_size=None if precision == "bf16" else config["quantize"]["group_size"],
            size=_size(folder),
            scores=scores,
            digest=artifact.digest,
            released=artifact.manifest.created,
            where=None if place is None else _address(config, str(place["repository"])),
            lineage=lineage,
        )


def _address(config: Mapping[str, Any], repository: str) -> str | None:
    destination = config["publish"]["destination"]
    if destination["kind"] != "hub":
        return None
    return f"{destination['endpoint'].rstrip('/')}/{repository}"


def _scores(evaluation: Artifact) -> dict[str, float | None]:
    """Headlines; None where a benchmark has none, or a part of it was asked. Of another version's
    results, none at all."""
    file = evaluation.path / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
        return {
            name: None
            if result["headline"] is None or result.get("part_of")
            else result["headline"]["percent"]
            for name, result in results.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: scores cannot be read (%s: %s)", file, type(error).__name__, error)
        return {}


def _published(folder: Path) -> ZooModel:
    """A published directory, from its own manifest."""
    file = folder / RELEASE_MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
        lineage = PublishedManifest.model_validate_json(text).lineage
        facts = json.loads(text)
        quantization = facts["quantization"]
        model = lineage.node(lineage.models[0])
        return ZooModel(
            name=folder.name,
            precision=facts["precision"],
            form=facts["form"],
            backbone=facts["backbone"],
            group_size=None if quantization is None else quantization["group_size"],
            size=_size(folder),
            scores=facts["scores"],
            digest=model.digest,
            released=model.created,
            lineage=lineage,
            lineage_file=folder / PICTURE if (folder / PICTURE).is_file() else None,
        )
    except (ValidationError, KeyError, ValueError) as error:
        raise GraceError(
            f"{file} is not what this version publishes ({type(error).__name__}: {error}); publish "
            "the model again, or give another folder"
        ) from error


def _students(model: ZooModel) -> set[str]:
    """Digests of the trained full-precision students that a model comes from, or is."""
    nodes = () if model.lineage is None else model.lineage.nodes
    return {node.digest for node in nodes if node.stage == "bf16"}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
