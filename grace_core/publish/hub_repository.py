"""One repository of the Hub: what stands there, and the steps that bring it to what should.

Every step looks before it acts and does nothing where all is as it should be, so that it may be
repeated after an answer that was lost, and by the run after one that was killed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile

from grace_core.artifacts import digest_of
from grace_core.errors import GraceError
from grace_core.publish.content import FileFacts, ReleaseContent, facts_of
from grace_core.publish.hub_connection import HubConnection

T = TypeVar("T")

MAIN = "main"
_OF_THE_HUB = frozenset({".gitattributes"})
"""Files the Hub writes itself."""
_SENT_ALONE = 1 << 20
"""Bytes from which a file is sent in a step of its own, so that it need not be sent again."""

Tree = Mapping[str, RepoFile]
Sent = Callable[[int], None]
"""Is told how many bytes have arrived, or were found to be there."""


class HubRepository:
    """A model repository; `name` is `owner/name`."""

    def __init__(self, hub: HubConnection, name: str) -> None:
        self.name = name
        self._hub = hub
        self._api = hub.api

    @property
    def address(self) -> str:
        return f"{self._hub.endpoint}/{self.name}"

    def create(self) -> None:
        """Have it there; one that is made now is private until all of its release is public."""
        self._do(lambda: self._api.create_repo(self.name, private=True, exist_ok=True))

    def info(self) -> ModelInfo | None:
        """None where there is no such repository, or none that the token may see."""

        def ask() -> ModelInfo | None:
            try:
                return self._api.model_info(self.name)
            except RepositoryNotFoundError:
                return None

        return self._do(ask)

    def head(self, revision: str = MAIN) -> str | None:
        """Commit of a branch or tag; None where there is none."""

        def ask() -> str | None:
            try:
                return self._api.model_info(self.name, revision=revision).sha
            except RevisionNotFoundError:
                return None

        return self._do(ask)

    def tree(self, revision: str) -> Tree:
        """Files of a revision, by path; those that the Hub writes itself are left out."""

        def ask() -> Tree:
            entries = self._api.list_repo_tree(self.name, revision=revision, recursive=True)
            files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
            return {path: file for path, file in files.items() if path not in _OF_THE_HUB}

        return self._do(ask)

    def read(self, path: str, revision: str) -> bytes:
        """A small file of a commit."""
        with tempfile.TemporaryDirectory() as folder:
            return self._download(path, revision, Path(folder)).read_bytes()

    def branch(self, branch: str, start: str) -> None:
        """Have a branch; one that is made now starts at the commit `start`."""
        self._do(
            lambda: self._api.create_branch(self.name, branch=branch, revision=start, exist_ok=True)
        )

    def branches(self) -> dict[str, str]:
        """Commit of each branch."""
        refs = self._do(lambda: self._api.list_repo_refs(self.name))
        return {ref.name: ref.target_commit for ref in refs.branches}

    def tags(self) -> dict[str, str]:
        """Commit of each tag."""
        refs = self._do(lambda: self._api.list_repo_refs(self.name))
        return {ref.name: ref.target_commit for ref in refs.tags}

    def drop_branches(self, prefix: str) -> None:
        """Delete the branches whose name starts so."""

        def drop() -> None:
            refs = self._api.list_repo_refs(self.name).branches
            for name in [ref.name for ref in refs if ref.name.startswith(prefix)]:
                self._api.delete_branch(self.name, branch=name)

        self._do(drop)

    def stage(self, content: ReleaseContent, branch: str, sent: Sent) -> str:
        """Have exactly this content on a branch, and its commit.

        Large files are sent one by one, each only where the Hub does not hold it already.
        """
        large = [
            name
            for name, facts in content.facts.items()
            if facts.size >= _SENT_ALONE or name.endswith(".safetensors")
        ]
        additions = {name: CommitOperationAdd(name, file) for name, file in content.files.items()}
        arrived = self.tree(branch)
        for name in large:
            if not _is(arrived.get(name), content.facts[name]):
                self._do(
                    lambda name=name: self._api.preupload_lfs_files(  # type: ignore[misc]
                        self.name, [additions[name]], revision=branch, free_memory=False
                    )
                )
            sent(content.facts[name].size)

        def commit() -> str:
            head = self._api.model_info(self.name, revision=branch).sha
            assert head is not None
            present = self.tree(head)
            wrong = [
                name for name, facts in content.facts.items() if not _is(present.get(name), facts)
            ]
            surplus = sorted(present.keys() - content.files.keys())
            if not wrong and not surplus:
                return head
            return self._api.create_commit(
                self.name,
                operations=[
                    *(additions[name] for name in wrong),
                    *(CommitOperationDelete(path) for path in surplus),
                ],
                commit_message="Stage a release",
                revision=branch,
                parent_commit=head,
            ).oid

        staged = self._do(commit)
        sent(sum(facts.size for name, facts in content.facts.items() if name not in large))
        return staged

    def verify(self, content: ReleaseContent, commit: str, room: Path, checked: Sent) -> None:
        """Download every file of a commit and compare it with what was meant.

        room: an empty folder that one file at a time is downloaded to.

        Raises GraceError naming the files that are not what was sent.
        """
        listed = self.tree(commit)
        problems = [
            f"{path} should not be there" for path in sorted(listed.keys() - content.files.keys())
        ]
        for name, facts in content.facts.items():
            if name not in listed:
                problems.append(f"{name} is missing")
                continue
            if not _is(listed[name], facts):
                problems.append(f"{name} is listed with another digest")
            file = self._download(name, commit, room)
            found = facts_of(file)
            file.unlink()
            if found.sha256 != facts.sha256:
                problems.append(f"{name} comes back with another SHA-256")
            checked(facts.size)
        if problems:
            raise GraceError(
                f"commit {commit} of {self.name} is not what was sent; no main branch was changed. "
                "Publish again:\n  - " + "\n  - ".join(problems)
            )

    def replace(self, branch: str, before: str, source: str, message: str) -> str:
        """Have a branch show the content of the commit `source`, by one commit on top of `before`.

        Nothing is sent again: the files are copied within the repository.

        Raises GraceError when the branch has moved on from `before` to another content.
        """

        def commit() -> str:
            head = self._api.model_info(self.name, revision=branch).sha
            assert head is not None
            wanted, present = self.tree(source), self.tree(head)
            if ids(wanted) == ids(present):
                return head
            if head != before:
                raise GraceError(
                    f"{self.name}: {branch} changed while publishing, from {before} to {head}; "
                    "nothing was overwritten. Look at its newest commit and publish again"
                )
            other = [
                path
                for path, file in wanted.items()
                if path not in present or present[path].blob_id != file.blob_id
            ]
            return self._api.create_commit(
                self.name,
                operations=[
                    *(CommitOperationCopy(path, path, src_revision=source) for path in other),
                    *(
                        CommitOperationDelete(path)
                        for path in sorted(present.keys() - wanted.keys())
                    ),
                ],
                commit_message=message,
                revision=branch,
                parent_commit=head,
            ).oid

        return self._do(commit)

    def write(self, files: Mapping[str, bytes | None], before: str, message: str) -> str:
        """Write small files to the main branch in one commit on top of `before`; None deletes.

        Raises GraceError when somebody else has committed since.
        """

        def commit() -> str:
            head = self._api.model_info(self.name, revision=MAIN).sha
            assert head is not None
            if head != before:
                present = self.tree(head)
                if all(_holds(present.get(path), content) for path, content in files.items()):
                    return head  # the answer to the commit was lost
                raise GraceError(
                    f"{self.name} changed while publishing: another publication took over. Let it "
                    "end, then publish again"
                )
            present = self.tree(head)
            return self._api.create_commit(
                self.name,
                operations=[
                    CommitOperationDelete(path)
                    if content is None
                    else CommitOperationAdd(path, content)
                    for path, content in files.items()
                    if content is not None or path in present
                ],
                commit_message=message,
                parent_commit=head,
            ).oid

        return self._do(commit)

    def tag(self, tag: str, commit: str) -> None:
        """Have a tag at a commit, or at one with the same files; a tag is never moved.

        Raises GraceError when the tag stands for other files.
        """

        def ensure() -> None:
            found = self.tags().get(tag)
            if found is None:
                self._api.create_tag(self.name, tag=tag, revision=commit)
            elif found != commit and ids(self.tree(found)) != ids(self.tree(commit)):
                raise moved_tag(self.name, tag)

        self._do(ensure)

    def make_public(self) -> None:
        self._do(lambda: self._api.update_repo_settings(self.name, private=False))

    def _download(self, path: str, commit: str, folder: Path) -> Path:
        return Path(
            self._do(
                lambda: self._api.hf_hub_download(
                    self.name, path, revision=commit, local_dir=folder, force_download=True
                )
            )
        )

    def _do(self, step: Callable[[], T]) -> T:
        return self._hub.patiently(self.name, step)


def ids(tree: Tree) -> dict[str, str]:
    """Git's ids of a tree's files: equal where the files are."""
    return {path: file.blob_id for path, file in tree.items()}


def tree_digest(tree: Tree) -> str:
    """One digest over the ids."""
    return digest_of(ids(tree))


def shows(tree: Tree, content: ReleaseContent) -> bool:
    """Whether a tree holds exactly this content."""
    return tree.keys() == content.facts.keys() and all(
        _is(tree[name], facts) for name, facts in content.facts.items()
    )


def differing(tree: Tree, content: ReleaseContent) -> list[str]:
    """Names of the files that a tree lacks or holds with another content."""
    return [name for name, facts in content.facts.items() if not _is(tree.get(name), facts)]


def moved_tag(repository: str, tag: str) -> GraceError:
    return GraceError(
        f"{repository}: the tag {tag} stands for other files, and a tag is never moved. Choose "
        "another publish.destination.tag, or leave it out: the tag is then named by the content"
    )


def _is(entry: RepoFile | None, facts: FileFacts) -> bool:
    """Whether a listed file has these digests; a large one is listed by its SHA-256."""
    if entry is None:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == facts.sha256
    return entry.blob_id == facts.blob_id


def _holds(entry: RepoFile | None, content: bytes | None) -> bool:
    return entry is None if content is None else _is(entry, facts_of(content))
