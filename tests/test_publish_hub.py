"""Publishing to the Hub with the real client, against a local server that speaks its API."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from grace_core.errors import GraceError
from grace_core.publish.directory import Published
from grace_core.publish.hub import publish_to_hub
from tests.hub_server import Blob, Hub, Repository, running_hub

TOKEN = "hf_NeverToBeSeenAnywhere"
CARD = "---\nlicense: apache-2.0\n---\n\n# A card\n"
MANIFEST = json.dumps({"format": 1}) + "\n"
PICTURE = "<svg/>\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub(TOKEN) as running:
        yield running


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    (folder / "extra").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (folder / "extra" / "notes.txt").write_text("")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 300)
    return folder


def publish(hub: Hub, release: Path, token: str | None = TOKEN, **changes: object) -> Published:
    settings = {"namespace": "grace", "name": "Toy-BF16", "private": True, **changes}
    return publish_to_hub(
        release,
        {"README.md": CARD, "grace_manifest.json": MANIFEST, "lineage.svg": PICTURE},
        endpoint=hub.endpoint,
        token=token,
        **settings,  # type: ignore[arg-type]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_is_downloaded_is_what_was_published(hub: Hub, release: Path, tmp_path: Path) -> None:
    published = publish(hub, release)
    repository = hub.repositories["grace/Toy-BF16"]
    assert published == Published(f"{hub.endpoint}/grace/Toy-BF16", repository.head)
    assert repository.private
    assert len(repository.commits) == 2, "one commit on top of the repository's first"
    folder = snapshot_download(
        "grace/Toy-BF16", endpoint=hub.endpoint, token=TOKEN, cache_dir=tmp_path / "cache"
    )
    found = contents(Path(folder))
    assert found.pop(".gitattributes")
    assert found == contents(release) | {
        "README.md": CARD.encode(),
        "grace_manifest.json": MANIFEST.encode(),
        "lineage.svg": PICTURE.encode(),
    }
    # The weights went the way of large files, the rest inside the commit.
    assert repository.commits[-1][1]["model.safetensors"].large
    assert not repository.commits[-1][1]["config.json"].large


def test_a_new_release_replaces_files_that_are_gone(hub: Hub, release: Path) -> None:
    first = publish(hub, release)
    (release / "model.safetensors").rename(release / "model-00001-of-00001.safetensors")
    second = publish(hub, release)
    assert first.revision != second.revision
    (_, old), (_, new) = hub.repositories["grace/Toy-BF16"].commits[-2:]
    assert "model.safetensors" in old and "model.safetensors" not in new
    assert new["model-00001-of-00001.safetensors"] == old["model.safetensors"]


def test_publishing_the_same_again_makes_no_commit(hub: Hub, release: Path) -> None:
    # The client asks for each file's id and commits only what differs.
    first = publish(hub, release)
    commits = len(hub.repositories["grace/Toy-BF16"].commits)
    assert publish(hub, release) == first
    assert len(hub.repositories["grace/Toy-BF16"].commits) == commits


@pytest.mark.parametrize("path", ["/commit/", "/lfs/", "objects/batch", "repos/create"])
def test_a_failing_server_leaves_the_old_release(
    hub: Hub, release: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(hub, release)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    (release / "model.safetensors").write_bytes(b"new weights")
    hub.fail[path] = 500
    with pytest.raises(GraceError, match="again") as caught:
        publish(hub, release)
    assert hub.repositories["grace/Toy-BF16"].head == first.revision
    assert "500" in str(caught.value)
    assert TOKEN not in str(caught.value), "the server repeats the token, the error must not"
    hub.fail.clear()
    assert publish(hub, release).revision != first.revision


@pytest.mark.parametrize(("status", "words"), [(401, "write"), (403, "namespace")])
def test_a_refused_token_is_explained(hub: Hub, release: Path, status: int, words: str) -> None:
    hub.fail["."] = status
    with pytest.raises(GraceError, match=str(status)) as caught:
        publish(hub, release)
    assert "token" in str(caught.value) and words in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_wrong_token_is_explained(hub: Hub, release: Path) -> None:
    with pytest.raises(GraceError, match="401") as caught:
        publish(hub, release, token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)
    assert not hub.repositories


def test_the_token_may_come_from_the_environment_only(
    hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GraceError, match="HF_TOKEN"):
        publish(hub, release, token=None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert publish(hub, release, token=None).revision


def test_the_token_is_not_logged(
    hub: Hub, release: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    publish(hub, release)
    hub.fail["/commit/"] = 500
    (release / "config.json").write_text("{}")
    with pytest.raises(GraceError):
        publish(hub, release)
    printed = capfd.readouterr()
    assert caplog.records
    assert TOKEN not in caplog.text + printed.out + printed.err


def test_a_change_by_someone_else_is_not_overwritten(hub: Hub, release: Path) -> None:
    publish(hub, release)
    (release / "config.json").write_text("{}")

    def someone_else(repository: Repository) -> None:
        repository.add_commit({**repository.commits[-1][1], "note": Blob(b"hello", False)})

    hub.before_commit.append(someone_else)
    with pytest.raises(GraceError, match="changed while publishing"):
        publish(hub, release)
    assert "note" in hub.repositories["grace/Toy-BF16"].commits[-1][1]


def test_a_private_release_is_not_put_into_a_public_repository(hub: Hub, release: Path) -> None:
    first = publish(hub, release, private=False)
    (release / "config.json").write_text("{}")
    with pytest.raises(GraceError, match="public"):
        publish(hub, release, private=True)
    assert hub.repositories["grace/Toy-BF16"].head == first.revision


def test_a_server_that_keeps_something_else_is_found_out(hub: Hub, release: Path) -> None:
    damaged = Blob(b"bit rot", large=True)

    def damage(repository: Repository) -> None:
        add = repository.add_commit
        repository.add_commit = lambda files: add(  # type: ignore[method-assign]
            {**files, "model.safetensors": damaged}
        )

    hub.before_commit.append(damage)
    with pytest.raises(GraceError, match=r"model\.safetensors has another SHA-256"):
        publish(hub, release)


def test_an_unreachable_hub_is_explained(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub(TOKEN) as stopped:
        pass
    with pytest.raises(GraceError, match="publish again"):
        publish(stopped, release)


def test_the_offline_switch_is_named(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with running_hub(TOKEN) as hub, pytest.raises(GraceError, match="HF_HUB_OFFLINE"):
        publish(hub, release)
