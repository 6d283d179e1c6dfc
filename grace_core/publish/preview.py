"""What a publication would do, found out without doing any of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from grace_core.artifacts import digest_folder
from grace_core.config.publish import HubDestination
from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.evaluation.gate import GateVerdict, require_open
from grace_core.publish.content import ReleaseContent, set_id
from grace_core.publish.directory import read_directory_index
from grace_core.publish.hub import (
    HubTarget,
    read_index,
    release_tag,
    require_free_lease,
    require_unmoved_tags,
)
from grace_core.publish.hub_connection import HubConnection
from grace_core.publish.hub_repository import MAIN, HubRepository, differing
from grace_core.publish.index import ReleaseIndex
from grace_core.publish.release_set import HubAccess, hub_target


@dataclass(frozen=True)
class ModelChange:
    """One model: what is at its destination, and what publishing changes."""

    location: str
    now: str
    then: str
    bytes: int
    """To be sent."""


@dataclass(frozen=True)
class Preview:
    """The whole publication."""

    models: tuple[ModelChange, ...]
    notes: tuple[str, ...]
    """About the release as one: its index, its tag, what an earlier publication left."""

    problems: tuple[str, ...]
    """What would stop it before anything is sent."""


def preview(
    config: GraceConfig,
    contents: Sequence[ReleaseContent],
    access: HubAccess,
    verdict: GateVerdict,
) -> Preview:
    """Look at the destination; nothing is written there.

    verdict: the regression gate's; a closed one is among the problems.

    Raises GraceError where the destination cannot be looked at.
    """
    destination = config.publish.destination
    if isinstance(destination, HubDestination):
        seen = _of_hub(contents, hub_target(config, access))
    else:
        seen = _of_directory(contents, config.run_dir / destination.path)
    closed = _problem(partial(require_open, verdict))
    return replace(seen, problems=(*closed, *seen.problems))


def _of_directory(contents: Sequence[ReleaseContent], root: Path) -> Preview:
    index = read_directory_index(root)
    models = []
    for content in contents:
        folder = root / content.repository
        if not folder.exists():
            now, then, size = "nothing", "new", content.size
        elif digest_folder(folder) == content.digest:
            now, then, size = f"this release, {content.digest[:12]}", "unchanged", 0
        else:
            now, then, size = "another release", "replaced", content.size
        models.append(ModelChange(str(folder.absolute()), now, then, size))
    return Preview(tuple(models), (_named(None if index is None else index.release),), ())


def _of_hub(contents: Sequence[ReleaseContent], target: HubTarget) -> Preview:
    hub = HubConnection(target.endpoint, target.token, target.namespace)
    release = set_id(contents)
    index = HubRepository(hub, target.index_repository)
    found = read_index(index)
    known = found.index if found else None
    tag = release_tag(target, release, known)
    notes = [_named(known.release if known else None), _tag_note(tag, release, known)]
    problems = []
    if found is not None and found.journal is not None:
        same = found.journal.release == release
        notes.append(
            "an interrupted publication of "
            + ("this release would be completed" if same else "another release would be undone")
        )
        problems += _problem(partial(require_free_lease, found, target))
    models = []
    for content in contents:
        repository = HubRepository(hub, content.repository)
        models.append(_of_repository(content, repository, target.private))
        if repository.info() is not None:
            there = {content.label: repository}
            problems += _problem(partial(require_unmoved_tags, [content], there, tag))
    for repository in (index, *(HubRepository(hub, content.repository) for content in contents)):
        info = repository.info()
        if target.private and info is not None and not info.private:
            problems.append(f"{repository.name} is public, but publish.destination.private is true")
    return Preview(tuple(models), tuple(notes), tuple(problems))


def _of_repository(
    content: ReleaseContent, repository: HubRepository, private: bool
) -> ModelChange:
    seen = "private" if private else "public"
    info = repository.info()
    if info is None:
        return ModelChange(repository.address, "nothing", f"new, {seen}", content.size)
    tree = repository.tree(MAIN)
    wrong, surplus = differing(tree, content), tree.keys() - content.files.keys()
    now = f"{'private' if info.private else 'public'}, main at {str(info.sha)[:12]}"
    size = sum(content.facts[name].size for name in wrong)
    if not wrong and not surplus:
        return ModelChange(repository.address, now, f"unchanged, {seen}", 0)
    changes = [f"{len(wrong)} of {len(content.files)} files"]
    changes += [f"{len(surplus)} removed"] if surplus else []
    return ModelChange(repository.address, now, f"1 commit: {', '.join(changes)}; {seen}", size)


def _named(release: str | None) -> str:
    return "index: " + ("none yet" if release is None else f"names release {release[:12]}")


def _tag_note(tag: str, release: str, index: ReleaseIndex | None) -> str:
    before = {str(model.tag) for model in index.models.values()} if index else set()
    if index is None or index.release != release or before == {tag}:
        return f"tag: {tag}"
    return f"tag: {tag}, added to this release, which has {', '.join(before)}"


def _problem(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except GraceError as error:
        return [str(error)]
    return []
