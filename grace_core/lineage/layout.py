"""Places for the boxes of a layered graph, with a way for every line that touches no other box.

Every node stands one row below the lowest of those it was made from. A line that passes rows
gets a free slot in each of them. Within the rows, slots are ordered by the mean place of their
neighbours (barycentre), which keeps lines short and mostly uncrossed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

BOX_WIDTH = 208
GAP = 28
LANE = 26
"""Width of the slot of a line that passes a row."""
_SWEEPS = 8

Slot = tuple[str, ...]
"""A node's id, or (child, parent, row) of a line that passes."""


@dataclass(frozen=True)
class Layout:
    """Rows from the top; horizontal centres in pixels."""

    rows: Sequence[Sequence[str]]
    centre: Mapping[str, float]
    bends: Mapping[tuple[str, str], Sequence[tuple[int, float]]]
    """(child, parent) -> the (row, centre) through which their line passes, from the parent on."""

    width: float


def lay_out(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> Layout:
    """Lay out nodes, given with every one after those it was made from; edges: (child, parent)."""
    row: dict[str, int] = {}
    parents = {node: [p for c, p in edges if c == node] for node in nodes}
    for node in nodes:
        row[node] = max((row[parent] + 1 for parent in parents[node]), default=0)
    for node in reversed(nodes):  # a source stands right above its first user
        users = [row[child] for child, parent in edges if parent == node]
        if users and not parents[node]:
            row[node] = min(users) - 1
    slots: list[list[Slot]] = [[] for _ in range(max(row.values(), default=0) + 1)]
    links: list[tuple[Slot, Slot]] = []
    for node in nodes:
        slots[row[node]].append((node,))
    for child, parent in dict.fromkeys(edges):
        way: list[Slot] = [(parent,)]
        for passed in range(row[parent] + 1, row[child]):
            lane = (child, parent, str(passed))
            slots[passed].append(lane)
            way.append(lane)
        way.append((child,))
        links += pairwise(way)
    _order(slots, links)
    centre, width = _centres(slots)
    bends: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for number, line in enumerate(slots):
        for slot in line:
            if len(slot) == 3:
                bends.setdefault((slot[0], slot[1]), []).append((number, centre[slot]))
    return Layout(
        rows=[[slot[0] for slot in line if len(slot) == 1] for line in slots],
        centre={slot[0]: place for slot, place in centre.items() if len(slot) == 1},
        bends=bends,
        width=width,
    )


def _order(slots: list[list[Slot]], links: Sequence[tuple[Slot, Slot]]) -> None:
    above: dict[Slot, list[Slot]] = {}
    below: dict[Slot, list[Slot]] = {}
    for upper, lower in links:
        above.setdefault(lower, []).append(upper)
        below.setdefault(upper, []).append(lower)
    for sweep in range(_SWEEPS):
        downwards = sweep % 2 == 0
        neighbours = above if downwards else below
        for line in slots if downwards else reversed(slots):
            centre, _ = _centres(slots)

            def mean(
                slot: Slot,
                centre: Mapping[Slot, float] = centre,
                neighbours: Mapping[Slot, list[Slot]] = neighbours,
            ) -> float:
                near = [centre[other] for other in neighbours.get(slot, [])]
                return sum(near) / len(near) if near else centre[slot]

            line.sort(key=mean)


def _centres(slots: Sequence[Sequence[Slot]]) -> tuple[dict[Slot, float], float]:
    """Centre of every slot, the rows centred on one another; and the width of the widest row."""
    widths = [[BOX_WIDTH if len(slot) == 1 else LANE for slot in line] for line in slots]
    totals = [sum(line) + GAP * (len(line) - 1) for line in widths]
    widest = max(totals, default=0)
    centre: dict[Slot, float] = {}
    for line, sizes, total in zip(slots, widths, totals, strict=True):
        left = (widest - total) / 2
        for slot, size in zip(line, sizes, strict=True):
            centre[slot] = left + size / 2
            left += size + GAP
    return centre, float(widest)
