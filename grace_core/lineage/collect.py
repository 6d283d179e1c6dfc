"""From manifests on disk to the graph of a model: its ancestors, its scores, its publications.

An ancestor is looked for where its child's manifest says, then beside the child (a run directory
may have been moved), then among the other artifacts that are known. One that is nowhere stays in
the graph with what the child recorded of it: stage and digest.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_core.artifacts import MANIFEST, OUTSIDE, Artifact, Manifest, Parent, find_artifact
from grace_core.config.load import config_digest
from grace_core.config.names import release_name
from grace_core.errors import GraceError
from grace_core.lineage.graph import Edge, Lineage, Node, Place, in_order

logger = logging.getLogger(__name__)

_NOT_SEARCHED = ("work", "checkpoints", "logs")
"""Folders of a run that hold no artifacts, and much else."""
_SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/[^/]+/?$")


def artifacts_below(root: Path) -> list[Artifact]:
    """Every complete artifact below `root`, oldest first; one that cannot be read is warned of."""
    found = []
    for folder, names, files in os.walk(root):
        if MANIFEST in files and Path(folder).parent.name == "artifacts":
            artifact = _readable(Path(folder))
            found += [] if artifact is None else [artifact]
            names.clear()
        names[:] = sorted(n for n in names if not n.startswith(".") and n not in _NOT_SEARCHED)
    return sorted(found, key=lambda artifact: artifact.manifest.created)


def lineage_of(models: Sequence[Artifact], known: Iterable[Artifact]) -> Lineage:
    """The lineage of `models`.

    known: artifacts among which scores, publications and moved ancestors are looked for; usually
    `artifacts_below` a folder.
    """
    known = list(known)
    asked = [_id(model.manifest.stage, model.digest) for model in models]
    related = [
        artifact
        for artifact in known
        if _is_about(artifact)
        and any(_id(p.kind, p.digest) in asked for p in artifact.manifest.parents.values())
    ]
    graph = graph_of([*models, *related], known)
    kept = set(asked)
    for node_id in asked:
        kept |= graph.ancestors(node_id)
    for artifact in related:
        node_id = _id(artifact.manifest.stage, artifact.digest)
        # Of a publication of several models, the other models are no part of this one's lineage.
        kept |= (
            {node_id}
            if artifact.manifest.stage == "publish"
            else ({node_id} | graph.ancestors(node_id))
        )
    return own_places(graph.only(asked, kept))


def graph_of(artifacts: Iterable[Artifact], known: Iterable[Artifact]) -> Lineage:
    """These artifacts and everything they were made from.

    Equal content made in two ways is one node with the inputs of both; unequal content made in one
    way, as on GPUs that round differently, is two nodes.
    """
    by_id = {_id(artifact.manifest.stage, artifact.digest): artifact for artifact in known}
    nodes: dict[str, Node] = {}
    seen: set[tuple[str, str]] = set()
    edges: dict[Edge, None] = {}
    configs: dict[str, dict[str, Any]] = {}
    asked = list(artifacts)
    pending = list(asked)
    while pending:
        artifact = pending.pop(0)
        node_id = _id(artifact.manifest.stage, artifact.digest)
        way = (node_id, artifact.manifest.fingerprint)
        if way in seen:
            continue
        seen.add(way)
        if node_id not in nodes or not nodes[node_id].present:
            nodes[node_id] = node_of(artifact)
        if artifact.manifest.run_config:
            key = config_digest(artifact.manifest.run_config)
            configs[key] = artifact.manifest.run_config
        for role, parent in artifact.manifest.parents.items():
            parent_id = _id(parent.kind, parent.digest)
            edges[Edge(child=node_id, role=role, parent=parent_id)] = None
            found = None if parent.kind in OUTSIDE else _find(artifact, parent, by_id)
            if found is not None:
                pending.append(found)
            else:
                nodes.setdefault(parent_id, _recorded(parent))
    models = dict.fromkeys(_id(a.manifest.stage, a.digest) for a in asked)
    return Lineage(
        models=tuple(models),
        nodes=in_order(nodes.values(), edges),
        edges=tuple(edges),
        configs=configs,
    )


def node_of(artifact: Artifact) -> Node:
    """The node of an artifact; of a publication also where it went."""
    manifest = artifact.manifest
    places = artifact.path / "releases.json"
    published = {}
    if manifest.stage == "publish" and places.is_file():
        recorded = json.loads(places.read_text(encoding="utf-8"))
        published = {f"release-{label}": Place(**place) for label, place in recorded.items()}
    return manifest_node(manifest, str(artifact.path), published)


def manifest_node(manifest: Manifest, path: str, published: Mapping[str, Place]) -> Node:
    """The node of what a manifest describes; published: where its releases went, by role."""
    return Node(
        stage=manifest.stage,
        digest=manifest.digest,
        name=_name(manifest.stage, manifest.run_config),
        present=True,
        path=path,
        fingerprint=manifest.fingerprint,
        created=manifest.created,
        seconds=manifest.seconds,
        config=manifest.config,
        config_digest=manifest.config_digest,
        run_config=config_digest(manifest.run_config) if manifest.run_config else None,
        code=manifest.code,
        environment=manifest.environment,
        metrics=manifest.metrics,
        published=dict(published),
    )


def outside_name(kind: str, path: str) -> str:
    """What an input from outside is called: its repository, or the last part of its path(s)."""
    if kind == "annotations":
        return ", ".join(Path(part).name for part in path.split(", "))
    snapshot = _SNAPSHOT.search(path)
    if snapshot:  # of the Hub's cache on this machine
        return snapshot["name"].replace("--", "/")
    return Path(path).name


def own_places(lineage: Lineage) -> Lineage:
    """Of publications of several models, keep where the models of this lineage went."""
    kept = [
        node
        if node.stage != "publish"
        else node.model_copy(
            update={
                "published": {
                    role: node.published[role]
                    for role, _ in lineage.parents(node.id)
                    if role in node.published
                }
            }
        )
        for node in lineage.nodes
    ]
    return lineage.model_copy(update={"nodes": tuple(kept)})


def _is_about(artifact: Artifact) -> bool:
    stage = artifact.manifest.stage
    return stage.startswith("evaluate-") or stage == "publish"


def _find(child: Artifact, parent: Parent, known: dict[str, Artifact]) -> Artifact | None:
    recorded = Path(parent.path)
    for folder in (recorded, child.path.parent / recorded.name):
        found = _readable(folder)
        if found is not None and found.digest == parent.digest:
            return found
    return known.get(_id(parent.kind, parent.digest))


def _readable(folder: Path) -> Artifact | None:
    """None where there is no artifact, or one that is damaged or of another version."""
    try:
        return find_artifact(folder)
    except GraceError as error:
        logger.warning("left out of the lineage: %s", error)
        return None


def _recorded(parent: Parent) -> Node:
    """What a child recorded of an input that is from outside, or whose folder is gone."""
    outside = parent.kind in OUTSIDE
    return Node(
        stage=parent.kind,
        digest=parent.digest,
        name=outside_name(parent.kind, parent.path) if outside else parent.kind,
        present=outside,
        path=parent.path,
        revision=parent.revision,
    )


def _name(stage: str, run_config: dict[str, Any]) -> str:
    if not stage.startswith("release-") or not run_config:
        return stage
    base, group = run_config["publish"]["name"], run_config["quantize"]["group_size"]
    return release_name(base, stage.removeprefix("release-"), group)


def _id(stage: str, digest: str) -> str:
    return f"{stage}:{digest}"
