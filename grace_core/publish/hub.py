"""Publishing a release of several models to the Hugging Face Hub: all of it, or nothing.

1. Lease: `publishing.json` in the index repository says who publishes what (`index.py`). What an
   interrupted publication of another release left on main branches is undone.
2. Staging: every model is sent to a staging branch of its repository, downloaded again and compared
   by SHA-256. Main branches are as they were.
3. Decision: once all are verified, the lease says so. From here on the publication is completed, by
   this run or by the next.
4. Switch of each model: one commit on main on top of the one that was there, then its tag.
5. Switch of the release: one commit in the index repository names the new commits and ends the
   lease.
6. What is to be public is made public; the staging branches go.

Each step looks before it acts. So the next run with the same release finds what is done, and does
the rest; a run with another release undoes it first. Until the fifth step the index names the old
release, whose commits stay in the history.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from grace_core.errors import GraceError
from grace_core.publish.content import CARD, ReleaseContent, set_id
from grace_core.publish.hub_connection import HubConnection
from grace_core.publish.hub_repository import (
    MAIN,
    HubRepository,
    moved_tag,
    shows,
    tree_digest,
)
from grace_core.publish.index import (
    INDEX,
    JOURNAL,
    IndexedModel,
    PlannedModel,
    Publication,
    ReleaseIndex,
    now,
    tag_of,
)
from grace_core.publish.lease import Lease

log = logging.getLogger(__name__)

STAGING = "staging-"
"""+ digits of the release: name of the branch that it is sent to first."""


@dataclass(frozen=True)
class HubTarget:
    """Where a release goes, and on whose behalf."""

    endpoint: str
    namespace: str
    index_repository: str
    """`owner/name` of the repository of the release index."""

    private: bool
    owner: str
    """Stands for the run directory; two publications of one owner are never at work at once."""

    tag: str | None = None
    token: str | None = field(default=None, repr=False)
    take_over: bool = False
    """Take the lease of another writer although it may be at work."""


@dataclass(frozen=True)
class Found:
    """What the index repository says."""

    head: str
    index: ReleaseIndex | None
    journal: Publication | None


Report = Callable[[int, int], None]
"""Is told bytes done and bytes to do; each byte is sent once and checked once."""


def publish_to_hub(
    contents: Sequence[ReleaseContent],
    target: HubTarget,
    index_card: Callable[[ReleaseIndex], str],
    room: Path,
    report: Report = lambda done, total: None,
) -> ReleaseIndex:
    """Publish these models as one release; returns the index that names their commits.

    Args:
        contents: one entry a model.
        index_card: makes the text of the index repository's `README.md`.
        room: folder that is made for the files that are downloaded again, one at a time, and
            removed.
        report: progress.

    Raises GraceError saying what to mend; the index then names the release that it named before.
    """
    hub = HubConnection(target.endpoint, target.token, target.namespace)
    return _Publisher(hub, contents, target, index_card, room, report).publish()


def read_index(repository: HubRepository) -> Found | None:
    """The index repository's state; None where there is no such repository.

    Raises GraceError when a file there cannot be understood.
    """
    if repository.info() is None:
        return None
    head = repository.head()
    assert head is not None
    tree = repository.tree(head)

    def text(path: str) -> bytes | None:
        return repository.read(path, head) if path in tree else None

    try:
        index, journal = text(INDEX), text(JOURNAL)
        return Found(
            head,
            None if index is None else ReleaseIndex.model_validate_json(index),
            None if journal is None else Publication.model_validate_json(journal),
        )
    except ValidationError as error:
        raise GraceError(
            f"{INDEX} or {JOURNAL} of {repository.name} cannot be read ({error.error_count()} "
            "problems); mend the file on the Hub, or publish with the version that wrote it"
        ) from error


def require_free_lease(found: Found, target: HubTarget) -> None:
    """Raise GraceError while another writer may be at work."""
    journal = found.journal
    if (
        journal is not None
        and journal.owner != target.owner
        and journal.is_fresh(now())
        and not target.take_over
    ):
        raise GraceError(
            f"another publication to {target.index_repository} is under way (last sign of life "
            f"{journal.renewed:%Y-%m-%d %H:%M:%S} UTC). Let it end; if you know that it is dead, "
            "`grace publish CONFIG --take-over`"
        )


def require_unmoved_tags(
    contents: Sequence[ReleaseContent], repositories: Mapping[str, HubRepository], tag: str
) -> None:
    """Raise GraceError where the tag stands for other files; before anything is sent."""
    for content in contents:
        repository = repositories[content.label]
        found = repository.tags().get(tag)
        if found is not None and not shows(repository.tree(found), content):
            raise moved_tag(repository.name, tag)


def release_tag(target: HubTarget, release: str, index: ReleaseIndex | None) -> str:
    """The tag that was asked for; else the one that this release has, or one named by content."""
    same = index is not None and index.release == release
    known = [model.tag for model in index.models.values() if model.tag] if index and same else []
    return target.tag or next(iter(known), tag_of(release))


class _Publisher:
    def __init__(
        self,
        hub: HubConnection,
        contents: Sequence[ReleaseContent],
        target: HubTarget,
        index_card: Callable[[ReleaseIndex], str],
        room: Path,
        report: Report,
    ) -> None:
        self._contents = contents
        self._target = target
        self._index_card = index_card
        self._room = room
        self._report = report
        self._total = 2 * sum(content.size for content in contents)
        self._done = 0
        self._release = set_id(contents)
        self._tag = ""
        """Of the release; known once the index is read."""
        self._hub = hub
        self._index = HubRepository(hub, target.index_repository)
        self._models = {
            content.label: HubRepository(hub, content.repository) for content in contents
        }
        self._lease = Lease(self._index)

    def publish(self) -> ReleaseIndex:
        self._prepare()
        found = read_index(self._index)
        assert found is not None
        self._tag = release_tag(self._target, self._release, found.index)
        if not self._is_published(found):
            require_free_lease(found, self._target)
            require_unmoved_tags(self._contents, self._models, self._tag)
            journal = self._acquire(found)
            journal = self._stage(journal)
            index = self._switch(journal)
        else:
            assert found.index is not None
            index = self._tagged(found.index, found.head)
        self._finish()
        return index

    def _tagged(self, index: ReleaseIndex, head: str) -> ReleaseIndex:
        """The index of what is published already, under the tag that is asked for now."""
        if all(model.tag == self._tag for model in index.models.values()):
            return index
        require_unmoved_tags(self._contents, self._models, self._tag)
        for label, model in index.models.items():
            self._models[label].tag(self._tag, model.commit)
        models = {
            label: model.model_copy(update={"tag": self._tag})
            for label, model in index.models.items()
        }
        renamed = index.model_copy(update={"models": models})
        self._index.write(self._files_of(renamed), head, f"Tag {self._tag}")
        return renamed

    def _files_of(self, index: ReleaseIndex) -> dict[str, bytes]:
        return {
            INDEX: (index.model_dump_json(indent=1) + "\n").encode(),
            CARD: self._index_card(index).encode(),
        }

    def _prepare(self) -> None:
        """Repositories are there, and none shows what is to be hidden."""
        for repository in (*self._models.values(), self._index):
            repository.create()
            info = repository.info()
            if self._target.private and info is not None and not info.private:
                raise GraceError(
                    f"{repository.name} exists and is public, but a private release was asked for; "
                    "make it private on the Hub, choose another name, or set "
                    "publish.destination.private to false"
                )

    def _is_published(self, found: Found) -> bool:
        """Whether the index names this release, main shows it, and nobody is at work."""
        if found.journal is not None or found.index is None:
            return False
        if found.index.release != self._release:
            return False
        return all(
            shows(self._models[content.label].tree(MAIN), content) for content in self._contents
        )

    def _acquire(self, found: Found) -> Publication:
        """Take the lease, and undo what another release's publication left on main branches."""
        self._lease.head = found.head
        before = found.journal
        resumed = before is not None and before.release == self._release
        undone = None
        if before is not None:  # one that was to undo another has changed nothing itself
            undone = before.interrupted or (None if resumed else before)
        models = {}
        for content in self._contents:
            known = before.models.get(content.label) if resumed and before is not None else None
            repository = self._models[content.label]
            head = repository.head()
            assert head is not None
            past = head
            if known is not None and known.tree is not None and head != known.before:
                # The interrupted run may have switched main; the past is what it showed before.
                switched = tree_digest(repository.tree(head)) == known.tree
                past = known.before if switched else head
            models[content.label] = PlannedModel(
                repository=content.repository,
                digest=content.digest,
                before=past,
                staged=known.staged if known else None,
                tree=known.tree if known else None,
            )
        journal = Publication(
            owner=self._target.owner,
            renewed=now(),
            release=self._release,
            tag=self._tag,
            models=models,
            decided=resumed and before is not None and before.decided,
            interrupted=undone,
        )
        self._lease.write(journal, "Begin to publish a release")
        if undone is None:
            return journal
        self._undo(undone)
        heads = {label: repository.head() for label, repository in self._models.items()}
        journal = journal.model_copy(
            update={
                "interrupted": None,
                "models": {
                    label: model.model_copy(update={"before": heads[label]})
                    for label, model in journal.models.items()
                },
            }
        )
        return self._lease.write(journal, "Undid an interrupted publication")

    def _undo(self, journal: Publication) -> None:
        """Main branches that an interrupted publication has changed show what they showed."""
        for model in journal.models.values():
            repository = HubRepository(self._hub, model.repository)
            head = repository.head()
            assert head is not None
            if head != model.before and tree_digest(repository.tree(head)) == model.tree:
                self._lease.require()
                repository.replace(MAIN, head, model.before, "Undo an interrupted publication")
                log.warning(
                    "%s: main shows commit %s again; its publication was interrupted",
                    model.repository,
                    model.before,
                )
            repository.drop_branches(STAGING)

    def _stage(self, journal: Publication) -> Publication:
        """Every model is on its staging branch and verified; the lease then says so."""
        branch = STAGING + self._release[:12]
        for content in self._contents:
            repository, planned = self._models[content.label], journal.models[content.label]
            if planned.staged is not None and repository.branches().get(branch) == planned.staged:
                self._advance(2 * content.size)  # verified by an earlier run
                continue
            repository.branch(branch, planned.before)
            try:
                with self._lease.renewed():
                    commit = repository.stage(content, branch, self._advance)
                    repository.verify(content, commit, self._room, self._advance)
            finally:
                shutil.rmtree(self._room, ignore_errors=True)
            planned = planned.model_copy(
                update={"staged": commit, "tree": tree_digest(repository.tree(commit))}
            )
            models = {**journal.models, content.label: planned}
            journal = self._lease.write(
                journal.model_copy(update={"models": models}), f"Staged {content.label}"
            )
        if journal.decided:
            return journal
        return self._lease.write(
            journal.model_copy(update={"decided": True}), "All models are staged and verified"
        )

    def _switch(self, journal: Publication) -> ReleaseIndex:
        """Main branch and tag of every model, then the index."""
        models = {}
        for content in self._contents:
            repository, planned = self._models[content.label], journal.models[content.label]
            assert planned.staged is not None
            self._lease.require()
            commit = repository.replace(
                MAIN, planned.before, planned.staged, f"Release {self._tag}"
            )
            if tree_digest(repository.tree(commit)) != planned.tree:
                raise GraceError(
                    f"commit {commit} of {repository.name} is not what was staged, though the Hub "
                    "took it for that; the index still names the old release. Publish again"
                )
            repository.tag(self._tag, commit)
            models[content.label] = IndexedModel(
                repository=content.repository,
                commit=commit,
                tag=self._tag,
                digest=content.digest,
                bytes=content.size,
            )
        index = ReleaseIndex(release=self._release, published=now().isoformat(), models=models)
        self._lease.end(self._files_of(index), f"Release {self._tag}")
        return index

    def _finish(self) -> None:
        """Visibility, and no branch that is not needed any more."""
        for repository in (*self._models.values(), self._index):
            info = repository.info()
            if not self._target.private and info is not None and info.private:
                repository.make_public()
        for repository in self._models.values():
            repository.drop_branches(STAGING)

    def _advance(self, size: int) -> None:
        self._lease.require_renewed()
        self._done += size
        self._report(self._done, self._total)
