"""The lineage of models as a graph, and its JSON form.

A node is something with a content digest: an artifact that a stage made, or an input from outside
(a checkpoint, a tokenizer, annotation files). An edge says that one node was made from another, in
which role. The JSON form is `Lineage.model_dump_json()`; `format` changes with its structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from grace_core.artifacts import OUTSIDE

SHORT = 12
"""Digits of a digest that are shown."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Record):
    """Where a release was published."""

    location: str = Field(description="directory, or address of the repository")
    revision: str = Field(description="digest of the directory's files, or the repository's commit")


class Node(_Record):
    """Something that a model came from, or that came of it."""

    stage: str = Field(description="stage that made it; checkpoint, tokenizer, annotations outside")
    digest: str
    name: str = Field(description="what people call it: a release's name, a repository, the stage")
    present: bool = Field(description="whether its manifest (outside: its digest alone) was read")
    path: str | None = Field(None, description="where it lay; never published")
    revision: str | None = Field(None, description="Hub commit of a checkpoint from outside")
    fingerprint: str | None = None
    created: str | None = Field(None, description="UTC, ISO 8601")
    seconds: float | None = None
    config: dict[str, Any] = Field({}, description="the stage's own settings")
    config_digest: str | None = None
    run_config: str | None = Field(None, description="key of the whole configuration in `configs`")
    code: dict[str, str] = {}
    environment: dict[str, str] = {}
    metrics: dict[str, float] = {}
    published: dict[str, Place] = Field({}, description="of stage publish: by role of the release")

    @property
    def id(self) -> str:
        """Equal bytes made by two stages (a BF16 student and its release) are two nodes."""
        return f"{self.stage}:{self.digest}"

    @property
    def short(self) -> str:
        return self.digest[:SHORT]

    @property
    def from_outside(self) -> bool:
        return self.stage in OUTSIDE


class Edge(_Record):
    """`child` was made from `parent`."""

    child: str = Field(description="id of a node")
    role: str
    parent: str = Field(description="id of a node")


class Lineage(_Record):
    """What the asked-for models came from, their scores and their publications."""

    format: Literal[1] = 1
    models: tuple[str, ...] = Field(description="ids of the nodes that were asked about")
    nodes: tuple[Node, ...] = Field(description="every node after those it was made from")
    edges: tuple[Edge, ...] = ()
    configs: dict[str, dict[str, Any]] = Field({}, description="whole configurations, by digest")

    def node(self, node_id: str) -> Node:
        """The node of an id; KeyError where there is none."""
        return self._by_id()[node_id]

    def parents(self, node_id: str) -> list[tuple[str, Node]]:
        """Roles and nodes that a node was made from, in the manifest's order."""
        nodes = self._by_id()
        return [(edge.role, nodes[edge.parent]) for edge in self.edges if edge.child == node_id]

    def children(self, node_id: str) -> list[tuple[str, Node]]:
        """Nodes that were made from a node, each with the role that the node had."""
        nodes = self._by_id()
        return [(edge.role, nodes[edge.child]) for edge in self.edges if edge.parent == node_id]

    def ancestors(self, node_id: str) -> set[str]:
        """Ids of everything a node was made from, itself left out."""
        found: set[str] = set()
        pending = [node_id]
        while pending:
            for _, parent in self.parents(pending.pop()):
                if parent.id not in found:
                    found.add(parent.id)
                    pending.append(parent.id)
        return found

    def only(self, models: Sequence[str], kept: Iterable[str]) -> Lineage:
        """The part of this graph that the ids `kept` span."""
        ids = set(kept)
        nodes = [node for node in self.nodes if node.id in ids]
        used = {node.run_config for node in nodes}
        return Lineage(
            models=tuple(models),
            nodes=tuple(nodes),
            edges=tuple(e for e in self.edges if e.child in ids and e.parent in ids),
            configs={key: tree for key, tree in self.configs.items() if key in used},
        )

    def _by_id(self) -> dict[str, Node]:
        return {node.id: node for node in self.nodes}


def in_order(nodes: Iterable[Node], edges: Iterable[Edge]) -> tuple[Node, ...]:
    """The nodes, each after those it was made from."""
    parents: dict[str, list[str]] = {}
    for edge in edges:
        parents.setdefault(edge.child, []).append(edge.parent)
    by_id = {node.id: node for node in nodes}
    ordered: dict[str, Node] = {}

    def place(node_id: str) -> None:
        if node_id in ordered:
            return
        for parent in parents.get(node_id, []):
            place(parent)
        ordered[node_id] = by_id[node_id]

    for node_id in by_id:
        place(node_id)
    return tuple(ordered.values())
