"""Artifacts: the directories that stages leave, each with a manifest that is written last.

A stage's directory is built under a temporary name and renamed once its manifest is in it, so a
directory with the final name is complete by construction. The manifest records what went in
(parents by digest, the resolved configuration), what came out (every file with its SHA-256) and
what made it (code version, environment): lineage can be read from the files alone.

Two hashes matter. The *fingerprint* is known before a stage runs (stage, its configuration, its
parents' digests, the package's version) and names the directory: equal fingerprint, nothing to do.
The *digest* is that of the content, known afterwards, and is what later stages depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import grace_core
from grace_core.config.load import config_digest
from grace_core.errors import GraceError
from grace_core.hardware import hardware

MANIFEST = "manifest.json"
OUTSIDE = ("checkpoint", "tokenizer", "annotations", "pictures", "benchmark")
"""Kinds of parents that no stage made."""
QUANTIZED_START = "quantized start"
"""Role of the checkpoint that `quantize.start` names; not the student that the run starts from."""

_RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "safetensors",
    "compressed-tensors",
    "huggingface_hub",
)


class ArtifactDamaged(GraceError):
    """An artifact is not what its stage left: its manifest, or files that this lists.

    aside: where it was moved to, None while it still has its name.
    """

    def __init__(self, folder: Path, problems: Sequence[str], aside: Path | None = None) -> None:
        self.folder, self.problems, self.aside = folder, list(problems), aside
        remedy = (
            "delete it and run its stage again"
            if aside is None
            else f"it was moved to {aside}; run again, and its stage makes it anew"
        )
        listed = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{folder} is damaged:{listed}\n{remedy}")


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    size: int = Field(description="bytes")


class Parent(BaseModel):
    """One input of an artifact: another artifact, or a checkpoint from outside."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = Field(description="stage that made it, or `checkpoint` when it came from outside")
    path: str
    digest: str
    revision: str | None = Field(None, description="Hub commit of a checkpoint from outside")


class Manifest(BaseModel):
    """What an artifact is and where it came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    fingerprint: str
    digest: str = Field(description="SHA-256 over the sorted file entries")
    created: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(description="wall-clock time of the stage")
    parents: dict[str, Parent] = {}
    config: dict[str, Any] = {}
    config_digest: str
    run_config: dict[str, Any] = Field(
        {}, description="the whole resolved configuration of the run that made it"
    )
    code: dict[str, str] = {}
    environment: dict[str, str] = {}
    metrics: dict[str, float] = {}
    facts: dict[str, Any] = Field({}, description="what else later stages and cards quote")
    files: dict[str, FileEntry] = {}
    checksum: str | None = Field(None, description="SHA-256 over everything else in here")


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def as_parent(self) -> Parent:
        return Parent(kind=self.manifest.stage, path=str(self.path), digest=self.digest)


def fingerprint(stage: str, config: Mapping[str, Any], parents: Mapping[str, Parent]) -> str:
    """SHA-256 (hex) of everything that decides a stage's result."""
    return config_digest(
        {
            "stage": stage,
            "config": dict(config),
            "parents": {role: parent.digest for role, parent in parents.items()},
            "code": grace_core.__version__,
        }
    )


@contextmanager
def new_artifact(
    folder: Path,
    stage: str,
    config: Mapping[str, Any],
    parents: Mapping[str, Parent],
    run_config: Mapping[str, Any] | None = None,
) -> Iterator[ArtifactWriter]:
    """Build `folder` aside and give it its name when the block ends without an error.

    run_config: the whole configuration, recorded for repeating the run; no part of the fingerprint.

    On an error the partial directory is removed and nothing of the final name exists.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    writer = ArtifactWriter(
        partial, folder, stage, dict(config), dict(parents), dict(run_config or {})
    )
    try:
        yield writer
        writer._finish()
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def stage_folders(root: Path, stage: str) -> list[Path]:
    """Folders in `root` that carry a stage's name and the digits of a fingerprint, and no other's:
    `teacher-outputs-...` is none of the stage `teacher`."""
    return [
        folder
        for folder in root.glob(f"{stage}-*")
        if "-" not in folder.name.removeprefix(f"{stage}-")
    ]


def remove_partials(folder: Path) -> None:
    """Remove what killed attempts at this artifact left; nobody else may be at work on it."""
    for partial in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(partial)


class ArtifactWriter:
    """An artifact under construction; write files below `path`."""

    def __init__(
        self,
        path: Path,
        final: Path,
        stage: str,
        config: dict[str, Any],
        parents: dict[str, Parent],
        run_config: dict[str, Any],
    ) -> None:
        self.path = path
        self.final = final
        self.metrics: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.environment = environment()
        self._run_config = run_config
        self._stage = stage
        self._config = config
        self._parents = parents
        self._started = datetime.now(UTC)

    def _finish(self) -> None:
        files = _hash_files(self.path)
        now = datetime.now(UTC)
        manifest = Manifest(
            stage=self._stage,
            fingerprint=fingerprint(self._stage, self._config, self._parents),
            digest=_digest_of(files),
            created=now.isoformat(timespec="seconds"),
            seconds=round((now - self._started).total_seconds(), 3),
            parents=self._parents,
            config=self._config,
            config_digest=config_digest(self._config),
            run_config=self._run_config,
            code=code_version(),
            environment=self.environment,
            metrics=self.metrics,
            facts=self.facts,
            files=files,
        )
        content = manifest.model_dump(mode="json")
        content["checksum"] = _checksum(content)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (self.path / MANIFEST).write_text(text, encoding="utf-8")
        _flush_to_disk(self.path)
        if self.final.exists():
            # A directory of the final name without a readable manifest is a foreign leftover.
            existing = find_artifact(self.final)
            if existing is not None:
                return
            raise GraceError(
                f"{self.final} exists but is no complete artifact; move it away and run again"
            )
        os.replace(self.path, self.final)
        _flush(self.final.parent)


def find_artifact(folder: Path) -> Artifact | None:
    """The artifact at `folder`, or None where there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    return read_artifact(folder)


