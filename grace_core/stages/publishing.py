"""Stage `publish`: the results table, and the releases at their destination."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from grace_core.artifacts import Artifact, ArtifactWriter
from grace_core.config.model import GraceConfig
from grace_core.publish.release_set import publish_releases
from grace_core.stages.once import StageContext, once


def publish(
    config: GraceConfig,
    releases: Mapping[str, Artifact],
    evaluations: Mapping[str, Artifact],
    context: StageContext,
) -> Artifact:
    """Stage `publish`: the results table, and the releases with their cards at the destination.

    Both mappings are by label. Where publishing is switched off, the table is all there is.
    """
    parents = {f"release-{label}": item.as_parent() for label, item in releases.items()}
    parents |= {f"evaluate-{label}": item.as_parent() for label, item in evaluations.items()}
    section = config.publish.model_dump(mode="json")

    def make(writer: ArtifactWriter) -> None:
        publish_releases(config, releases, evaluations, writer.path)

    found = once(config, context, "publish", section, parents, make)
    destinations = json.loads((found.path / "releases.json").read_text(encoding="utf-8"))
    lost = [place for place in destinations.values() if _is_missing(place["location"])]
    if lost:
        shutil.rmtree(found.path)
        found = once(config, context, "publish", section, parents, make)
    return found


def _is_missing(location: str) -> bool:
    return not location.startswith("http") and not Path(location).is_dir()
