"""What is published of one release: its files and its documents, each with its digests.

Files are read once, for all digests that a destination may list: SHA-256, by which the Hub names
files in large-file storage, and git's blob id (SHA-1 over a header and the content), by which it
names the others.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from grace_core.artifacts import digest_of
from grace_core.errors import GraceError
from grace_core.lineage.published import RELEASE_MANIFEST

CARD = "README.md"
PICTURE = "lineage.svg"
REQUIRED_DOCUMENTS = frozenset({CARD, RELEASE_MANIFEST, PICTURE})
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes, and digests in hexadecimal."""

    size: int
    sha256: str
    blob_id: str


@dataclass(frozen=True)
class ReleaseContent:
    """One release as it is to stand at its destination."""

    label: str
    repository: str
    """`owner/name` on the Hub, the folder's name elsewhere."""

    files: Mapping[str, Path | bytes]
    """By name in the repository ("a/b.json"), documents included."""

    facts: Mapping[str, FileFacts]

    @property
    def digest(self) -> str:
        """SHA-256 over names and contents, as `grace_core.artifacts.digest_folder` counts it."""
        return digest_of({name: facts.sha256 for name, facts in self.facts.items()})

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(facts.size for facts in self.facts.values())


def read_content(
    label: str, repository: str, release_folder: Path, documents: Mapping[str, str]
) -> ReleaseContent:
    """The content of a release, checked to be publishable, with its digests.

    documents: text by file name; at least the model card, the manifest and the picture.

    Raises GraceError for a folder that is no checkpoint, or that holds links, pickles or names
    that the documents need.
    """
    assert documents.keys() >= REQUIRED_DOCUMENTS
    files: dict[str, Path | bytes] = dict(_publishable(release_folder, documents))
    files |= {name: text.encode("utf-8") for name, text in documents.items()}
    facts = {name: facts_of(content) for name, content in files.items()}
    return ReleaseContent(label, repository, files, facts)


def facts_of(content: Path | bytes) -> FileFacts:
    """Size and digests of a file or of bytes, read block by block."""
    if isinstance(content, bytes):
        return _facts(io.BytesIO(content), len(content))
    with content.open("rb") as stream:
        return _facts(stream, content.stat().st_size)


def set_id(contents: Iterable[ReleaseContent]) -> str:
    """What names a set of releases: SHA-256 over its repositories and their contents."""
    return digest_of({content.repository: content.digest for content in contents})


def _facts(stream: IO[bytes], size: int) -> FileFacts:
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    while block := stream.read(_BLOCK):
        sha256.update(block)
        blob.update(block)
    return FileFacts(size, sha256.hexdigest(), blob.hexdigest())


def _publishable(release_folder: Path, documents: Mapping[str, str]) -> dict[str, Path]:
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
