"""Where a benchmark's rows are: found on this machine, or fetched from the Hub at one commit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from grace_core.errors import GraceError
from grace_core.evaluation.declaration import Benchmark, Source
from grace_core.evaluation.loading.data_files import FORMATS, files_of_split, read_front_matter
from grace_core.hub_transport import TransportError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<rest>\..*)$")
_CARD = "README.md"
_SECONDS = 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What a configuration or a command says about the place; None: as the benchmark declares."""

    path: Path | None = None
    """A file, or a folder of files, on this machine."""

    repository: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    pictures: Path | None = None
    """Folder below which pictures that are given as paths lie; None: that of the rows."""


@dataclass(frozen=True)
class Place:
    """The files of a benchmark, all on this machine."""

    files: tuple[Path, ...]
    root: Path
    """Folder below which pictures that are given as paths lie."""

    description: str
    """For people: the folder, or the repository with its commit."""

    repository: str | None = None
    revision: str | None = None
    """The repository's commit."""

    config: str | None = None
    """The repository's configuration; None where it has only one."""

    split: str | None = None
    """Of the repository."""

    picture_files: tuple[Path, ...] = ()
    """Tables of pictures by id, where the rows name pictures only."""


@dataclass(frozen=True)
class Offer:
    """What the Hub has of a benchmark. Bytes are None where only a connection would tell."""

    commit: str
    size: int | None = None
    """Bytes of its rows and pictures as files."""

    missing: int | None = None
    """Bytes of these that are still to be downloaded."""


def locate(benchmark: Benchmark, wanted: Wanted) -> Place:
    """Find the files of a benchmark, downloading those of the Hub that are not here.

    Raises GraceError where they cannot be found, or are not all there.
    """
    place = _on_this_machine(benchmark, wanted) if wanted.path else _of_hub(benchmark, wanted)
    _require_whole_shards(place)
    return place


def declared_source(benchmark: Benchmark, wanted: Wanted) -> Source:
    """The repository, configuration and split that are meant.

    Raises GraceError for a benchmark that has no repository of its own, where none is given.
    """
    source = benchmark.source
    if wanted.repository is not None:
        split = wanted.split or (source.split if source else None)
        if split is None:
            raise GraceError(f"{benchmark.name}: {wanted.repository} needs a split; set `split`")
        same = source is not None and source.repository == wanted.repository
        config = wanted.config or (source.config if source and same else None)
        return Source(wanted.repository, split, config)
    if source is None:
        raise GraceError(f"{benchmark.name} is in no repository of the Hub; set its `path`")
    return replace(
        source, split=wanted.split or source.split, config=wanted.config or source.config
    )


