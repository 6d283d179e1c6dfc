"""Forward: which models came from one data set, teacher or any other input."""

from __future__ import annotations

from collections.abc import Iterable

from grace_core.artifacts import Artifact
from grace_core.errors import GraceError
from grace_core.lineage.collect import graph_of
from grace_core.lineage.graph import Lineage, Node


def descendants(source: str, known: Iterable[Artifact]) -> Lineage:
    """Everything that came of the node whose digest starts with `source`; it is the one asked for.

    Raises GraceError when no digest starts so, or several do.
    """
    known = list(known)
    return below(source, graph_of(known, known))


def below(source: str, graph: Lineage) -> Lineage:
    """The part of a graph that came of the node whose digest starts with `source`."""
    start = _the_one(source, graph.nodes)
    kept = {node.id for node in graph.nodes if start & (graph.ancestors(node.id) | {node.id})}
    return graph.only(sorted(start), kept)


def models_in(lineage: Lineage) -> list[Node]:
    """The released models of a graph; the trained ones where nothing was released."""
    released = [node for node in lineage.nodes if node.stage.startswith("release-")]
    trained = [node for node in lineage.nodes if node.stage in ("teacher", "bf16", "w8", "w4")]
    return released or trained


def _the_one(source: str, nodes: Iterable[Node]) -> set[str]:
    found = [node for node in nodes if node.digest.startswith(source)]
    digests = {node.digest for node in found}
    if not digests:
        raise GraceError(
            f"nothing here was made from {source}: no recorded digest starts so; `grace lineage "
            "MODEL` shows the digests of a model's inputs, and --root says where to look"
        )
    if len(digests) > 1:
        listed = "".join(f"\n  {node.stage}  {node.digest}" for node in found)
        raise GraceError(f"several digests start with {source}; give more digits:{listed}")
    return {node.id for node in found}
