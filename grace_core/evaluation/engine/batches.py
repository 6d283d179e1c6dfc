"""Which questions are answered together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MOST_ROWS = 512


@dataclass(frozen=True)
class Extent:
    """What matters of a question here."""

    tokens: int
    """Of its prompt."""

    budget: int
    """Tokens of its answer, at most."""

    group: str | None
    """Key of its first picture; None where it has none."""


def batches(extents: Sequence[Extent], tokens: int) -> list[list[int]]:
    """Indexes of questions, batch by batch; every question is in one of them.

    The same questions and `tokens` always give the same batches. A batch's rows times its longest
    prompt and answer are at most `tokens`, unless it is a single question. Questions with one
    budget are together, so that none waits for others that may say more; those about one picture
    follow one another, so that its features are at hand; the longest come first, so that what does
    not fit in memory shows at once.
    """
    found: list[list[int]] = []
    for budget in sorted({extent.budget for extent in extents}, reverse=True):
        mine = [index for index, extent in enumerate(extents) if extent.budget == budget]
        batch: list[int] = []
        longest = 0
        for index in _ordered(extents, mine):
            longer = max(longest, extents[index].tokens)
            full = (len(batch) + 1) * (longer + budget) > tokens or len(batch) == MOST_ROWS
            if batch and full:
                found.append(batch)
                batch, longer = [], extents[index].tokens
            batch.append(index)
            longest = longer
        found.append(batch)
    return found


def _ordered(extents: Sequence[Extent], indexes: Iterable[int]) -> list[int]:
    """Longest first; questions about one picture stay together, at the place of the longest."""
    groups: dict[object, list[int]] = {}
    for index in indexes:
        group = extents[index].group
        groups.setdefault(index if group is None else group, []).append(index)
    for group_members in groups.values():
        group_members.sort(key=lambda index: (-extents[index].tokens, index))
    ordered = sorted(groups.values(), key=lambda members: (-extents[members[0]].tokens, members[0]))
    return [index for members in ordered for index in members]
