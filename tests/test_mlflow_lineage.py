"""The lineage from MLflow alone: the same graph as from the files, without looking at them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from grace_core.artifacts import Artifact
from grace_core.config import GraceConfig, load_config
from grace_core.errors import GraceError
from grace_core.lineage.collect import artifacts_below, lineage_of
from grace_core.lineage.forward import descendants
from grace_core.lineage.graph import Lineage
from grace_core.publish.zoo import to_markdown
from grace_core.stages import StageContext
from operations.mlflow_lineage import descendants_in_mlflow, lineage_in_mlflow
from operations.mlflow_zoo import zoo_in_mlflow
from tasks.lineage import find_model, log_scores, mark_published, register_release
from tasks.mlflow_runs import open_parent_run
from tasks.tracked import run_stage
from tests.stand_in_stages import StandIns, checkpoint

ROOT = Path(__file__).resolve().parent.parent
REGISTERED = "toy-lineage"


class Tracked:
    """A whole run with stand-in stages, recorded as the tasks do."""

    def __init__(self, config: GraceConfig) -> None:
        self.config, self.stages = config, StandIns()
        self.parent = str(open_parent_run(config).info.run_id)
        self.experiment = str(MlflowClient().get_run(self.parent).info.experiment_id)

    def stage(
        self,
        name: str,
        make: Callable[[StageContext], Artifact],
        record: Callable[[str, Artifact], None] | None = None,
    ) -> Artifact:
        made: list[Artifact] = []

        def keep(context: StageContext) -> Artifact:
            made.append(make(context))
            return made[0]

        run_stage(self.config, self.parent, name, keep, record)
        return made[0]

    def register(self, release: Artifact) -> None:
        model = find_model(self.experiment, release.manifest.stage, release.digest)
        assert model is not None
        register_release(REGISTERED, model.model_id, release)

    def all(self) -> None:
        config, do = self.config, self.stages
        self.stage("benchmarks", lambda c: do.prepare_benchmarks(config, c))
        self.stage("world", lambda c: do.generate_world(config, c))
        data = self.stage("data", lambda c: do.prepare_data(config, c))
        teacher = self.stage("teacher", lambda c: do.fit_teacher(config, data, c))
        outputs = self.stage(
            "teacher-outputs", lambda c: do.record_teacher(config, data, teacher, c)
        )
        bf16 = self.stage("bf16", lambda c: do.distill(config, data, outputs, c))
        w4 = self.stage("w4", lambda c: do.quantize(config, "w4", data, outputs, bf16, c))
        students = {"bf16": bf16, "w4": w4}
        releases = {
            label: self.stage(f"release-{label}", partial(do.release, config, model))
            for label, model in students.items()
        }
        self.register(releases["w4"])
        rows: dict[str, Artifact | None] = {"teacher": teacher, "baseline": None, **releases}
        scores = {
            label: self.stage(
                f"evaluate-{label}", partial(do.evaluate, config, label, model), log_scores
            )
            for label, model in rows.items()
        }
        self.stage("publish", lambda c: do.publish(config, releases, scores, c), mark_published)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tracked, list[Artifact]]]:
    """The run and its artifacts as they were; its directory is gone when the tests start."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.create_experiment("lineage", artifact_location=str(folder / "artifacts"))
    settings = [
        f"run_dir={folder}/run",
        "tracking.experiment=lineage",
        "quantize.variants=[w4]",
        "teacher_fit={training: {steps: 2, row_tokens: 1024, rows_per_step: 4}}",
        "teacher_outputs={}",
    ]
    tracked = Tracked(load_config(ROOT / "configs" / "toy.yaml", settings))
    tracked.all()
    yield tracked, artifacts_below(folder / "run")
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def from_files(recorded: tuple[Tracked, list[Artifact]]) -> dict[str, Lineage]:
    """By stage; then the files are removed."""
    tracked, known = recorded
    found = {item.manifest.stage: lineage_of([item], known) for item in known}
    found["from data"] = descendants(digest_of(known, "data"), known)
    found["from the first teacher"] = descendants(teacher_of(tracked), known)
    shutil.rmtree(tracked.config.run_dir)
    return found


def digest_of(known: list[Artifact], stage: str) -> str:
    (digest,) = {item.digest for item in known if item.manifest.stage == stage}
    return digest


def teacher_of(tracked: Tracked) -> str:
    return checkpoint(tracked.config.models.teacher.path).digest


def edges(lineage: Lineage) -> set[tuple[str, str, str]]:
    return {(edge.child, edge.role, edge.parent) for edge in lineage.edges}


