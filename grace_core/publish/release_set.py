"""The releases of one run: results table, model cards, and their way to the destination."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grace_core.artifacts import Artifact
from grace_core.config.names import index_repository, repository_name
from grace_core.config.publish import HubDestination
from grace_core.config.tree import GraceConfig
from grace_core.evaluation.report.document import published_beside, table_of_models
from grace_core.evaluation.report.recorded import RecordedModel, find_recorded
from grace_core.evaluation.table import ResultsTable
from grace_core.export.card import eval_results_files, model_card, release_manifest
from grace_core.export.release import MODEL_FOLDER, release_folders
from grace_core.lineage.collect import graph_of
from grace_core.lineage.picture import picture
from grace_core.lineage.published import RELEASE_MANIFEST
from grace_core.locks import sole_maker
from grace_core.publish.content import CARD, PICTURE, ReleaseContent, read_content
from grace_core.publish.directory import publish_to_directory
from grace_core.publish.hub import HubTarget, publish_to_hub
from grace_core.publish.index import ReleaseIndex
from grace_core.publish.index_card import index_card
from grace_core.publish.release_facts import release_facts, results_of
from grace_core.whole_files import write_whole


@dataclass(frozen=True)
class Published:
    """Where a release went."""

    location: str
    """Directory, or address of the repository."""

    revision: str
    """Digest of the directory's files, or the repository's commit."""


@dataclass(frozen=True)
class HubAccess:
    """How the Hub is reached; nothing of it is written anywhere."""

    token: str | None = field(default=None, repr=False)
    """By default the environment's HF_TOKEN."""

    take_over: bool = False
    """Take the lease of another publication although it may be at work."""


FROM_ENVIRONMENT = HubAccess()


def publish_releases(
    config: GraceConfig,
    releases: Mapping[str, Artifact],
    evaluations: Mapping[str, Artifact],
    out: Path,
    access: HubAccess = FROM_ENVIRONMENT,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the table into `out` and the releases, as one, to the configured destination.

    Leaves in `out`: `results.json` (rows, releases, seconds by stage), `table.md`, `releases.json`
    (location and revision of each release) and, where something was published, `index.json` (the
    release index).

    report: is told bytes done and bytes to do.
    """
    table = table_of(evaluations)
    published: dict[str, Published] = {}
    if config.publish.enabled:
        contents = contents_of(config, releases, evaluations)
        index = _send(config, contents, out / "downloaded", access, report)
        _write_json(out / "index.json", index.model_dump(mode="json"))
        published = {
            label: Published(_location(config, model.repository), model.commit)
            for label, model in index.models.items()
        }
    made = graph_of([*releases.values(), *evaluations.values()], ()).nodes
    results = {
        **table.to_dict(),
        "releases": {label: place.location for label, place in published.items()}
        or {label: str(release.path / MODEL_FOLDER) for label, release in releases.items()},
        "seconds": {
            node.stage: node.seconds
            for node in sorted(made, key=lambda node: node.stage)
            if node.seconds is not None
        },
    }
    _write_json(out / "results.json", results)
    # Other forms of a release are in the index: here is one place for each artifact.
    places = {label: vars(place) for label, place in published.items() if label in releases}
    _write_json(out / "releases.json", places)
    (out / "table.md").write_text(table.to_markdown() + "\n", encoding="utf-8")


def contents_of(
    config: GraceConfig, releases: Mapping[str, Artifact], evaluations: Mapping[str, Artifact]
) -> list[ReleaseContent]:
    """What is to stand at the destination: every release with its card and its lineage.

    Raises GraceError where a release is not fit to publish.
    """
    models = find_recorded([item.path for item in evaluations.values()])
    table = table_of_models(models, published_beside(models))
    recorded: dict[str, RecordedModel] = {model.label: model for model in models}
    contents = []
    for label, artifact in releases.items():
        date = evaluations[label].manifest.created
        results = results_of(recorded[label], table, date)
        for suffix, folder in release_folders(artifact.path).items():
            release = release_facts(config, label, suffix, releases, evaluations[label])
            documents = {
                CARD: model_card(release, results),
                RELEASE_MANIFEST: release_manifest(release, results),
                PICTURE: picture(release.lineage),
            }
            if config.publish.results_files:
                documents |= eval_results_files(release, results)
            name = f"{label}{suffix.lower()}"
            contents.append(read_content(name, release.repository, folder, documents))
    return contents


def hub_target(config: GraceConfig, access: HubAccess) -> HubTarget:
    """The Hub as the configuration names it, and this run directory as the writer."""
    destination = config.publish.destination
    assert isinstance(destination, HubDestination)
    return HubTarget(
        endpoint=destination.endpoint,
        namespace=destination.namespace,
        index_repository=index_repository(config),
        private=destination.private,
        owner=_owner(config.run_dir),
        tag=destination.tag,
        token=access.token,
        take_over=access.take_over,
    )


def table_of(evaluations: Mapping[str, Artifact]) -> ResultsTable:
    """The results table of the evaluated models, in the order of the model card.

    Published figures stand beside where there are any for the same base model and benchmarks.
    """
    models = find_recorded([item.path for item in evaluations.values()])
    return table_of_models(models, published_beside(models))


def destination_of(config: GraceConfig, label: str) -> str:
    """Where a release is to go, for people."""
    location, destination = (
        _location(config, repository_name(config, label)),
        config.publish.destination,
    )
    if isinstance(destination, HubDestination):
        return f"{location} ({'private' if destination.private else 'public'})"
    return location


def _send(
    config: GraceConfig,
    contents: Sequence[ReleaseContent],
    room: Path,
    access: HubAccess,
    report: Callable[[int, int], None],
) -> ReleaseIndex:
    destination = config.publish.destination
    if not isinstance(destination, HubDestination):
        return publish_to_directory(contents, config.run_dir / destination.path, report)
    with sole_maker(config.run_dir / "artifacts" / "publishing"):  # one writer of one owner
        return publish_to_hub(
            contents,
            hub_target(config, access),
            lambda index: index_card(
                index, repository=index_repository(config), licence=config.publish.licence
            ),
            room,
            report,
        )


def _location(config: GraceConfig, repository: str) -> str:
    destination = config.publish.destination
    if isinstance(destination, HubDestination):
        return f"{destination.endpoint.rstrip('/')}/{repository}"
    return str((config.run_dir / destination.path / repository).absolute())


def _owner(run_dir: Path) -> str:
    """What stands for this run directory in a lease: random digits, kept in it."""
    file = run_dir / "artifacts" / ".publisher"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8")


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