def is_commit(revision: str | None) -> bool:
    """Whether it is a commit already, so that nobody need be asked."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


@cache
def resolve_revision(repository: str, revision: str | None) -> str:
    """The commit that a branch or a tag of a data set is at; asked once a process.

    Without a connection, that of the newest download. Raises GraceError where neither tells.
    """
    if revision is not None and is_commit(revision):
        return revision
    # Downloads the card, which leaves a note in the cache of where the branch was.
    return _downloaded(repository, revision, [_CARD]).name


def look_up(benchmark: Benchmark, wanted: Wanted) -> Offer:
    """What `locate` would find on the Hub, without downloading it; for checks before a run.

    Raises GraceError where the data set, the configuration or the split is not there.
    """
    source = declared_source(benchmark, wanted)
    repository = source.repository
    try:
        info = _ask(
            repository,
            lambda: HfApi().dataset_info(
                repository, revision=wanted.revision, timeout=_SECONDS, files_metadata=True
            ),
        )
    except OfflineModeIsEnabled:
        return Offer(_downloaded(repository, wanted.revision, [_CARD]).name)
    assert info.sha is not None
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or []}
    metadata = info.card_data.to_dict() if info.card_data else {}
    rows, tables = _files_of_source(benchmark, source, info.sha, [*sizes], metadata)
    files = [*rows, *tables]
    wanting = [
        name
        for name in files
        if not try_to_load_from_cache(repository, name, revision=info.sha, repo_type="dataset")
    ]
    total, missing = (sum(sizes[name] for name in names) for names in (files, wanting))
    return Offer(info.sha, total, missing)


def _of_hub(benchmark: Benchmark, wanted: Wanted) -> Place:
    source = declared_source(benchmark, wanted)
    repository = source.repository
    commit = resolve_revision(repository, wanted.revision)
    try:
        names = _ask(
            repository,
            lambda: HfApi().list_repo_files(repository, revision=commit, repo_type="dataset"),
        )
        card = _downloaded(repository, commit, [_CARD]) if _CARD in names else None
    except OfflineModeIsEnabled:
        card = _downloaded(repository, commit, ["*"])
        names = _names_below(card)
    metadata = read_front_matter((card / _CARD).read_text(encoding="utf-8")) if card else {}
    rows, tables = _files_of_source(benchmark, source, commit, names, metadata)
    folder = _downloaded(repository, commit, [*rows, *tables])
    return Place(
        files=tuple(folder / name for name in rows),
        root=wanted.pictures or folder,
        description=f"{repository} at {commit[:12]}",
        repository=repository,
        revision=commit,
        config=source.config,
        split=source.split,
        picture_files=tuple(folder / name for name in tables),
    )


def _files_of_source(
    benchmark: Benchmark,
    source: Source,
    commit: str,
    names: Sequence[str],
    metadata: dict[str, object],
) -> tuple[list[str], list[str]]:
    """Files of the rows, and of the tables of pictures."""
    try:
        rows = _files(names, metadata, source.config, source.split)
        tables = _files(names, metadata, source.pictures, source.split) if source.pictures else []
    except GraceError as error:
        place = f"{source.repository} at {commit[:12]}"
        raise GraceError(f"{benchmark.name}: {place}: {error}") from None
    return rows, tables


def _on_this_machine(benchmark: Benchmark, wanted: Wanted) -> Place:
    path = wanted.path
    assert path is not None
    if path.is_file():
        return Place((path,), wanted.pictures or path.parent, str(path))
    if not path.is_dir():
        raise GraceError(f"{benchmark.name}: {path} does not exist; mend `path`")
    declared = benchmark.source
    split = wanted.split or (declared.split if declared else "test")
    saved = _saved_to_disk(path, split)
    if saved:
        return Place(saved, wanted.pictures or path, str(path))
    names = _names_below(path)
    card = path / _CARD
    tables: list[str] = []
    try:
        metadata = read_front_matter(card.read_text(encoding="utf-8")) if card.is_file() else {}
        copied = bool(metadata.get("configs")) and declared is not None
        config = wanted.config or (declared.config if declared and copied else None)
        rows = _files(names, metadata, config, split)
        if declared and declared.pictures and copied:
            tables = _files(names, metadata, declared.pictures, split)
    except GraceError as error:
        raise GraceError(f"{benchmark.name}: {path}: {error}") from None
    return Place(
        tuple(path / name for name in rows),
        wanted.pictures or path,
        str(path),
        picture_files=tuple(path / name for name in tables),
    )


def _saved_to_disk(folder: Path, split: str) -> tuple[Path, ...]:
    """Files of a folder that `datasets.Dataset.save_to_disk` wrote; empty for another folder."""
    if (folder / "dataset_dict.json").is_file():
        known = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        missing = [name for name in split.split("+") if name not in known]
        if missing:
            raise GraceError(
                f"{folder}: no split {missing[0]!r}; there are {', '.join(known)}: set `split`"
            )
        parts = [_saved_to_disk(folder / name, name) for name in split.split("+")]
        return tuple(file for part in parts for file in part)
    if not (folder / "state.json").is_file():
        return ()
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return tuple(folder / entry["filename"] for entry in state["_data_files"])


def _files(
    names: Sequence[str], metadata: dict[str, object], config: str | None, split: str
) -> list[str]:
    parts = [files_of_split(names, metadata, config, part) for part in split.split("+")]
    files = list(dict.fromkeys(name for part in parts for name in part))
    foreign = [name for name in files if Path(name).suffix not in FORMATS]
    if foreign:
        raise GraceError(f"{foreign[0]}: rows are read from {', '.join(FORMATS)} alone")
    return files


def _require_whole_shards(place: Place) -> None:
    """Raise where files that are numbered "1 of 5" are not all there."""
    numbers: dict[tuple[str, str, str], set[int]] = {}
    for file in (*place.files, *place.picture_files):
        match = _SHARD.match(file.name)
        if match:
            key = (str(file.parent / match["stem"]), match["total"], match["rest"])
            numbers.setdefault(key, set()).add(int(match["number"]))
    for (stem, total, rest), there in numbers.items():
        missing = sorted(set(range(int(total))) - there)
        if missing:
            raise GraceError(
                f"{stem}-{missing[0]:05}-of-{total}{rest} is missing, one of {len(missing)} of "
                f"{int(total)} files; download the data set again"
            )
    gone = [str(file) for file in (*place.files, *place.picture_files) if not file.is_file()]
    if gone:
        raise GraceError(f"{gone[0]} is missing; download the data set again")


def _names_below(folder: Path) -> list[str]:
    return sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix in (*FORMATS, ".md") and file.is_file()
    )


def _downloaded(repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """The folder of a commit, with the files in it."""
    return _ask(
        repository,
        lambda: Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[_literal(name) for name in patterns],
            )
        ),
    )


def _literal(name: str) -> str:
    """A pattern that this name alone fits; "*" stays what it is."""
    return name if name == "*" else re.sub(r"([*?\[])", r"[\1]", name)


def _ask(repository: str, question: Callable[[], T]) -> T:
    """An answer of the Hub, with its refusals in words; being offline is left to the caller."""
    try:
        return question()
    except OfflineModeIsEnabled:
        raise
    except GatedRepoError:
        raise GraceError(
            f"{repository} is gated; accept its terms on the Hub and export HF_TOKEN of that "
            "account"
        ) from None
    except RevisionNotFoundError:
        raise GraceError(f"{repository} has no such revision; mend `revision`") from None
    except RepositoryNotFoundError:
        raise GraceError(
            f"{repository} is no data set of the Hub that this token may read; mend `repository`, "
            "or export HF_TOKEN"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, TransportError, OSError) as error:
        raise GraceError(
            f"{repository} cannot be had from the Hub ({type(error).__name__}) and is not "
            "downloaded; check the connection, or download it and set the benchmark's `path`"
        ) from error
