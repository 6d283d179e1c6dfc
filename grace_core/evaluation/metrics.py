"""Shares of right answers: of all items, and of groups of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from grace_core.evaluation.declaration import Marked, Metric, Metrics
from grace_core.evaluation.items import Gold


def share(name: str, marked: Iterable[Marked]) -> Metrics:
    """Right answers among those that were judged; no metric where there are none."""
    flags = [each.reading.correct for each in marked if each.reading is not None]
    return {name: _share(flags)} if flags else {}


def by_field(name: str, marked: Iterable[Marked], field: str) -> Metrics:
    """`share` for every value of a gold's field, as `name.value`, in alphabetical order."""
    groups: dict[str, list[Marked]] = defaultdict(list)
    for each in marked:
        groups[each.gold.fields[field]].append(each)
    found: Metrics = {}
    for value in sorted(groups):
        found |= share(f"{name}.{value}", groups[value])
    return found


def whole_groups(
    name: str, marked: Sequence[Marked], key: Callable[[Gold], object], *, complete: bool = True
) -> Metrics:
    """Groups of which every item is right.

    complete: only groups of which every item was judged count; otherwise every group does of which
        any item was judged, by those items.
    """
    groups: dict[object, list[Marked]] = defaultdict(list)
    for each in marked:
        groups[key(each.gold)].append(each)
    flags = []
    for group in groups.values():
        judged = [each.reading.correct for each in group if each.reading is not None]
        if judged and (len(judged) == len(group) or not complete):
            flags.append(all(judged))
    return {name: _share(flags)} if flags else {}


def _share(flags: Sequence[bool]) -> Metric:
    return Metric(100.0 * sum(flags) / len(flags), sum(flags), len(flags))
