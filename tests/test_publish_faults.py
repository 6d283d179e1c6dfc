"""Publishing to the Hub while something fails, at every request in turn.

For each request that a publication makes, the same publication is disturbed there. Whatever
happens, each main branch shows the old release or the new one, whole; the index names models that
were published together; and the next run completes the new release.
"""

from __future__ import annotations

import copy
import multiprocessing
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from grace_core.errors import GraceError
from grace_core.publish.content import ReleaseContent
from grace_core.publish.hub import HubTarget
from grace_core.publish.index import ReleaseIndex
from tests.hub_server import Fault, Hub, running_hub
from tests.publishing import LABELS, TOKEN, main_of, of, publish, published, release, send, target

pytestmark = pytest.mark.slow

EVERY_COMBINATION = pytest.param(True, marks=pytest.mark.chaos, id="every-combination")
PASSING = ("reset", "lost", "500", "429", "truncated")
LASTING = ("reset", "lost", "500", "412")
KILLING = ("kill", "killed")


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    go_online(monkeypatch.setattr)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def go_online(set_value: Callable[[object, str, object], None] = setattr) -> None:
    """The client of this process may use the network, without extras."""
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_DISABLE_TELEMETRY", True),
    ):
        set_value(constants, name, value)


class Trials:
    """The same publication over and over, each time disturbed at another request."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub = hub
        self.old, self.new = release(folder, "1"), release(folder, "2")
        publish(hub, self.old)
        self._start = copy.deepcopy((hub.repositories, hub.stored))
        first = published(hub)
        assert first is not None
        hub.requests.clear()
        publish(hub, self.new)
        self.requests = list(hub.requests)
        self._shown = {
            repository: [
                of(each) for each in (*self.old, *self.new) if each.repository == repository
            ]
            for repository in LABELS.values()
        }
        self._broken: list[str] = []
        hub.after = self._look

    def start(self, fault: Callable[[int, str], Fault | None]) -> None:
        """The old release is there; what comes next is disturbed."""
        self.hub.repositories, self.hub.stored = copy.deepcopy(self._start)
        self.hub.requests.clear()
        self.hub.fault = fault

    def require_sound(self, at: int, kind: str) -> None:
        """What users could see was one release or the other, after every single request."""
        assert not self._broken, f"{kind} at {at} ({self.requests[at]}): {self._broken}"

    def require_complete(self, index: ReleaseIndex) -> None:
        """The new release is there, by one commit a model, and nothing else is left."""
        assert published(self.hub) == index
        for content in self.new:
            assert main_of(self.hub, content.repository) == of(content)
            repository = self.hub.repositories[content.repository]
            assert index.models[content.label].commit == repository.head
            assert not repository.branches
            assert len(repository.commits) == 3, "the Hub's own, the old and the new release"

    def _look(self) -> None:
        for repository, allowed in self._shown.items():
            if main_of(self.hub, repository) not in allowed:
                self._broken.append(f"main of {repository}")
        index = published(self.hub)
        assert index is not None
        versions = set()
        for label, model in index.models.items():
            repository = self.hub.repositories[model.repository]
            if repository.tags.get(str(model.tag)) != model.commit:
                self._broken.append(f"tag of {label}")
            card = (repository.files(model.commit) or {})["README.md"].content
            versions |= set(re.findall(rb"# \w+ (\d)", card))
        if len(versions) != 1:
            self._broken.append("the index names a mixture")


@pytest.fixture
def trials(tmp_path: Path) -> Iterator[Trials]:
    with running_hub(TOKEN) as hub:
        yield Trials(hub, tmp_path)


def chosen(trials: Trials, kinds: tuple[str, ...], every: bool) -> Iterator[tuple[int, str]]:
    """Requests with what befalls them: all pairs, or every request with one kind in turn."""
    for at in range(len(trials.requests)):
        for kind in kinds if every else (kinds[at % len(kinds)],):
            yield at, kind


def test_it_takes_all_kinds_of_requests(trials: Trials) -> None:
    assert len(trials.requests) > 80
    for part in ("/branch/", "/commit/staging-", "/lfs/", "/resolve/", "/commit/main", "/tag/"):
        assert [entry for entry in trials.requests if part in entry], part


@pytest.mark.parametrize("every", [False, EVERY_COMBINATION])
def test_a_passing_fault_at_any_request_is_survived(trials: Trials, every: bool) -> None:
    for at, kind in chosen(trials, PASSING, every):
        trials.start(lambda number, _, at=at, kind=kind: Fault(kind) if number == at else None)  # type: ignore[misc]
        index = publish(trials.hub, trials.new)
        trials.require_sound(at, kind)
        trials.require_complete(index)


@pytest.mark.parametrize("every", [False, EVERY_COMBINATION])
def test_the_next_run_completes_what_any_lasting_fault_ended(trials: Trials, every: bool) -> None:
    for at, kind in chosen(trials, LASTING, every):
        trials.start(lambda number, _, at=at, kind=kind: Fault(kind) if number >= at else None)  # type: ignore[misc]
        with pytest.raises(GraceError) as caught:
            publish(trials.hub, trials.new)
        assert TOKEN not in str(caught.value)
        trials.hub.fault = lambda number, request: None
        index = publish(trials.hub, trials.new)
        trials.require_sound(at, kind)
        trials.require_complete(index)


@pytest.mark.parametrize("every", [False, EVERY_COMBINATION])
def test_the_next_run_completes_what_a_killed_one_left(trials: Trials, every: bool) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "tests.publishing"])
    to = target(trials.hub)
    for at, kind in chosen(trials, KILLING, every):
        publisher = context.Process(target=_publish_alone, args=(trials.new, to))

        def kill(number: int, _: str, at: int = at, kind: str = kind) -> Fault | None:
            return Fault(kind, publisher.pid or 0) if number == at else None  # noqa: B023

        trials.start(kill)
        publisher.start()
        publisher.join()
        assert publisher.exitcode == -9, f"{kind} at {at}"
        trials.hub.fault = lambda number, request: None
        index = publish(trials.hub, trials.new)
        trials.require_sound(at, kind)
        trials.require_complete(index)


def _publish_alone(contents: list[ReleaseContent], to: HubTarget) -> None:
    go_online()
    send(contents, to)
