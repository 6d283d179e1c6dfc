"""Stage `publish`: the results table, and the releases at their destination."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace_core.artifacts import Artifact, ArtifactWriter, Parent, find_artifact, fingerprint
from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.evaluation.gate import require_open
from grace_core.publish.approval import Approval
from grace_core.publish.release_set import FROM_ENVIRONMENT, HubAccess, publish_releases
from grace_core.stages.once import StageContext, once, progress, stage_folder
from grace_core.stages.reporting import gate_verdict


def publish(
    config: GraceConfig,
    releases: Mapping[str, Artifact],
    evaluations: Mapping[str, Artifact],
    context: StageContext,
    approval: Approval | None = None,
    access: HubAccess = FROM_ENVIRONMENT,
) -> Artifact:
    """Stage `publish`: the results table, and the releases with their cards at the destination.

    Both mappings are by label. Where publishing is switched off, the table is all there is.
    approval: goes into the artifact's facts; it decides nothing about what is published.
    access: how the Hub is reached; recorded nowhere.

    Raises GraceError when the configuration demands an approval and there is none, GateClosed when
    a release falls short of what it demands.
    """
    section, parents = _inputs(config, releases, evaluations)

    def make(writer: ArtifactWriter) -> None:
        if config.publish.enabled and config.publish.approval and approval is None:
            raise GraceError(
                "publish.approval is true, and nobody has approved; run the deployment "
                "grace-publish/publish, which asks, or `grace publish CONFIG --approved-by NAME`"
            )
        verdict = gate_verdict(config, evaluations)
        if config.publish.enabled:
            require_open(verdict)
        writer.facts["gate"] = verdict.model_dump(mode="json")
        if approval is not None:
            writer.facts["approval"] = approval.model_dump()

        def report(done: int, total: int) -> None:
            values = {"done": float(done), "total": float(total)}
            context.on_event(progress("publish", 0, values))

        publish_releases(config, releases, evaluations, writer.path, access, report)

    found = once(config, context, "publish", section, parents, make)
    if _lost(found):
        shutil.rmtree(found.path)
        found = once(config, context, "publish", section, parents, make)
    return found


def find_publication(
    config: GraceConfig, releases: Mapping[str, Artifact], evaluations: Mapping[str, Artifact]
) -> Artifact | None:
    """The publication of exactly these releases and scores, where it is done and still there."""
    section, parents = _inputs(config, releases, evaluations)
    key = fingerprint("publish", section, parents)
    found = find_artifact(stage_folder(config, "publish", key))
    return None if found is None or _lost(found) else found


def _inputs(
    config: GraceConfig, releases: Mapping[str, Artifact], evaluations: Mapping[str, Artifact]
) -> tuple[dict[str, Any], dict[str, Parent]]:
    parents = {f"release-{label}": item.as_parent() for label, item in releases.items()}
    parents |= {f"evaluate-{label}": item.as_parent() for label, item in evaluations.items()}
    section = config.publish.model_dump(
        mode="json", exclude={"approval": True, "destination": {"token_secret"}}
    )
    return section | {"gate": config.evaluation.gate.model_dump(mode="json")}, parents


def _lost(publication: Artifact) -> bool:
    """Whether a release that was published to a directory is no longer there."""
    file = publication.path / "releases.json"
    places = json.loads(file.read_text(encoding="utf-8")).values()
    return any(
        not place["location"].startswith("http") and not Path(place["location"]).is_dir()
        for place in places
    )
