"""The paired bootstrap: how far shares of right answers may be off, for all models together.

Items are drawn with replacement, the same ones for every model, so that a difference between two
models is not blurred by how hard the drawn items are (Efron and Tibshirani, *An Introduction to the
Bootstrap*, 1993, chapters 8 and 13). Answers about one picture are not independent, so clusters are
drawn, with all their items (Miller, *Adding Error Bars to Evals*, arXiv 2411.00640).

What a draw adds up to depends only on how often each model was right in each cluster. So clusters
are counted by that pattern, and drawing n clusters with replacement is one multinomial draw of the
patterns' counts: the same distribution, at a cost that does not grow with the number of items.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_COUNTS_AT_ONCE = 10_000_000  # of 8 bytes; large sets have tens of thousands of patterns
LEVEL = 95.0
"""Per cent of the draws that an interval holds, the same share cut off at both ends."""


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`, in the unit of what it is about."""

    low: float
    high: float


@dataclass(frozen=True)
class Draws:
    """Shares of right answers in percent, as they are and in every resample."""

    value: NDArray[np.float64]
    """(models,)"""

    draws: NDArray[np.float64]
    """(resamples, models)"""


def resample(
    correct: NDArray[np.bool_] | NDArray[np.float64],
    groups: Sequence[Hashable],
    *,
    whole_groups: bool,
    clusters: Sequence[Hashable] | None = None,
    seed: int,
    name: str,
    resamples: int = RESAMPLES,
) -> Draws:
    """Bootstrap the share of right answers of several models on the same items.

    Args:
        correct: (items, models), in [0, 1].
        groups: of each item.
        whole_groups: a group counts once, as right where all its items are; otherwise its items
            count, each for itself.
        clusters: of each item; what is drawn, a group with its first item. None: groups are.
        seed, name: of the random numbers; each benchmark's name gives it its own.
    """
    drawn_with = list(groups if clusters is None else clusters)
    if whole_groups:
        sizes, right = _sums(correct, groups)
        correct = right == sizes[:, None]
        first = dict(zip(reversed(groups), reversed(drawn_with), strict=True))
        drawn_with = [first[group] for group in dict.fromkeys(groups)]
    sizes, right = _sums(correct, drawn_with)
    units = np.concatenate([sizes[:, None], right], axis=1)
    patterns, counts = np.unique(units, axis=0, return_counts=True)
    random = np.random.default_rng([seed, zlib.crc32(name.encode("utf-8"))])
    at_once = max(1, _COUNTS_AT_ONCE // len(counts))
    sums = [
        random.multinomial(counts.sum(), counts / counts.sum(), size=min(at_once, resamples - done))
        @ patterns
        for done in range(0, resamples, at_once)
    ]
    return Draws(_percent(counts @ patterns), _percent(np.concatenate(sums)))


def _sums(
    correct: NDArray[np.bool_] | NDArray[np.float64], groups: Sequence[Hashable]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Items (groups,) and what they count (groups, models), groups as they first come."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    of_item = np.array([numbers[group] for group in groups])
    sizes = np.bincount(of_item)
    right = [np.bincount(of_item, weights=column, minlength=len(sizes)) for column in correct.T]
    return sizes, np.stack(right, axis=1)


def interval(draws: NDArray[np.float64]) -> Interval:
    """The percentile interval of (resamples,) draws."""
    tail = (100.0 - LEVEL) / 2.0
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return Interval(float(low), float(high))


def _percent(sums: NDArray[Any]) -> NDArray[np.float64]:
    """From (..., 1 + models) sums, the number of items first."""
    return 100.0 * sums[..., 1:] / sums[..., :1]