def test_both_sources_give_the_same_graph(
    recorded: tuple[Tracked, list[Artifact]], from_files: dict[str, Lineage]
) -> None:
    _, known = recorded
    for stage in ("release-w4", "release-bf16", "w4", "teacher"):
        expected = from_files[stage]
        found = lineage_in_mlflow(digest_of(known, stage)[:12])
        assert found.models == expected.models
        assert edges(found) == edges(expected), stage
        assert {n.id: n for n in found.nodes}.keys() == {n.id for n in expected.nodes}
        # Counts, scores, settings, versions and places are the same.
        assert {n.id: n for n in found.nodes} == {n.id: n for n in expected.nodes}
        assert found.configs == expected.configs


@pytest.mark.parametrize("source", ["data", "the first teacher"])
def test_forward_is_the_same_too(
    recorded: tuple[Tracked, list[Artifact]], from_files: dict[str, Lineage], source: str
) -> None:
    tracked, known = recorded
    digest = digest_of(known, "data") if source == "data" else teacher_of(tracked)
    expected, found = from_files[f"from {source}"], descendants_in_mlflow(digest[:10])
    assert {node.id for node in found.nodes} == {node.id for node in expected.nodes}
    assert edges(found) == edges(expected)


def test_a_model_is_found_by_its_names_in_mlflow(
    recorded: tuple[Tracked, list[Artifact]], from_files: dict[str, Lineage]
) -> None:
    tracked, known = recorded
    digest = digest_of(known, "release-w4")
    model = find_model(tracked.experiment, "release-w4", digest)
    assert model is not None
    for name in (
        *(REGISTERED, f"{REGISTERED}@candidate", f"models:/{REGISTERED}@candidate"),
        *(model.model_id, digest[:8]),
    ):
        assert lineage_in_mlflow(name).models == (f"release-w4:{digest}",)
    for name in ("nobody", f"{REGISTERED}@champion", "m-0123", "0123456789"):
        with pytest.raises(GraceError, match="MLflow"):
            lineage_in_mlflow(name)
    with pytest.raises(GraceError, match="is no digest"):
        descendants_in_mlflow("toy")


def test_where_a_release_went_stands_on_model_and_registered_version(
    recorded: tuple[Tracked, list[Artifact]], from_files: dict[str, Lineage]
) -> None:
    tracked, known = recorded
    digest = digest_of(known, "release-w4")
    (publication,) = [n for n in from_files["release-w4"].nodes if n.stage == "publish"]
    place = publication.published["release-w4"]
    model = find_model(tracked.experiment, "release-w4", digest)
    assert model is not None
    version = MlflowClient().get_model_version_by_alias(REGISTERED, "candidate")
    for tags in (model.tags, version.tags):
        assert tags["grace.published"] == place.location
        assert tags["grace.published_revision"] == place.revision


def test_the_zoo_of_the_registry_lists_every_release(
    recorded: tuple[Tracked, list[Artifact]], from_files: dict[str, Lineage]
) -> None:
    _, known = recorded
    zoo = zoo_in_mlflow()
    found = [(model.name, model.precision, model.group_size, model.size) for model in zoo.models]
    assert found == [
        ("Toy-GRACE-BF16", "bf16", None, 7000),
        ("Toy-GRACE-W4G128", "w4", 128, 7000),
    ]
    for model in zoo.models:
        stage = f"release-{model.precision}"
        assert model.digest == digest_of(known, stage)
        assert model.scores["toy-choice"] == 75.0
        assert model.lineage is not None
        assert edges(model.lineage) == edges(from_files[stage])
    assert "| Toy-GRACE-W4G128 | int4 | 128 |" in to_markdown(zoo)


def test_on_the_hub_repository_and_commit_are_tags(
    recorded: tuple[Tracked, list[Artifact]], tmp_path: Path
) -> None:
    tracked, known = recorded
    (publication,) = [item for item in known if item.manifest.stage == "publish"]
    (tmp_path / "releases.json").write_text(
        '{"bf16": {"location": "https://huggingface.co/owner/Toy-BF16", "revision": "c0ffee"}}'
    )
    run = MlflowClient().create_run(tracked.experiment)
    mark_published(run.info.run_id, Artifact(tmp_path, publication.manifest))
    model = find_model(tracked.experiment, "release-bf16", digest_of(known, "release-bf16"))
    assert model is not None
    assert (model.tags["hf.repo"], model.tags["hf.commit"]) == ("owner/Toy-BF16", "c0ffee")


def test_every_edge_of_the_manifests_is_an_input_in_mlflow(
    recorded: tuple[Tracked, list[Artifact]],
) -> None:
    tracked, known = recorded
    client = MlflowClient()
    for item in known:
        (run,) = client.search_runs(
            [tracked.experiment], f"tags.`grace.fingerprint` = '{item.manifest.fingerprint}'"
        )
        inputs = client.get_run(run.info.run_id).inputs
        found = {entry.dataset.digest for entry in inputs.dataset_inputs}
        found |= {
            client.get_logged_model(entry.model_id).tags["grace.digest"][:32]
            for entry in inputs.model_inputs
        }
        assert found == {parent.digest[:32] for parent in item.manifest.parents.values()}
