"""The lineage of a model from the MLflow server alone, for who has not the disk of the runs.

The edges are MLflow's own: a run's model inputs, data set inputs and model outputs. A model leads
to its `source_run_id`; a data set to the run whose output has its digest. What a node says of
itself is the manifest that its run holds. The result is the graph that the files give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlflow.entities import Run

from grace_core.config.load import config_digest
from grace_core.lineage.collect import own_places
from grace_core.lineage.graph import Edge, Lineage, Node, in_order
from operations.mlflow_names import DIGEST, STAGE
from operations.mlflow_records import Records


def lineage_in_mlflow(name: str) -> Lineage:
    """The lineage of a model: ancestors, scores, publications.

    name: registered name (its newest version), `name@alias`, a LoggedModel's id, or the first
    digits of a digest. Raises GraceError when there is none.
    """
    server = Records()
    model = server.model(name)
    asked = f"{model.tags[STAGE]}:{model.tags[DIGEST]}"
    walk = _Walk(server)
    walk.backwards(server.run_of(model))
    about = [
        run
        for run in server.users(model.tags[STAGE], model.tags[DIGEST])
        if run.data.tags[STAGE].startswith("evaluate-") or run.data.tags[STAGE] == "publish"
    ]
    for run in about:
        walk.backwards(run)
    graph = walk.graph([asked])
    kept = {asked} | graph.ancestors(asked)
    for run in about:
        node_id = _id_of(run)
        kept |= {node_id}
        if not node_id.startswith("publish:"):
            kept |= graph.ancestors(node_id)
    return own_places(graph.only([asked], kept))


def descendants_in_mlflow(source: str) -> Lineage:
    """Everything that came of what a digest (or its first digits) stands for."""
    server = Records()
    stage, digest = server.thing(source)
    walk = _Walk(server)
    start = f"{stage}:{digest}"
    pending, seen = [(stage, digest)], {start}
    while pending:
        for run in server.users(*pending.pop()):
            walk.backwards(run)
            node_id = _id_of(run)
            if node_id not in seen:
                seen.add(node_id)
                pending.append((run.data.tags[STAGE], run.data.tags[DIGEST]))
    graph = walk.graph([start])
    return graph.only([start], seen)


class _Walk:
    """Nodes and edges found so far."""

    def __init__(self, server: Records) -> None:
        self._server = server
        self._nodes: dict[str, Node] = {}
        self._edges: dict[Edge, None] = {}
        self._configs: dict[str, dict[str, Any]] = {}
        self._seen: set[str] = set()

    def backwards(self, run: Run) -> None:
        """Take in what a run made and everything that was made from."""
        pending = [run]
        while pending:
            made = pending.pop(0)
            if made.info.run_id in self._seen:
                continue
            self._seen.add(made.info.run_id)
            node = self._server.node(made)
            self._nodes[node.id] = node
            config = self._server.manifest(made).run_config
            if config:
                self._configs[config_digest(config)] = config
            for role, parent in self._server.inputs(made):
                self._edges[Edge(child=node.id, role=role, parent=parent.id)] = None
                maker = None if parent.from_outside else self._server.maker(parent)
                if maker is None:
                    self._nodes.setdefault(parent.id, parent)
                else:
                    pending.append(maker)

    def graph(self, models: Sequence[str]) -> Lineage:
        return Lineage(
            models=tuple(models),
            nodes=in_order(self._nodes.values(), self._edges),
            edges=tuple(self._edges),
            configs=self._configs,
        )


def _id_of(run: Run) -> str:
    return f"{run.data.tags[STAGE]}:{run.data.tags[DIGEST]}"
