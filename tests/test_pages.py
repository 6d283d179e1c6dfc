"""What a person sees: the Prefect form and the MLflow lineage, opened in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from demo.services import Services, servers, workers
from flows.pipeline import grace
from tasks.tracked import StageRef
from tests.prefect_client import prefect_at
from tests.stand_in_stages import StandIns

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `make system-deps` installs it"),
]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Both servers, the deployments, and a finished run of the whole flow with stand-in stages."""
    folder = tmp_path_factory.mktemp("pages")
    with servers(folder / "services", ROOT, (0, 0)) as local, workers(local, ()):
        yield local


@pytest.fixture(scope="module")
def published(services: Services, tmp_path_factory: pytest.TempPathFactory) -> StageRef:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(services.mlflow)
    run_dir = tmp_path_factory.mktemp("run")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            StandIns().install(patch)
            with prefect_at(f"{services.prefect}/api"):
                return grace("configs/toy.yaml", [f"run_dir={run_dir}/run"])
    finally:
        mlflow.set_tracking_uri(before)


def page(address: str, profile: Path) -> str:
    """The document that a browser shows after the page's own programs have filled it."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,2400"]
    done = subprocess.run(
        [
            CHROMIUM,
            *options,
            f"--user-data-dir={profile}",
            "--virtual-time-budget=30000",
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    return done.stdout


def ask(address: str, body: dict[str, object]) -> list[dict[str, str]]:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found: list[dict[str, str]] = json.load(answer)
    return found


def test_prefect_shows_a_form_for_the_run(services: Services, tmp_path: Path) -> None:
    deployments = ask(f"{services.prefect}/api/deployments/filter", {})
    (full,) = [item for item in deployments if item["name"] == "full-pipeline"]
    shown = page(f"{services.prefect}/deployments/deployment/{full['id']}/run", tmp_path)
    for words in ("full-pipeline", "config", "overrides", "publish"):
        assert words in shown


def test_mlflow_shows_what_a_released_model_came_from(
    services: Services, published: StageRef, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient(services.mlflow)
    experiment = client.get_experiment_by_name("grace").experiment_id
    (w4,) = client.search_runs([experiment], "tags.`grace.stage` = 'w4'")
    shown = page(f"{services.mlflow}/#/experiments/{experiment}/runs/{w4.info.run_id}", tmp_path)
    (data,) = w4.inputs.dataset_inputs
    assert data.dataset.digest[:8] in shown
    for model in ("bf16", "teacher", "w4"):
        assert f">{model}<" in shown, f"{model} is not on the page of the W4 run"


def test_mlflow_shows_the_page_of_the_lineage(
    services: Services, published: StageRef, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient(services.mlflow)
    experiment = client.get_experiment_by_name("grace").experiment_id
    (run,) = client.search_runs([experiment], "tags.`grace.stage` = 'release-w4'")
    address = f"{services.mlflow}/#/experiments/{experiment}/runs/{run.info.run_id}"
    assert 'class="mlflow-html-iframe"' in page(
        f"{address}/artifacts/lineage/index.html", tmp_path / "server"
    )
    # MLflow shows the page in a frame, whose inside is not part of the document.
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(services.mlflow)
    try:
        inside = Path(client.download_artifacts(run.info.run_id, "lineage", str(tmp_path)))
    finally:
        mlflow.set_tracking_uri(before)
    shown = page((inside / "index.html").as_uri(), tmp_path / "page")
    for words in ("Toy-GRACE-W4G128", "evaluate-w4", "toy-choice 75.0", "checkpoint teacher"):
        assert words in shown
