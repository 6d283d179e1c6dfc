"""A lineage as a tree of text: the model at the top, below each thing what it was made from."""

from __future__ import annotations

import io
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from grace_core.lineage.graph import Lineage, Node
from grace_core.lineage.words import details, hardware, title

_WIDE = 400
"""Columns; a tree in a file is never wrapped."""


def tree(lineage: Lineage, model: str, where: str = "configs in the JSON form") -> Tree:
    """The tree of one model of the lineage.

    What several things were made from is spelt out once; where it comes up again it stands alone.
    where: says where the whole configuration is.
    """
    node = lineage.node(model)
    root = Tree(_line(node), guide_style="dim")
    shown = {model}
    for role, parent in lineage.parents(model):
        _grow(root, lineage, role, parent, shown)
    for role, child in lineage.children(model):
        if child.stage == "publish":
            own = {role: child.published[role]} if role in child.published else {}
            line = _line(child.model_copy(update={"published": own}))
            root.add(_labelled("published", line))
        elif child.stage.startswith("evaluate-"):
            _grow(root, lineage, "scores", child, shown)
    for label, text in facts(lineage, node, where).items():
        root.add(_labelled(label, text))
    return root


def facts(lineage: Lineage, node: Node, where: str) -> dict[str, str]:
    """Configuration, code and environment of the stages that trained the model, each once."""
    made = [*(lineage.node(i) for i in _ancestors_in_order(lineage, node.id)), node]
    trained = [item for item in made if "training" in item.config] or [node]
    found: dict[str, list[str]] = {"configuration": [], "code": [], "environment": []}
    for item in trained:
        if item.run_config is not None:
            found["configuration"].append(f"{item.run_config[:12]} ({where})")
        found["code"].append(" ".join(item.code.values()))
        versions = [f"{k} {v}" for k, v in item.environment.items() if k in _TOLD]
        found["environment"].append(", ".join(filter(None, [*versions, hardware(item)])))
    return {
        label: "; ".join(dict.fromkeys(filter(None, values)))
        for label, values in found.items()
        if any(values)
    }


def plain_tree(lineage: Lineage, model: str, where: str = "configs in the JSON form") -> str:
    """The same tree as text without colours."""
    return plain(tree(lineage, model, where))


def plain(shown: Tree) -> str:
    """A tree as lines of text, each as long as it is."""
    console = Console(file=io.StringIO(), width=_WIDE, color_system=None, force_terminal=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def descendants_tree(lineage: Lineage) -> Tree:
    """What came of the node that the lineage was asked about, as a tree downwards."""
    roots = [lineage.node(node_id) for node_id in lineage.models]
    top = Tree(_line(roots[0]), guide_style="dim")
    shown: set[str] = set()
    for root in roots:
        _grow_down(top, lineage, root, shown)
    return top


_TOLD = ("python", "torch", "transformers", "deepspeed")


def _ancestors_in_order(lineage: Lineage, node_id: str) -> list[str]:
    ancestors = lineage.ancestors(node_id)
    return [node.id for node in lineage.nodes if node.id in ancestors]


def _grow(branch: Tree, lineage: Lineage, role: str, node: Node, shown: set[str]) -> None:
    parents = lineage.parents(node.id)
    again = node.id in shown
    note = " (see above)" if again and parents else ""
    added = branch.add(_labelled("" if role == node.stage else role, _line(node), note))
    shown.add(node.id)
    if not again:
        for parent_role, parent in parents:
            # A score hangs below its model, which need not be told again.
            if not (role == "scores" and parent.id in shown):
                _grow(added, lineage, parent_role, parent, shown)


def _grow_down(branch: Tree, lineage: Lineage, node: Node, shown: set[str]) -> None:
    by_child: Mapping[str, Node] = {child.id: child for _, child in lineage.children(node.id)}
    for child in by_child.values():
        again = child.id in shown
        added = branch.add(Text.assemble(_line(child), (" (see above)" if again else "", "dim")))
        shown.add(child.id)
        if not again:
            _grow_down(added, lineage, child, shown)


def _labelled(label: str, text: str | Text, note: str = "") -> Text:
    return Text.assemble((f"{label}: " if label else "", "cyan"), text, (note, "dim"))


def _line(node: Node) -> Text:
    parts = Text.assemble((title(node), "bold"), " ", (node.short, "dim"))
    told = ", ".join(details(node))
    return parts if not told else Text.assemble(parts, f"  {told}")
