"""Publishing to the Hub with the real client, against a local server that speaks its API."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

from grace_core.artifacts import digest_folder
from grace_core.errors import GraceError
from grace_core.publish import hub_connection
from grace_core.publish.content import read_content
from grace_core.publish.hub_repository import HubRepository
from grace_core.publish.index import INDEX, JOURNAL, LEASE, ReleaseIndex, now
from tests.hub_server import Blob, Fault, Hub, running_hub
from tests.publishing import (
    INDEX_REPOSITORY,
    LABELS,
    TAG,
    TOKEN,
    main_of,
    of,
    publish,
    published,
    release,
    target,
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub(TOKEN) as running:
        yield running


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits; what would have been waited, in seconds."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def test_what_is_downloaded_is_what_was_published(hub: Hub, tmp_path: Path) -> None:
    contents = release(tmp_path, "1")
    index = publish(hub, contents)
    assert published(hub) == index
    for content in contents:
        model = index.models[content.label]
        repository = hub.repositories[content.repository]
        assert repository.private
        assert len(repository.commits) == 2, "one commit on top of the repository's first"
        assert model.commit == repository.head == repository.tags[str(model.tag)]
        assert not repository.branches, "nothing of the staging is left"
        folder = Path(
            snapshot_download(
                content.repository,
                revision=model.commit,
                endpoint=hub.endpoint,
                token=TOKEN,
                local_dir=tmp_path / "loaded" / content.label,
            )
        )
        (folder / ".gitattributes").unlink()
        for path in (folder / ".cache").rglob("*"):
            path.unlink() if path.is_file() else None
        assert digest_folder(folder) == model.digest == content.digest
        # The weights went the way of large files, the rest inside the commit.
        assert repository.commits[-1][1]["model.safetensors"].large
        assert not repository.commits[-1][1]["config.json"].large
    assert hub.repositories[INDEX_REPOSITORY].private
    assert JOURNAL not in main_of(hub, INDEX_REPOSITORY)


def test_the_main_branches_wait_for_the_last_model_to_be_verified(hub: Hub, tmp_path: Path) -> None:
    publish(hub, release(tmp_path, "1"))
    hub.requests.clear()
    publish(hub, release(tmp_path, "2"))
    commits = [entry for entry in hub.requests if entry.endswith("/commit/main")]
    models = [entry for entry in commits if INDEX_REPOSITORY not in entry]
    downloads = [number for number, entry in enumerate(hub.requests) if "/resolve/" in entry]
    first, last = (hub.requests.index(models[end]) for end in (0, -1))
    assert len(models) == 2
    assert (
        max(number for number in downloads if "model.safetensors" in hub.requests[number]) < first
    ), "all weights are downloaded again before the first commit on a main branch"
    assert hub.requests.index(commits[-1], last) > last and INDEX_REPOSITORY in commits[-1]


def test_a_new_release_replaces_files_that_are_gone(hub: Hub, tmp_path: Path) -> None:
    first = publish(hub, release(tmp_path, "1"))
    contents = release(tmp_path, "2", {"bf16": LABELS["bf16"]})
    model = tmp_path / "2" / "bf16"
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    documents = {
        name: file.decode() for name, file in contents[0].files.items() if isinstance(file, bytes)
    }
    contents = [read_content("bf16", LABELS["bf16"], model, documents)]
    second = publish(hub, contents)
    assert first.models["bf16"].commit != second.models["bf16"].commit
    assert main_of(hub, LABELS["bf16"]) == of(contents[0])
    assert "model.safetensors" not in main_of(hub, LABELS["bf16"])
    old = hub.repositories[LABELS["bf16"]].files(first.models["bf16"].commit)
    assert old is not None and "model.safetensors" in old, "the old release can still be loaded"


def test_publishing_the_same_again_makes_no_commit(hub: Hub, tmp_path: Path) -> None:
    first = publish(hub, release(tmp_path, "1"))
    before = {name: len(entry.commits) for name, entry in hub.repositories.items()}
    hub.requests.clear()
    assert publish(hub, release(tmp_path, "1")) == first
    assert {name: len(entry.commits) for name, entry in hub.repositories.items()} == before
    assert not [entry for entry in hub.requests if entry.startswith("PUT /lfs/")]


def test_what_was_uploaded_is_not_sent_again(hub: Hub, tmp_path: Path, slept: list[float]) -> None:
    hub.fail["/commit/staging-"] = 500
    with pytest.raises(GraceError, match="kept"):
        publish(hub, release(tmp_path, "1"))
    sent = [entry for entry in hub.requests if entry.startswith("PUT /lfs/")]
    assert len(sent) == 1
    hub.fail.clear()
    publish(hub, release(tmp_path, "1"))
    assert sum(entry == sent[0] for entry in hub.requests) == 1


def test_progress_ends_with_everything_sent_and_checked(hub: Hub, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    contents = release(tmp_path, "1")
    publish(hub, contents, lambda *at: told.append(at))
    assert told == sorted(told)
    total = 2 * sum(len(data) for content in contents for data in of(content).values())
    assert told[-1] == (total, total)


def test_a_public_release_is_private_until_it_is_whole(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    def look() -> None:
        seen.append((published(hub) is None, any(not r.private for r in hub.repositories.values())))

    hub.after = look
    publish(hub, release(tmp_path, "1"), private=False)
    assert (True, True) not in seen, "nothing was public before the index named the release"
    assert not any(repository.private for repository in hub.repositories.values())


def test_a_private_release_is_not_put_into_a_public_repository(hub: Hub, tmp_path: Path) -> None:
    first = publish(hub, release(tmp_path, "1"), private=False)
    with pytest.raises(GraceError, match="public"):
        publish(hub, release(tmp_path, "2"), private=True)
    assert published(hub) == first
    assert main_of(hub, LABELS["w4"]) == of(release(tmp_path, "1")[1])


def test_a_tag_is_never_moved(hub: Hub, tmp_path: Path) -> None:
    first = publish(hub, release(tmp_path, "1"), tag="v1.0")
    assert publish(hub, release(tmp_path, "1"), tag="v1.0") == first
    hub.requests.clear()
    with pytest.raises(GraceError, match=r"v1\.0.*never moved"):
        publish(hub, release(tmp_path, "2"), tag="v1.0")
    assert not [entry for entry in hub.requests if "lfs" in entry], "told before anything is sent"
    assert published(hub) == first
    second = publish(hub, release(tmp_path, "2"), tag="v1.1")
    tags = hub.repositories[LABELS["bf16"]].tags
    assert tags == {"v1.0": first.models["bf16"].commit, "v1.1": second.models["bf16"].commit}


def test_a_tag_that_is_asked_for_later_is_made(
    hub: Hub, tmp_path: Path, slept: list[float]
) -> None:
    contents = release(tmp_path, "1")
    first = publish(hub, contents)
    commits = {name: entry.head for name, entry in hub.repositories.items()}
    interrupt(hub, f"POST /api/models/{INDEX_REPOSITORY}/commit")
    with pytest.raises(GraceError):
        publish(hub, contents, tag="v1.0")
    recover(hub)
    tagged = publish(hub, contents, tag="v1.0")
    assert published(hub) == tagged
    for label, model in first.models.items():
        assert tagged.models[label] == model.model_copy(update={"tag": "v1.0"})
        repository = hub.repositories[model.repository]
        assert repository.tags == {str(model.tag): model.commit, "v1.0": model.commit}
        assert repository.head == commits[model.repository], "what stands is only named"
    # Without a wish, it keeps the tag that it has.
    assert publish(hub, contents) == tagged


def test_a_tag_of_something_else_is_not_taken_for_what_stands(hub: Hub, tmp_path: Path) -> None:
    publish(hub, release(tmp_path, "1"), tag="v1.0")
    second = publish(hub, release(tmp_path, "2"), tag="v1.1")
    with pytest.raises(GraceError, match=r"v1\.0.*never moved"):
        publish(hub, release(tmp_path, "2"), tag="v1.0")
    assert published(hub) == second


def test_a_change_by_someone_else_is_not_overwritten(hub: Hub, tmp_path: Path) -> None:
    first = publish(hub, release(tmp_path, "1"))

    def someone_else(number: int, request: str) -> Fault | None:
        if request == f"POST /api/models/{LABELS['w4']}/commit/main":
            repository = hub.repositories[LABELS["w4"]]
            hub.fault = lambda number, request: None
            repository.add_commit({**repository.commits[-1][1], "note": Blob(b"hello", False)})
        return None

    hub.fault = someone_else
    with pytest.raises(GraceError, match="changed while publishing"):
        publish(hub, release(tmp_path, "2"))
    assert main_of(hub, LABELS["w4"])["note"] == b"hello"
    assert published(hub) == first
    # Said again, it is meant: the note stays in the history.
    publish(hub, release(tmp_path, "2"))
    assert "note" not in main_of(hub, LABELS["w4"])
    assert any("note" in files for _, files in hub.repositories[LABELS["w4"]].commits)


def test_a_server_that_keeps_something_else_is_found_out(hub: Hub, tmp_path: Path) -> None:
    first = publish(hub, release(tmp_path, "1"))

    def rot() -> None:
        for oid, content in hub.stored.items():
            if b"w4 2" in content:
                hub.stored[oid] = content.replace(b"w4 2", b"w4 3", 1)

    hub.after = rot
    with pytest.raises(GraceError, match=r"model\.safetensors comes back with another SHA-256"):
        publish(hub, release(tmp_path, "2"))
    assert published(hub) == first
    for content in release(tmp_path, "1"):
        assert main_of(hub, content.repository) == of(content)


def interrupt(hub: Hub, request: str) -> None:
    """From the first request that starts so, the server is gone."""
    gone = False

    def fault(number: int, asked: str) -> Fault | None:
        nonlocal gone
        gone = gone or asked.startswith(request)
        return Fault("reset") if gone else None

    hub.fault = fault


def recover(hub: Hub) -> None:
    hub.fault = lambda number, request: None


@pytest.mark.parametrize("times", [1, 2])
def test_another_release_undoes_an_interrupted_one(
    hub: Hub, tmp_path: Path, slept: list[float], times: int
) -> None:
    first, one = publish(hub, release(tmp_path, "1")), release(tmp_path, "1")
    for _ in range(times):  # the second finds the main branch that the first has switched
        interrupt(hub, f"POST /api/models/{LABELS['w4']}/commit/main")
        with pytest.raises(GraceError):
            publish(hub, release(tmp_path, "2"))
        recover(hub)
        assert published(hub) == first
    assert main_of(hub, LABELS["bf16"])["README.md"].endswith(b"bf16 2\n"), "half switched"
    # A release without the model that was switched: this one must not be left alone.
    only = {"w4": LABELS["w4"]}
    index = publish(hub, release(tmp_path, "3", only))
    assert published(hub) == index and list(index.models) == ["w4"]
    assert main_of(hub, LABELS["bf16"]) == of(one[0])
    assert main_of(hub, LABELS["w4"]) == of(release(tmp_path, "3", only)[0])
    assert not any(repository.branches for repository in hub.repositories.values())


def test_two_writers_do_not_write_at_once(
    hub: Hub, tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(hub, release(tmp_path, "1"))
    interrupt(hub, "PUT /lfs/")
    with pytest.raises(GraceError):
        publish(hub, release(tmp_path, "2"), owner="first")
    recover(hub)
    with pytest.raises(GraceError, match=r"under way.*--take-over"):
        publish(hub, release(tmp_path, "3"), owner="second")
    assert published(hub) == first
    later = now() + LEASE + timedelta(seconds=1)
    with monkeypatch.context() as patched:
        patched.setattr("grace_core.publish.hub.now", lambda: later)
        third = publish(hub, release(tmp_path, "3"), owner="second")
    assert published(hub) == third, "a writer without a sign of life is given up"


def test_the_lease_is_renewed_while_a_file_is_in_transit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of files that take longer to send than the lease lasts."""
    lease = f"POST /api/models/{INDEX_REPOSITORY}/commit/main"
    stage, renewed = HubRepository.stage, []

    def slow(self: HubRepository, *arguments: Any) -> str:
        before = hub.requests.count(lease)
        renewed.append(wait_until(lambda: hub.requests.count(lease) >= before + 2))
        return stage(self, *arguments)

    monkeypatch.setattr(HubRepository, "stage", slow)
    renew_often(monkeypatch)
    index = publish(hub, release(tmp_path, "1"))
    assert renewed == [True, True]
    assert published(hub) == index and JOURNAL not in main_of(hub, INDEX_REPOSITORY)


