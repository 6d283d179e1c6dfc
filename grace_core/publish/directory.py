"""Publishing a release to a directory of this machine."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grace_core.artifacts import digest_folder
from grace_core.errors import GraceError
from grace_core.lineage.published import RELEASE_MANIFEST

CARD = "README.md"
PICTURE = "lineage.svg"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Published:
    """Where a release went."""

    location: str
    """Directory, or address of the repository."""

    revision: str
    """SHA-256 over the directory's files, or the repository's commit."""


def publish_to_directory(
    release_folder: Path, documents: Mapping[str, str], destination: Path
) -> Published:
    """Copy a release to `destination` with its documents.

    documents: text by file name, of CARD, RELEASE_MANIFEST and PICTURE.

    The copy is built beside the destination and compared with the source by SHA-256; only then
    does it take the destination's name. What was published there before stays until that moment,
    and stays for good when anything fails.

    Raises GraceError when the release is not fit to publish, when the destination holds something
    other than an earlier release, or when the copy differs from the source.
    """
    source_files = release_files(release_folder, documents)
    destination = destination.absolute()
    inside = (destination.resolve(), release_folder.resolve())
    if inside[0].is_relative_to(inside[1]) or inside[1].is_relative_to(inside[0]):
        raise GraceError(
            f"{destination} and the release {release_folder} lie inside each other; publish to a "
            "folder of its own"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    previous = destination.with_name(f".{destination.name}.previous")
    _recover(destination, previous)
    if destination.exists() and not (destination / RELEASE_MANIFEST).is_file():
        raise GraceError(
            f"{destination} exists and is no earlier release (it has no {RELEASE_MANIFEST}); move "
            "it away or publish elsewhere"
        )
    partial = destination.with_name(f".{destination.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        for name, file in source_files.items():
            copy = partial / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        if digest_folder(partial) != digest_folder(release_folder):
            raise GraceError(
                f"the copy of {release_folder} differs from it; check the disk of {destination} "
                "and that nothing writes into the release, then publish again"
            )
        for name, text in documents.items():
            (partial / name).write_text(text, encoding="utf-8")
        digest = digest_folder(partial)
        _switch(partial, destination, previous)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Published(str(destination), digest)


def release_files(release_folder: Path, documents: Mapping[str, str]) -> dict[str, Path]:
    """Files of a release by their name in the repository ("a/b.json"), checked to be publishable.

    Raises GraceError for a folder that is no checkpoint, or that holds links, pickles or names
    that the documents need.
    """
    assert documents.keys() == {CARD, RELEASE_MANIFEST, PICTURE}
    json.loads(documents[RELEASE_MANIFEST])  # made by this package: anything else is a bug
    if not release_folder.is_dir():
        raise GraceError(f"{release_folder} is no directory; run the release stage first")
    problems = []
    files = {}
    for path in sorted(release_folder.rglob("*")):
        name = path.relative_to(release_folder).as_posix()
        if path.is_symlink():
            problems.append(f"{name} is a link; releases hold plain files only")
        elif path.is_file():
            files[name] = path
            if path.suffix in _PICKLES:
                problems.append(f"{name} may be a pickle; releases hold safetensors only")
            if name in documents:
                problems.append(f"{name} is written when publishing; remove it")
    if "config.json" not in files:
        problems.append("config.json is missing: not a Hugging Face checkpoint")
    if not any(name.endswith(".safetensors") for name in files):
        problems.append("there are no *.safetensors weights")
    if problems:
        lines = [f"{release_folder} cannot be published; run the release stage again:", *problems]
        raise GraceError("\n  - ".join(lines))
    return files


def _recover(destination: Path, previous: Path) -> None:
    """Undo a switch that was cut short between its two renames, or tidy up after a finished one."""
    if not previous.exists():
        return
    if destination.exists():
        shutil.rmtree(previous)
    else:
        os.replace(previous, destination)


def _switch(partial: Path, destination: Path, previous: Path) -> None:
    if not destination.exists():
        os.replace(partial, destination)
        return
    os.replace(destination, previous)
    try:
        os.replace(partial, destination)
    except OSError:
        os.replace(previous, destination)
        raise
    shutil.rmtree(previous)
