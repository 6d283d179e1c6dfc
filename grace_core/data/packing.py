"""Which samples share a packed row, and in which order rows are trained on.

The plan depends on the samples' lengths, the seed and the row size alone, never on the number of
processes: process r of R takes rows r, r + R, ... of every optimizer step. A training run can
therefore continue at any step by counting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

_OPEN_ROWS = 16
"""Rows kept open at one time; more fill better but move samples further from their shuffle."""


def pack_epoch(lengths: Sequence[int], row_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's rows: every sample once, shuffled, each row of at most `row_tokens` tokens.

    Best fit over a few open rows. Row order is the order in which rows were opened.

    Args:
        lengths: tokens of each sample, each at most `row_tokens`.

    Returns:
        Sample indexes of each row.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(lengths))
    rows: list[list[int]] = []
    room: list[int] = []
    open_rows: list[int] = []
    for sample in order.tolist():
        length = lengths[sample]
        assert 0 < length <= row_tokens, f"sample {sample} of {length} tokens fits no row"
        fitting = [row for row in open_rows if room[row] >= length]
        if fitting:
            row = min(fitting, key=lambda candidate: (room[candidate], candidate))
        else:
            if len(open_rows) == _OPEN_ROWS:
                open_rows.remove(min(open_rows, key=lambda fullest: (room[fullest], fullest)))
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
            open_rows.append(row)
        rows[row].append(sample)
        room[row] -= length
    return rows


def planned_steps(
    lengths: Sequence[int],
    *,
    row_tokens: int,
    rows_per_step: int,
    seed: int,
    steps: int | None,
    epochs: float | None,
) -> int:
    """Optimizer steps of a run; for `epochs`, as many as its rows fill (rounded up)."""
    if steps is not None:
        return steps
    assert epochs is not None
    rows = len(pack_epoch(lengths, row_tokens, seed, 0))
    return max(1, math.ceil(rows * epochs / rows_per_step))


def rows_of_steps(
    lengths: Sequence[int], *, row_tokens: int, rows_per_step: int, seed: int, first_step: int = 0
) -> Iterator[list[list[int]]]:
    """For ever: the rows of each optimizer step from `first_step` on, epoch after epoch.

    A step may span two epochs, so that no row is dropped.
    """
    pending: list[list[int]] = []
    to_skip = first_step * rows_per_step
    epoch = 0
    while True:
        rows = pack_epoch(lengths, row_tokens, seed, epoch)
        epoch += 1
        if to_skip >= len(rows):
            to_skip -= len(rows)
            continue
        pending += rows[to_skip:]
        to_skip = 0
        while len(pending) >= rows_per_step:
            yield pending[:rows_per_step]
            pending = pending[rows_per_step:]
