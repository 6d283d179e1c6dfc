"""Shares of right answers: of all items, and of groups of them.

Items without a reading count nowhere: a metric is of what was judged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import fsum

from grace_core.evaluation.declaration import Marked, Metric, Metrics
from grace_core.evaluation.items import Gold


def where(marked: Iterable[Marked], field: str, value: str) -> list[Marked]:
    """The items whose gold has this value in the field."""
    return [each for each in marked if each.gold.fields.get(field) == value]


def share(name: str, marked: Iterable[Marked]) -> Metrics:
    """Right answers among those that were judged; no metric where there are none."""
    flags = [each.reading.correct for each in marked if each.reading is not None]
    return {name: _share(flags)} if flags else {}


def mean_credit(name: str, marked: Iterable[Marked]) -> Metrics:
    """Mean of what answers count, which may be partly right; no metric where there are none."""
    counts = [each.reading.counts for each in marked if each.reading is not None]
    return {name: Metric(100.0 * fsum(counts) / len(counts))} if counts else {}


def by_field(
    name: str,
    marked: Iterable[Marked],
    field: str,
    metric: Callable[[str, Sequence[Marked]], Metrics] = share,
) -> Metrics:
    """A metric for every value of a gold's field, as `name.value`, in alphabetical order.

    Items whose gold lacks the field are in none of them.
    """
    groups: dict[str, list[Marked]] = defaultdict(list)
    for each in marked:
        if field in each.gold.fields:
            groups[each.gold.fields[field]].append(each)
    found: Metrics = {}
    for value in sorted(groups):
        found |= metric(f"{name}.{value}", groups[value])
    return found


def whole_groups(
    name: str, marked: Iterable[Marked], key: Callable[[Gold], object], *, complete: bool = True
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


def mean_of(name: str, metrics: Metrics) -> Metrics:
    """The unweighted mean of metrics, whatever their totals; none of none."""
    if not metrics:
        return {}
    return {name: Metric(sum(metric.percent for metric in metrics.values()) / len(metrics))}


def _share(flags: Sequence[bool]) -> Metric:
    return Metric(100.0 * sum(flags) / len(flags), sum(flags), len(flags))
