"""A lineage as a picture: one self-contained SVG, readable at its own size.

Sources stand at the top, the model and what was said of it at the bottom. Every edge of the graph
is one line from what was used to what was made, with its roles beside its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from grace_core.lineage.graph import Lineage, Node
from grace_core.lineage.layout import BOX_WIDTH, Layout, lay_out
from grace_core.lineage.words import details

_MARGIN = 16
_LINE = 16
_ROW_GAP = 52
_DETAILS = 5
"""Lines of details in a box; the text form has all."""
_LETTERS = 26
"""Letters of 12 px that fit a box's width, of the widest usual font."""
_TAIL = 9
"""Letters kept of the end of a long text: it often tells names apart, as `-W4G128` does."""
_COLOURS = {
    "outside": ("#f3efe4", "#8a7a4d"),
    "data": ("#e4eef8", "#3a6ea5"),
    "training": ("#e6f2e6", "#3c7d42"),
    "release": ("#f6e6da", "#b45f24"),
    "said": ("#eee8f5", "#6d549b"),
}


def picture(lineage: Lineage) -> str:
    """The whole SVG document."""
    edges = [(edge.child, edge.parent) for edge in lineage.edges]
    layout = lay_out([node.id for node in lineage.nodes], edges)
    boxes = {node.id: _lines(node) for node in lineage.nodes}
    heights = [
        max((34 + _LINE * len(boxes[node_id]) for node_id in row), default=0) for row in layout.rows
    ]
    tops = [_MARGIN + sum(heights[:number]) + _ROW_GAP * number for number in range(len(heights))]
    row_of = {node_id: number for number, row in enumerate(layout.rows) for node_id in row}
    width = layout.width + 2 * _MARGIN
    height = tops[-1] + heights[-1] + _MARGIN
    body = [
        _edge(lineage, child, parent, layout, row_of, tops, heights)
        for child, parent in dict.fromkeys(edges)
    ]
    body += [
        _box(node, boxes[node.id], layout.centre[node.id], tops[row_of[node.id]], lineage.models)
        for node in lineage.nodes
    ]
    names = ", ".join(lineage.node(model).name for model in lineage.models)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif" font-size="12">\n'
        f"<title>{escape(f'Lineage of {names}')}</title>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>\n'
        '<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _lines(node: Node) -> list[str]:
    name = [] if node.name == node.stage else [node.name]
    told = details(node)
    if node.stage == "publish":
        places = node.published.values()
        told = [x for p in places for x in (p.location.split("/")[-1], f"at {p.revision[:12]}")]
    return [_cut(line) for line in [*name, *told][:_DETAILS]]


def _box(node: Node, lines: Sequence[str], centre: float, top: float, models: Sequence[str]) -> str:
    fill, stroke = _COLOURS[_group(node)]
    left = _MARGIN + centre - BOX_WIDTH / 2
    height = 34 + _LINE * len(lines)
    asked = node.id in models
    dashes = "" if node.present else ' stroke-dasharray="5 4"'
    weight = 2.5 if asked else 1.2
    text = [
        f'<text x="{left + 10:.1f}" y="{top + 20:.1f}" font-weight="600" font-size="13">'
        f"{escape(node.stage)}</text>",
        f'<text x="{left + BOX_WIDTH - 10:.1f}" y="{top + 20:.1f}" text-anchor="end" '
        f'font-family="ui-monospace, monospace" font-size="11" fill="#555">'
        f"{escape(node.digest[:10])}</text>",
        *(
            f'<text x="{left + 10:.1f}" y="{top + 38 + _LINE * number:.1f}" fill="#333">'
            f"{escape(line)}</text>"
            for number, line in enumerate(lines)
        ),
    ]
    return (
        f"<g data-node={quoteattr(node.id)}><title>{escape(f'{node.stage} {node.digest}')}</title>"
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{BOX_WIDTH}" height="{height}" rx="6" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="{weight}"{dashes}/>{"".join(text)}</g>'
    )


def _edge(
    lineage: Lineage,
    child: str,
    parent: str,
    layout: Layout,
    row_of: dict[str, int],
    tops: Sequence[float],
    heights: Sequence[float],
) -> str:
    roles = [e.role for e in lineage.edges if (e.child, e.parent) == (child, parent)]
    upper, lower = row_of[parent], row_of[child]
    parent_box = 34 + _LINE * len(_lines(lineage.node(parent)))
    x, y = _port(lineage, layout, parent, child, below=True), tops[upper] + parent_box
    path = [f"M{x:.1f} {y:.1f}"]
    y = tops[upper] + heights[upper]  # straight down first: boxes beside this one may be higher
    path.append(f"L{x:.1f} {y:.1f}")
    for row, place in layout.bends.get((child, parent), []):
        path.append(_curve(x, y, _MARGIN + place, tops[row]))
        x, y = _MARGIN + place, tops[row] + heights[row]
        path.append(f"L{x:.1f} {y:.1f}")
    end_x, end_y = _port(lineage, layout, child, parent, below=False), tops[lower]
    path.append(_curve(x, y, end_x, end_y))
    label = ", ".join(dict.fromkeys(_role(role) for role in roles))
    return (
        f"<g data-edge={quoteattr(f'{child} < {parent}')}><title>{escape(label)}</title>"
        f'<path d="{" ".join(path)}" fill="none" stroke="#777" stroke-width="1.2" '
        f'marker-end="url(#head)"/>'
        f'<text x="{end_x + 5:.1f}" y="{end_y - 9:.1f}" font-size="10.5" fill="#555" '
        f'stroke="#fff" stroke-width="3" paint-order="stroke">{escape(_cut(label))}</text></g>'
    )


def _port(lineage: Lineage, layout: Layout, node: str, other: str, *, below: bool) -> float:
    """Where on a box's edge the line to `other` starts: lines stand side by side, as they come."""
    pairs = [(e.child, e.parent) for e in lineage.edges]
    linked = {c for c, p in pairs if p == node} if below else {p for c, p in pairs if c == node}

    def towards(end: str) -> float:
        key = (end, node) if below else (node, end)
        bends = layout.bends.get(key)
        if not bends:
            return layout.centre[end]
        return bends[0][1] if below else bends[-1][1]

    ordered = sorted(linked, key=lambda end: (towards(end), end))
    share = (ordered.index(other) + 1) / (len(ordered) + 1)
    return _MARGIN + layout.centre[node] + (share - 0.5) * BOX_WIDTH


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    half = (to_y - y) / 2
    return f"C{x:.1f} {y + half:.1f} {to_x:.1f} {to_y - half:.1f} {to_x:.1f} {to_y:.1f}"


def _role(role: str) -> str:
    """A role that repeats the stage it leads to says nothing beside the line."""
    return "" if role.startswith(("release-", "evaluate-")) else role.replace("_", " ")


def _group(node: Node) -> str:
    if node.from_outside:
        return "outside"
    if node.stage.startswith("release-"):
        return "release"
    if node.stage.startswith("evaluate-") or node.stage == "publish":
        return "said"
    return "training" if node.stage in ("teacher", "bf16", "w8", "w4") else "data"


def _cut(text: str) -> str:
    if len(text) <= _LETTERS:
        return text
    return f"{text[: _LETTERS - 1 - _TAIL]}…{text[-_TAIL:]}"
