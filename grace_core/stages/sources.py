"""Where training records come from: the source's parts as inputs of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grace_core.artifacts import Parent, fingerprint, sha256_of
from grace_core.config.data import ShareGPT4VData
from grace_core.config.load import require_environment
from grace_core.config.tree import GraceConfig
from grace_core.data.listing import listing_digest
from grace_core.errors import GraceError


def world_section(config: GraceConfig) -> dict[str, Any]:
    """Everything that decides what toy data are generated."""
    return {**config.data.source.model_dump(mode="json"), "seed": config.seed}


def sharegpt4v_files(source: ShareGPT4VData) -> tuple[Path, list[Path]]:
    """The picture root and the annotation files; raises GraceError for those that are missing."""
    require_environment(source.root, "data.source.root")
    root = Path(source.root).expanduser()
    files = [root / name for name in source.annotations]
    missing = [str(path) for path in (root, *files) if not path.exists()]
    if missing:
        raise GraceError(
            "data.source: not found: " + ", ".join(missing) + "; set data.source.root (or "
            "GRACE_DATA_ROOT) to the folder that holds the annotation files and pictures"
        )
    return root, files


def annotations_parent(files: list[Path]) -> Parent:
    """The annotation files by content."""
    digests = {str(number): sha256_of(file) for number, file in enumerate(files)}
    return Parent(
        kind="annotations",
        path=", ".join(str(file) for file in files),
        digest=fingerprint("annotations", digests, {}),
    )


def pictures_parent(root: Path, run_dir: Path) -> Parent:
    """Everything below the root by name, size and time: reading it all would take too long."""
    return Parent(kind="pictures", path=str(root), digest=listing_digest(root, run_dir))
