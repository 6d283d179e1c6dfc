"""A lineage as files that explain themselves: a page, the picture, JSON and text."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from grace_core.lineage.graph import Lineage, Node
from grace_core.lineage.picture import picture
from grace_core.lineage.text import plain_tree
from grace_core.lineage.words import details, title

_STYLE = """
body { font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222;
  background: #fff; margin: 24px; }
h1 { font-size: 22px; } h2 { font-size: 17px; margin-top: 32px; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 4px 12px 4px 0;
  border-bottom: 1px solid #ddd; vertical-align: top; }
code, pre { font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f6f6f6; padding: 12px; overflow-x: auto; }
.picture { overflow-x: auto; }
"""


def page_files(lineage: Lineage) -> dict[str, str]:
    """Text by file name: `index.html` (needs nothing else), `lineage.json`, `.svg`, `.md`."""
    drawn = picture(lineage)
    trees = "\n".join(plain_tree(lineage, model, "lineage.json") for model in lineage.models)
    return {
        "index.html": _page(lineage, drawn, trees),
        "lineage.json": lineage.model_dump_json(indent=1) + "\n",
        "lineage.svg": drawn,
        "lineage.md": f"# {_heading(lineage)}\n\n```text\n{trees}```\n\n"
        "![What was made from what](lineage.svg)\n",
    }


def _page(lineage: Lineage, drawn: str, trees: str) -> str:
    sections = [
        f"<h1>{escape(_heading(lineage))}</h1>",
        f'<div class="picture">{drawn}</div>',
        f"<h2>As a tree</h2>\n<pre>{escape(trees)}</pre>",
        f"<h2>Everything in it</h2>\n{_inputs_table(lineage)}",
        f"<h2>Code and environment</h2>\n{_environments(lineage)}",
        *(
            f"<h2>Whole configuration <code>{key[:12]}</code></h2>\n"
            f"<details><summary>show</summary><pre>{_json(tree)}</pre></details>"
            for key, tree in lineage.configs.items()
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        f"<title>{escape(_heading(lineage))}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _heading(lineage: Lineage) -> str:
    names = [lineage.node(model).name for model in lineage.models]
    return f"Lineage of {', '.join(names)}"


def _inputs_table(lineage: Lineage) -> str:
    rows = []
    for node in lineage.nodes:
        made_from = "<br>".join(
            f"{escape(role)}: {escape(parent.stage)} <code>{parent.short}</code>"
            for role, parent in lineage.parents(node.id)
        )
        cells = [
            escape(title(node)),
            f"<code>{node.digest}</code>",
            escape(", ".join(details(node))),
            made_from,
            f"<code>{escape(node.path or '')}</code>",
        ]
        rows.append(_row(cells))
    return _table(("what", "digest", "details", "made from", "where"), rows)


def _environments(lineage: Lineage) -> str:
    """One row for all the stages that share code and environment."""
    groups: dict[tuple[str, str], list[str]] = {}
    for node in lineage.nodes:
        if node.code:
            groups.setdefault((_pairs(node.code), _environment(node)), []).append(node.stage)
    rows = [
        _row([escape(", ".join(stages)), escape(code), escape(environment)])
        for (code, environment), stages in groups.items()
    ]
    return _table(("stages", "code", "environment"), rows)


def _environment(node: Node) -> str:
    return _pairs(node.environment)


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _table(head: tuple[str, ...], rows: list[str]) -> str:
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><tr>{titles}</tr>\n" + "\n".join(rows) + "\n</table>"


def _row(cells: list[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _json(tree: dict[str, Any]) -> str:
    return escape(json.dumps(tree, indent=1))
