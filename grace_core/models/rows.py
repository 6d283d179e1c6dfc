"""Packed rows: several samples in one sequence, as tensors.

Every row carries at least one picture. A row of text-only samples gets a filler: one more sample
that is nothing but the smallest picture, unlabelled and never counted. Its loss is zero, but the
vision tower and the connector take part in forward and backward, so that all ranks of a step
reduce the same gradients and gather the same parameters whatever their rows hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from grace_core.data.pictures import open_picture
from grace_core.models.visual_inputs import VisualInputs

# dims: L tokens of the row, N supervised tokens

_ADMITTED_PIXELS = 2**31
"""Preparation has judged every picture by the configured limit; this only bounds the absurd."""


@dataclass(frozen=True)
class PackedRow:
    """One packed row."""

    input_ids: Tensor
    """(1, L) int64."""

    sample_lengths: list[int]
    """Tokens of each sample, the filler included; adds up to L."""

    predicting: Tensor
    """(N,) int64: positions whose hidden states predict the supervised tokens."""

    labels: Tensor
    """(N,) int64: the supervised tokens."""

    visual_spans: list[tuple[int, int]]
    """Start and number of image tokens of each picture, the filler's left out."""

    pictures: dict[str, Tensor]
    """The model's picture arguments, filler included."""

    pictures_of_sample: list[int]
    """Number of pictures in each sample, the filler included."""

    record_indexes: list[int]
    """Records the samples came from, in order."""

    def to(self, device: torch.device) -> PackedRow:
        """The same row on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            predicting=self.predicting.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            pictures={
                name: value.to(device, non_blocking=True) for name, value in self.pictures.items()
            },
        )


def packed_row(samples: Sequence[Mapping[str, Any]], visual: VisualInputs) -> PackedRow:
    """Pack prepared samples (rows of the Arrow artifact) in the given order."""
    ids: list[int] = []
    lengths: list[int] = []
    predicting: list[int] = []
    labels: list[int] = []
    spans: list[tuple[int, int]] = []
    images: list[Image.Image] = []
    counts: list[int] = []
    for sample in samples:
        start = len(ids)
        tokens = sample["input_ids"]
        supervised = [i for i, flag in enumerate(sample["labels_mask"]) if flag]
        assert supervised and supervised[0] > 0, "a sample supervises something, never its start"
        predicting += [start + i - 1 for i in supervised]
        labels += [tokens[i] for i in supervised]
        spans += _visual_spans(tokens, start, sample["image_grids"], visual)
        images += [open_picture(content, _ADMITTED_PIXELS) for content in sample["images"]]
        counts.append(len(sample["images"]))
        ids += tokens
        lengths.append(len(tokens))
    if not images:
        filler = visual.smallest_picture()
        tokens_of_filler = visual.tokens(visual.grid(filler))
        images.append(filler)
        counts.append(1)
        ids += [visual.image_token_id] * tokens_of_filler
        lengths.append(tokens_of_filler)
    return PackedRow(
        input_ids=torch.tensor([ids], dtype=torch.long),
        sample_lengths=lengths,
        predicting=torch.tensor(predicting, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        visual_spans=spans,
        pictures=visual.tensors(images),
        pictures_of_sample=counts,
        record_indexes=[int(sample["record_index"]) for sample in samples],
    )


def _visual_spans(
    tokens: Sequence[int], start: int, grids: Sequence[Sequence[int]], visual: VisualInputs
) -> list[tuple[int, int]]:
    """Where each picture's image tokens stand; pictures follow one another in the sequence."""
    places = [i for i, token in enumerate(tokens) if token == visual.image_token_id]
    spans = []
    first = 0
    for grid in grids:
        count = visual.tokens((grid[0], grid[1], grid[2]))
        place = places[first : first + count]
        assert len(place) == count and place[-1] - place[0] == count - 1, (
            "the image tokens of one picture stand together"
        )
        spans.append((start + place[0], count))
        first += count
    assert first == len(places), "every image token belongs to a picture"
    return spans
