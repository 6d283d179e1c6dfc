"""Loss on samples kept from training: mean cross-entropy a supervised token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk

from grace_core.losses.cross_entropy import cross_entropy_sum
from grace_core.models.families import Family
from grace_core.models.forward import row_states
from grace_core.models.rows import packed_row
from grace_core.models.visual_inputs import VisualInputs

_ROW_TOKENS = 2048


@torch.no_grad()
def held_out_loss(
    model: Any,
    family: Family,
    data: Path,
    visual: VisualInputs,
    on_progress: Callable[[int, int], None] | None = None,
) -> float | None:
    """Nats a supervised token over the prepared samples in `data`; None when there are none.

    model: loaded with packed attention. Samples are taken in order, as many at once as fit.
    on_progress: called with (samples done, samples in all) after each such row.
    """
    samples = load_from_disk(str(data))
    total, tokens = 0.0, 0
    for first, last in _spans(samples["num_tokens"]):
        row = packed_row([samples[i] for i in range(first, last)], visual).to(model.device)
        logits = model.lm_head(row_states(model, family, row).predicting)
        total += float(cross_entropy_sum(logits, row.labels))
        tokens += len(row.labels)
        if on_progress is not None:
            on_progress(last, len(samples))
    return total / tokens if tokens else None


def _spans(lengths: list[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    start = size = 0
    for index, length in enumerate(lengths):
        if size and size + length > _ROW_TOKENS:
            spans.append((start, index))
            start, size = index, 0
        size += length
    if size:
        spans.append((start, len(lengths)))
    return spans