def read_artifact(folder: Path) -> Artifact:
    """Read the manifest of `folder`.

    Raises ArtifactDamaged when it is not as it was written, GraceError when there is none, or one
    of another version.
    """
    file = folder / MANIFEST
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        written = content.get("checksum")
        if written is not None and written != _checksum(content):
            raise ArtifactDamaged(folder, [f"changed: {MANIFEST}"])
        manifest = Manifest.model_validate(content)
    except FileNotFoundError:
        raise GraceError(
            f"{folder} has no {MANIFEST}: not an artifact, or its stage never finished; "
            "run the stage that makes it"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactDamaged(folder, [f"no readable JSON: {MANIFEST} ({error})"]) from error
    except ValidationError as error:
        raise GraceError(
            f"{file} is not as this version writes it ({error.error_count()} differences); use "
            "the version that made it, or move the folder away and run its stage again"
        ) from error
    return Artifact(folder, manifest)


def verify_artifact(artifact: Artifact) -> None:
    """Compare every file's content with the manifest; raises ArtifactDamaged naming each."""
    found = _hash_files(artifact.path)
    expected = artifact.manifest.files
    problems = [f"not in the manifest: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"changed: {name}"
        for name in sorted(expected)
        if found.get(name, expected[name]) != expected[name]
    ]
    _raise_damaged(artifact, [*_missing_files(artifact), *problems])


def verify_sizes(artifact: Artifact) -> None:
    """Compare every file's size with the manifest; raises ArtifactDamaged naming each.

    Costs next to nothing, and sees what was cut short or is gone.
    """
    problems = [
        f"{(artifact.path / name).stat().st_size} bytes, not {entry.size}: {name}"
        for name, entry in sorted(artifact.manifest.files.items())
        if (artifact.path / name).is_file() and (artifact.path / name).stat().st_size != entry.size
    ]
    _raise_damaged(artifact, [*_missing_files(artifact), *problems])


def set_aside(folder: Path) -> Path:
    """Take a damaged artifact's name away, keeping its files to be looked at; returns where."""
    aside = folder.parent / f".{folder.name}.damaged-{uuid.uuid4().hex[:8]}"
    os.replace(folder, aside)
    return aside


def _missing_files(artifact: Artifact) -> list[str]:
    names = sorted(artifact.manifest.files)
    return [f"missing: {name}" for name in names if not (artifact.path / name).is_file()]


def _raise_damaged(artifact: Artifact, problems: list[str]) -> None:
    if problems:
        raise ArtifactDamaged(artifact.path, problems)


def _checksum(manifest: Mapping[str, Any]) -> str:
    """What `checksum` must be, of a manifest as plain values."""
    return config_digest({name: value for name, value in manifest.items() if name != "checksum"})


def digest_folder(folder: Path) -> str:
    """Content digest of any folder, by the rule that artifacts use."""
    return _digest_of(_hash_files(folder))


def digest_of(sha256_by_name: Mapping[str, str]) -> str:
    """Content digest of files from the SHA-256 of each, by the rule that artifacts use."""
    lines = [f"{name} {sha256}" for name, sha256 in sorted(sha256_by_name.items())]
    return hashlib.sha256(json.dumps(lines).encode("utf-8")).hexdigest()


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of one file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def code_version() -> dict[str, str]:
    """The package's version and, in a checkout, its commit (with `-dirty` where it applies)."""
    code = {"version": grace_core.__version__}
    root = Path(grace_core.__file__).parent.parent
    if (root / ".git").exists():
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=False,
        )
        if described.returncode == 0:
            code["commit"] = described.stdout.strip()
    return code


def environment() -> dict[str, str]:
    """Versions and hardware that a result may depend on."""
    versions = {"python": platform.python_version(), "platform": platform.machine(), **hardware()}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _flush_to_disk(folder: Path) -> None:
    """Have every file below `folder` on the disk, so that a power cut leaves no empty ones."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """Flush one file, or the names in one directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash_files(folder: Path) -> dict[str, FileEntry]:
    files = [
        file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / MANIFEST
    ]
    # Hashing lets other threads run: a large checkpoint's shards are read side by side.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256_of, files))
    return {
        file.relative_to(folder).as_posix(): FileEntry(sha256=digest, size=file.stat().st_size)
        for file, digest in zip(files, digests, strict=True)
    }


def _digest_of(files: Mapping[str, FileEntry]) -> str:
    return digest_of({name: entry.sha256 for name, entry in files.items()})