def test_a_lease_that_is_lost_while_a_file_is_in_transit_is_told(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(hub, release(tmp_path, "1"))
    stage = HubRepository.stage

    def slow(self: HubRepository, *arguments: Any) -> str:
        repository = hub.repositories[INDEX_REPOSITORY]
        with hub.lock:
            repository.add_commit({**repository.commits[-1][1], "taken": Blob(b"", False)})
        threads = [thread for thread in threading.enumerate() if thread.name == "lease"]
        assert wait_until(lambda: not any(thread.is_alive() for thread in threads))
        return stage(self, *arguments)

    monkeypatch.setattr(HubRepository, "stage", slow)
    renew_often(monkeypatch)
    hub.requests.clear()
    with pytest.raises(GraceError, match=r"took over|changed while publishing"):
        publish(hub, release(tmp_path, "2"))
    assert published(hub) == first
    assert not [entry for entry in hub.requests if "/commit/staging" in entry], "it ends at once"


def renew_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few milliseconds, as if minutes had gone by: a commit that changes nothing is none."""
    start, times = now(), itertools.count()
    monkeypatch.setattr("grace_core.publish.lease.RENEWED_AFTER", timedelta(milliseconds=20))
    monkeypatch.setattr(
        "grace_core.publish.lease.now", lambda: start + timedelta(minutes=10 * next(times))
    )


def wait_until(happened: Callable[[], bool]) -> bool:
    """Whether it happened before anybody would lose patience."""
    patience = threading.Event()
    return any(happened() or patience.wait(0.01) for _ in range(2000))


@pytest.mark.parametrize(
    "when", ["Staged bf16", "Staged w4", "All models are staged and verified", f"Release {TAG}"]
)
def test_a_writer_whose_lease_was_taken_changes_nothing_more(
    hub: Hub, tmp_path: Path, when: str
) -> None:
    publish(hub, release(tmp_path, "1"))
    taken: list[ReleaseIndex] = []
    write = HubRepository.write

    def overtaken(self: HubRepository, files: Any, before: str, message: str) -> str:
        """Between two requests of the first writer, a second one publishes another release."""
        if message == when:
            patched.undo()
            taken.append(publish(hub, release(tmp_path, "3"), owner="second", take_over=True))
        return write(self, files, before, message)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HubRepository, "write", overtaken)
        with pytest.raises(GraceError, match="took over"):
            publish(hub, release(tmp_path, "2"), tag=TAG)
    assert [published(hub)] == taken
    for content in release(tmp_path, "3"):
        assert main_of(hub, content.repository) == of(content)


@pytest.mark.parametrize(("status", "words"), [(401, "write"), (403, "namespace")])
def test_a_refused_token_is_explained(hub: Hub, tmp_path: Path, status: int, words: str) -> None:
    hub.fail["."] = status
    with pytest.raises(GraceError, match=str(status)) as caught:
        publish(hub, release(tmp_path, "1"))
    assert "token" in str(caught.value) and words in str(caught.value)
    assert TOKEN not in str(caught.value), "the server repeats the token, the error must not"


def test_a_wrong_token_is_explained(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="401") as caught:
        publish(hub, release(tmp_path, "1"), token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)
    assert not hub.repositories


def test_the_token_may_come_from_the_environment_only(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GraceError, match="HF_TOKEN"):
        publish(hub, release(tmp_path, "1"), token=None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert publish(hub, release(tmp_path, "1"), token=None).models


def test_the_token_is_not_written_anywhere(
    hub: Hub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    slept: list[float],
) -> None:
    caplog.set_level(logging.DEBUG)
    publish(hub, release(tmp_path, "1"))
    hub.fail["/commit/"] = 500
    with pytest.raises(GraceError) as caught:
        publish(hub, release(tmp_path, "2"))
    told = capfd.readouterr()
    assert caplog.records
    assert TOKEN not in caplog.text + told.out + told.err + str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    on_hub = b"".join(
        b
        for r in hub.repositories.values()
        for f in r.known.values()
        for b in (x.content for x in f.values())
    )
    assert TOKEN.encode() not in on_hub
    assert TOKEN not in repr(target(hub)), "nor shown when the target is"


def test_a_server_that_asks_for_patience_gets_it(
    hub: Hub, tmp_path: Path, slept: list[float]
) -> None:
    asked: list[str] = []

    def busy(number: int, request: str) -> Fault | None:
        if "/commit/" in request and request not in asked:
            asked.append(request)
            return Fault("429")
        return None

    hub.fault = busy
    assert publish(hub, release(tmp_path, "1")) == published(hub)
    assert asked and slept == [7.0] * len(asked), "as long as Retry-After says"


def test_a_server_that_asks_for_too_much_patience_is_left_alone(
    hub: Hub, tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_connection, "LONGEST_WAIT", 5.0)
    hub.fault = lambda number, request: Fault("429") if "/commit/" in request else None
    with pytest.raises(GraceError, match="429"):
        publish(hub, release(tmp_path, "1"))
    assert not slept


def test_an_unreachable_hub_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub(TOKEN) as stopped:
        pass
    with pytest.raises(GraceError, match="publish again"):
        publish(stopped, release(tmp_path, "1"))


def test_the_offline_switch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with running_hub(TOKEN) as hub, pytest.raises(GraceError, match="HF_HUB_OFFLINE"):
        publish(hub, release(tmp_path, "1"))


def test_an_index_that_nobody_understands_is_not_overwritten(hub: Hub, tmp_path: Path) -> None:
    publish(hub, release(tmp_path, "1"))
    repository = hub.repositories[INDEX_REPOSITORY]
    repository.add_commit({**repository.commits[-1][1], INDEX: Blob(b"{}", False)})
    with pytest.raises(GraceError, match="cannot be read"):
        publish(hub, release(tmp_path, "2"))


def test_the_index_leads_to_the_models(hub: Hub, tmp_path: Path) -> None:
    contents = release(tmp_path, "1")
    publish(hub, contents)
    where = {"endpoint": hub.endpoint, "token": TOKEN}
    file = hf_hub_download(INDEX_REPOSITORY, INDEX, cache_dir=tmp_path / "cache", **where)
    chosen = json.loads(Path(file).read_text())["models"]["w4"]
    weights = hf_hub_download(
        chosen["repository"],
        "model.safetensors",
        revision=chosen["commit"],
        cache_dir=tmp_path / "cache",
        **where,
    )
    assert Path(weights).read_bytes() == of(contents[1])["model.safetensors"]
