"""The checks that ask the Hugging Face Hub: downloads, and the scope of the token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import constants
from prefect.settings import PREFECT_API_URL, temporary_settings

from grace_core.config import GraceConfig
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.doctor.findings import (
    Severity,
    as_text,
)
from grace_core.doctor.hub import check_publishing, look_up
from operations.publishing_rights import check_token, check_token_of_publisher
from tests.findings import ROOT, one, toy
from tests.hub_server import Blob, Hub, Repository, running_hub

TOKEN = "hf_NeverToBeSeenAnywhere"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub(TOKEN) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        yield running


def publishing(endpoint: str) -> GraceConfig:
    return toy(
        f"publish.destination={{kind: hub, namespace: grace-lab, endpoint: '{endpoint}'}}",
        "models.teacher={path: grace-lab/teacher, revision: main}",
    )


def fine_grained(*permissions: str) -> dict[str, object]:
    entity = {"type": "org", "name": "grace-lab"}
    return {"scoped": [{"entity": entity, "permissions": list(permissions)}]}


@pytest.mark.parametrize(
    ("token", "more", "severity", "said"),
    [
        ({"role": "read"}, {}, Severity.PROBLEM, "the scope of HF_TOKEN is `read`"),
        ({"role": "write"}, {"name": "grace-lab"}, Severity.OK, "may write to grace-lab"),
        ({"role": "write"}, {}, Severity.PROBLEM, "is neither someone, the owner of HF_TOKEN"),
        (
            {"role": "write"},
            {"orgs": [{"name": "grace-lab", "roleInOrg": "write"}]},
            Severity.OK,
            "may write to the organisation grace-lab",
        ),
        (
            {"role": "write"},
            {"orgs": [{"name": "grace-lab", "roleInOrg": "read"}]},
            Severity.PROBLEM,
            "has the role 'read' in grace-lab",
        ),
        (
            {"role": "fineGrained", "fineGrained": fine_grained("repo.content.read")},
            {},
            Severity.PROBLEM,
            "may not write to grace-lab",
        ),
        (
            {"role": "fineGrained", "fineGrained": fine_grained("repo.write")},
            {},
            Severity.OK,
            "is fine-grained and may write to grace-lab",
        ),
        ({}, {}, Severity.UNCHECKED, "tells no scope"),
    ],
)
def test_the_scope_of_the_token_is_asked_for(
    hub: Hub, token: dict[str, object], more: dict[str, object], severity: Severity, said: str
) -> None:
    hub.who = {"type": "user", "name": "someone", "auth": {"accessToken": token}, **more}
    one(check_publishing(publishing(hub.endpoint)), severity, said)
    assert "GET /api/whoami-v2" in hub.requests


def test_no_token_a_wrong_one_and_a_server_in_trouble(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = publishing(hub.endpoint)
    hub.fail = {"whoami": 503}
    found = list(check_publishing(config))
    one(found, Severity.UNCHECKED, "the Hub answered 503")
    hub.fail = {}
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    found += check_publishing(config)
    one(found, Severity.PROBLEM, "was refused (401)")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found += check_publishing(config)
    one(found, Severity.PROBLEM, "HF_HUB_OFFLINE is set")
    monkeypatch.delenv("HF_TOKEN")
    found += check_publishing(config)
    one(found, Severity.PROBLEM, "HF_TOKEN is not set")
    assert TOKEN not in as_text(found)
    assert not list(check_publishing(toy())), "a directory needs no token"


def test_another_process_may_publish_with_another_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an approval: this process's HF_TOKEN need not be able to write."""
    hub.who = {"type": "user", "name": "someone", "auth": {"accessToken": {"role": "read"}}}
    config = publishing(hub.endpoint)
    one(check_token(config), Severity.PROBLEM, "the scope of HF_TOKEN is `read`")
    one(check_token_of_publisher(config), Severity.WARNING, "HF_TOKEN is `read` here; the")
    monkeypatch.delenv("HF_TOKEN")
    one(check_token_of_publisher(config), Severity.WARNING, "HF_TOKEN is not set here; the")


def test_a_block_helps_neither_the_command_line_nor_where_no_server_is_known(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    place = f"{{kind: hub, namespace: me, endpoint: '{hub.endpoint}', token_secret: hub-token}}"
    config = toy(f"publish.destination={place}")
    found = one(check_publishing(config), Severity.PROBLEM, "HF_TOKEN is not set")
    assert "only the deployments read the Secret block hub-token" in found.remedy
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        one(check_token(config), Severity.UNCHECKED, "the Secret block hub-token was not read")


def test_what_must_be_downloaded_is_looked_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Checkpoint(publishing(hub.endpoint).models.teacher, None)
    _, found = look_up(teacher)
    one(found, Severity.PROBLEM, "grace-lab/teacher is no repository of the Hub")
    hub.repositories["grace-lab/teacher"] = Repository(private=True, parameters=8_000_000_000)
    hub.repositories["grace-lab/teacher"].add_commit({"config.json": Blob(b"{}", large=False)})
    known, found = look_up(teacher)
    one(found, Severity.OK, "can be downloaded")
    assert known.parameters == 8_000_000_000
    assert not [r for r in hub.requests if "resolve" in r], "nothing is downloaded"
    wrong = teacher.source.model_copy(update={"revision": "0" * 40})
    one(look_up(Checkpoint(wrong, None))[1], Severity.PROBLEM, f"has no revision {'0' * 40}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    one(look_up(teacher)[1], Severity.PROBLEM, "must be downloaded, but HF_HUB_OFFLINE is set")


def test_a_hub_that_cannot_be_reached_is_a_problem(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    teacher = Checkpoint(publishing(nobody).models.teacher, None)
    one(look_up(teacher)[1], Severity.PROBLEM, f"{nobody} cannot be reached")
    one(check_publishing(publishing(nobody)), Severity.PROBLEM, f"{nobody} cannot be reached")
