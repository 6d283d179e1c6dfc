"""The Hub's token in a flow: from a Prefect Secret block to the Hub, and to no other place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlflow
import pytest
from huggingface_hub import constants
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_HOME
from prefect.testing.utilities import prefect_test_harness

from flows.pipeline import grace
from grace_core.artifacts import Artifact
from grace_core.config import load_config
from grace_core.config.tree import GraceConfig
from grace_core.doctor.findings import NotReady, Severity
from grace_core.errors import GraceError
from grace_core.publish.approval import Approval
from grace_core.publish.release_set import FROM_ENVIRONMENT, HubAccess
from grace_core.stages import StageContext
from operations.publishing_rights import check_token_of_publisher
from tests.findings import one
from tests.hub_server import Hub, running_hub
from tests.publishing import TOKEN, published, release, send, target
from tests.stand_in_stages import StandIns

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SECRET = "token-of-the-hub"


class Publishing(StandIns):
    """Stages that stand in, but for the last: it really sends something to a Hub."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        super().__init__()
        self._hub, self._folder = hub, folder

    def publish(
        self,
        config: GraceConfig,
        releases: Mapping[str, Artifact],
        evaluations: Mapping[str, Artifact],
        context: StageContext,
        approval: Approval | None = None,
        access: HubAccess = FROM_ENVIRONMENT,
    ) -> Artifact:
        send(release(self._folder, "1"), target(self._hub, token=access.token))
        return super().publish(config, releases, evaluations, context, approval, access)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Path]]:
    """Everything that is written: the run, MLflow's records and files, Prefect's database."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.create_experiment("secrets", artifact_location=str(tmp_path / "artifacts"))
    with prefect_test_harness(server_startup_timeout=180):
        Secret(value=TOKEN).save(SECRET)
        database = Path(PREFECT_API_DATABASE_CONNECTION_URL.value().split("///")[-1])
        assert SECRET.encode() in b"".join(file.read_bytes() for file in database.parent.glob("*"))
        yield [tmp_path, database.parent, Path(PREFECT_HOME.value())]
    mlflow.set_tracking_uri(before)


def holders(places: list[Path]) -> list[Path]:
    """Files that the token stands in."""
    files = {
        Path(folder) / name
        for place in places
        for folder, _, names in os.walk(place)
        for name in names
    }
    assert any(file.suffix == ".db" and "mlflow" in file.name for file in files)
    return [file for file in files if file.is_file() and TOKEN.encode() in file.read_bytes()]


def test_the_token_reaches_the_hub_and_nothing_else(
    places: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(ROOT)
    with running_hub(TOKEN) as hub:
        Publishing(hub, tmp_path / "models").install(monkeypatch)
        where = (
            f"{{kind: hub, namespace: grace, endpoint: '{hub.endpoint}', token_secret: {SECRET}}}"
        )
        overrides = [
            f"run_dir={tmp_path}/run",
            "tracking.experiment=secrets",
            f"publish.destination={where}",
        ]
        hub.fail["repos/create"] = 403  # the server repeats the token in its answer
        with pytest.raises(GraceError, match="403") as caught:
            grace("configs/toy.yaml", overrides)
        assert TOKEN not in str(caught.value)
        hub.fail.clear()
        grace("configs/toy.yaml", overrides)
        assert published(hub) is not None
    told = capfd.readouterr()
    assert TOKEN not in told.out + told.err + caplog.text
    assert holders(places) == []


def test_the_block_is_looked_at_before_any_work(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(ROOT)
    stages = StandIns()
    stages.install(monkeypatch)
    overrides = [f"run_dir={tmp_path}/run", "tracking.experiment=secrets"]

    def where(endpoint: str, block: str) -> list[str]:
        place = f"{{kind: hub, namespace: me, endpoint: '{endpoint}', token_secret: {block}}}"
        return [*overrides, f"publish.destination={place}"]

    with running_hub(TOKEN) as hub:
        with pytest.raises(NotReady, match="no Secret block nowhere"):
            grace("configs/toy.yaml", where(hub.endpoint, "nowhere"))
        hub.who = {"type": "user", "name": "me", "auth": {"accessToken": {"role": "read"}}}
        with pytest.raises(NotReady, match=f"scope of the Secret block {SECRET} is `read`") as told:
            grace("configs/toy.yaml", where(hub.endpoint, SECRET))
        assert TOKEN not in str(told.value)
        assert stages.made == []
        asks = load_config("configs/toy.yaml", where(hub.endpoint, SECRET))
        one(check_token_of_publisher(asks), Severity.PROBLEM, "is `read`")
