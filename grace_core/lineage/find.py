"""What a user names: a folder, a release's name, a stage, or the first digits of a digest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from grace_core.artifacts import MANIFEST, Artifact, read_artifact
from grace_core.errors import GraceError
from grace_core.lineage.collect import artifacts_below, lineage_of, node_of
from grace_core.lineage.graph import SHORT, Lineage
from grace_core.lineage.published import RELEASE_MANIFEST, PublishedManifest

LEAST_DIGITS = 8
_DIGITS = re.compile(rf"[0-9a-f]{{{LEAST_DIGITS},64}}")


@dataclass(frozen=True)
class Found:
    """A model with its lineage."""

    lineage: Lineage
    artifact: Artifact | None
    """Its folder; None where the lineage was read from a published directory."""

    @property
    def model(self) -> str:
        """Id of its node."""
        (model,) = self.lineage.models
        return model


def starts_a_digest(text: str) -> bool:
    """Whether a text can be a digest, or enough of its first digits."""
    return _DIGITS.fullmatch(text) is not None


def find_model(name: str, root: Path) -> Found:
    """The model that `name` means, with its lineage.

    name: folder of an artifact, published directory, release's name such as Toy-GRACE-W4G128,
    stage or label (release-w4, w4), or at least eight digits of a digest. Names are looked up among
    the artifacts below `root`.

    Raises GraceError when there is none, or when several with different content fit.
    """
    folder = Path(name).expanduser()
    if (folder / RELEASE_MANIFEST).is_file():
        return Found(_published(folder), None)
    if folder.name == "model" and (folder.parent / MANIFEST).is_file():
        folder = folder.parent
    if (folder / MANIFEST).is_file():
        artifact = read_artifact(folder)
        return Found(lineage_of([artifact], _known(root, folder.parent)), artifact)
    known = artifacts_below(root)
    chosen = _the_one(name, _fitting(name, known), known, root)
    return Found(lineage_of([chosen], known), chosen)


def data_digest(source: str) -> str:
    """Digest (or its first digits) of a data folder's artifact, or `source` itself."""
    folder = Path(source).expanduser()
    if (folder / MANIFEST).is_file():
        return read_artifact(folder).digest
    if starts_a_digest(source):
        return source
    raise GraceError(
        f"{source} is neither the folder of an artifact (it has no {MANIFEST}) nor {LEAST_DIGITS} "
        "or more digits of a digest (0-9, a-f)"
    )


def _known(root: Path, beside: Path) -> list[Artifact]:
    """Artifacts below `root`, and those beside a folder that may lie elsewhere."""
    return [*artifacts_below(beside.parent), *(artifacts_below(root) if root.is_dir() else [])]


def _fitting(name: str, known: Iterable[Artifact]) -> list[Artifact]:
    """Artifacts of that stage or label, release name, or digest; releases before what they hold."""
    known = list(known)
    ways = (
        [a for a in known if a.manifest.stage == f"release-{name}"],
        [a for a in known if a.manifest.stage == name],
        [a for a in known if node_of(a).name == name.split("/")[-1]],
        [a for a in known if starts_a_digest(name) and a.digest.startswith(name)],
    )
    fitting = next((found for found in ways if found), [])
    # A BF16 release has the content of the trained model; who names the content means the release.
    released = [a for a in fitting if a.manifest.stage.startswith("release-")]
    return released or fitting


def _the_one(name: str, fitting: list[Artifact], known: list[Artifact], root: Path) -> Artifact:
    if not fitting:
        names = sorted({node_of(a).name for a in known if a.manifest.stage.startswith("release-")})
        there = f"; released models there: {', '.join(names)}" if names else ""
        raise GraceError(
            f"no model {name} below {root}: it is no folder, release name, stage or digest{there}. "
            "Say with --root where the run directories are, or give the model's folder"
        )
    if len({artifact.digest for artifact in fitting}) > 1:
        listed = "".join(f"\n  {a.digest[:SHORT]}  {a.manifest.created}  {a.path}" for a in fitting)
        raise GraceError(f"{name} is the name of several models; give the digest of one:{listed}")
    return fitting[0]


def _published(folder: Path) -> Lineage:
    file = folder / RELEASE_MANIFEST
    try:
        manifest = PublishedManifest.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise GraceError(
            f"{file} holds no lineage that this version reads ({error.error_count()} errors); name "
            "the release's artifact folder or digest instead"
        ) from error
    return manifest.lineage
