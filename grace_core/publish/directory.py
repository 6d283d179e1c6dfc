"""Publishing a release of several models to a directory: all of it, or nothing."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from grace_core.artifacts import digest_folder
from grace_core.errors import GraceError
from grace_core.lineage.published import RELEASE_MANIFEST
from grace_core.locks import sole_maker
from grace_core.publish.content import ReleaseContent, set_id
from grace_core.publish.index import INDEX, JOURNAL, IndexedModel, ReleaseIndex, now
from grace_core.whole_files import write_whole


def publish_to_directory(
    contents: Sequence[ReleaseContent],
    root: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> ReleaseIndex:
    """Have each model at `root / repository`, and the release index in `root`.

    Every model is copied beside its destination and compared with its source by SHA-256. Only when
    all are whole do they take their names; then the index is written, and only then the models that
    were published there before go. Whatever fails, and whatever was killed, leaves the old release:
    the next publication puts back what it finds half switched.

    report: is told bytes done and bytes to do.

    Raises GraceError when a destination holds something other than an earlier release or lies in
    the release itself, or when a copy differs from its source.
    """
    root = root.absolute()
    for content in contents:
        _require_apart(content, root)
    root.mkdir(parents=True, exist_ok=True)
    with sole_maker(root / INDEX):
        _recover(root)
        for content in contents:
            final = root / content.repository
            _require_release(final)
            for partial in root.glob(f".{final.name}.partial-*"):  # of a killed publication
                shutil.rmtree(partial)
        total, done = sum(content.size for content in contents), 0
        staged: dict[Path, Path] = {}
        try:
            for content in contents:
                final = root / content.repository
                staged[final] = _aside(final, f"partial-{uuid.uuid4().hex[:8]}")
                _copy(content, staged[final])
                done += content.size
                report(done, total)
            index = ReleaseIndex(
                release=set_id(contents),
                published=now().isoformat(),
                models={
                    content.label: IndexedModel(
                        repository=content.repository,
                        commit=content.digest,
                        tag=None,
                        digest=content.digest,
                        bytes=content.size,
                    )
                    for content in contents
                },
            )
            previous = [_aside(final, "previous") for final in staged if final.exists()]
            try:
                _record_new(root, index)
                for final, partial in staged.items():
                    if final.exists():
                        os.replace(final, _aside(final, "previous"))
                    os.replace(partial, final)
                write_whole(root / INDEX, index.model_dump_json(indent=1) + "\n")
            except BaseException:
                _recover(root)
                raise
            for folder in previous:
                shutil.rmtree(folder)
            (root / JOURNAL).unlink(missing_ok=True)
        finally:
            for partial in staged.values():
                shutil.rmtree(partial, ignore_errors=True)
    return index


def read_directory_index(root: Path) -> ReleaseIndex | None:
    """The release index of a directory; None where nothing is published.

    Raises GraceError when the file cannot be understood.
    """
    return _read(root / INDEX)


def _read(file: Path) -> ReleaseIndex | None:
    if not file.is_file():
        return None
    try:
        return ReleaseIndex.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise GraceError(
            f"{file} is no release index ({error.error_count()} problems); move it away, or "
            "publish elsewhere"
        ) from error


def _copy(content: ReleaseContent, partial: Path) -> None:
    for name, file in content.files.items():
        copy = partial / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, bytes):
            copy.write_bytes(file)
        else:
            shutil.copyfile(file, copy)
    if digest_folder(partial) != content.digest:
        raise GraceError(
            f"the copy of {content.repository} differs from the release; check the disk of "
            f"{partial.parent} and that nothing writes into the release, then publish again"
        )


def _require_apart(content: ReleaseContent, root: Path) -> None:
    final = (root / content.repository).resolve()
    for file in content.files.values():
        if isinstance(file, Path):
            source = file.resolve().parent
            if source.is_relative_to(final) or final.is_relative_to(source):
                raise GraceError(
                    f"{final} and the release {source} lie inside each other; publish to a folder "
                    "of its own"
                )


def _require_release(final: Path) -> None:
    if final.exists() and not (final / RELEASE_MANIFEST).is_file():
        raise GraceError(
            f"{final} exists and is no earlier release (it has no {RELEASE_MANIFEST}); move it "
            "away or publish elsewhere"
        )


def _record_new(root: Path, index: ReleaseIndex) -> None:
    """Before the switch, write down the models that will stand where nothing stood.

    Others leave what was there before beside them, which says as much.
    """
    new = {
        label: model
        for label, model in index.models.items()
        if not (root / model.repository).exists()
    }
    if new:
        record = index.model_copy(update={"models": new})
        write_whole(root / JOURNAL, record.model_dump_json(indent=1) + "\n")


def _recover(root: Path) -> None:
    """Bring models and index together after a switch, finished or cut short.

    A model that the index names with another digest goes back to what it was before, or goes where
    nothing was; of one that is as the index says, what was before goes.
    """
    switched, new = [*root.glob(".*.previous")], _read(root / JOURNAL)
    index = read_directory_index(root) if switched or new else None
    named = {model.repository: model.digest for model in index.models.values()} if index else {}
    for previous in switched:
        final = previous.with_name(previous.name.removeprefix(".").removesuffix(".previous"))
        is_new = final.exists() and digest_folder(final) == named.get(final.name)
        if is_new:
            shutil.rmtree(previous)
            continue
        if final.exists():
            shutil.rmtree(final)
        os.replace(previous, final)
    for model in new.models.values() if new else ():
        final = root / model.repository
        if model.digest == named.get(model.repository) or not final.exists():
            continue
        if digest_folder(final) == model.digest:  # else somebody put it there since
            undone = _aside(final, "partial-undone")  # killed while it goes, it is no model
            os.replace(final, undone)
            shutil.rmtree(undone)
    (root / JOURNAL).unlink(missing_ok=True)
    for unfinished in root.glob(".*.new"):  # of a killed process: the lock is ours
        unfinished.unlink()


def _aside(final: Path, what: str) -> Path:
    return final.with_name(f".{final.name}.{what}")
