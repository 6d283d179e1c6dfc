"""Packed rows: several samples in one sequence, as tensors.

Every row carries at least one picture. A row of text-only samples gets a filler: one more sample
that is nothing but the smallest picture, unlabelled and never counted. Its loss is zero, but the
vision tower and the connector take part in forward and backward, so that all ranks of a step
reduce the same gradients and gather the same parameters whatever their rows hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from grace_core.data.pictures import open_picture
from grace_core.models.segments import Segments
from grace_core.models.visual_inputs import Grid, VisualInputs

# dims: L tokens of the row, N supervised tokens

_ADMITTED_PIXELS = 2**31
"""Preparation has judged every picture by the configured limit; this only bounds the absurd."""


_JOINED_TOKENS = 8192
"""Up to so many tokens of several rows make one pass of a frozen model."""


@dataclass(frozen=True)
class PackedRow:
    """One packed row."""

    input_ids: Tensor
    """(1, L) int64."""

    position_ids: Tensor
    """(3, 1, L) int64 M-RoPE positions, or (1, L) plain ones; each sample starts anew."""

    samples: Segments
    """Tokens of each sample, the filler included; add up to L."""

    predicting: Tensor
    """(N,) int64: positions whose hidden states predict the supervised tokens."""

    labels: Tensor
    """(N,) int64: the supervised tokens."""

    visual_spans: list[tuple[int, int]]
    """Start and number of image tokens of each picture, the filler's left out."""

    image_places: Tensor
    """(V,) int64: places of all image tokens in the row, in order, the filler's included."""

    pictures: dict[str, Tensor]
    """The model's picture arguments, filler included; grids stay on the CPU."""

    grids: list[Grid]
    """Patches of each picture, the filler included."""

    frames: Segments
    """Patches of each frame of each picture: attention of a vision tower stays within them."""

    record_indexes: list[int]
    """Records the samples came from, in order."""

    def to(self, device: torch.device) -> PackedRow:
        """The same row on another device; what the host needs to know stays with it."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedRow:
        """The same row in page-locked memory, from where copies do not halt the host."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> PackedRow:
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            samples=self.samples.moved(move),
            predicting=move(self.predicting),
            labels=move(self.labels),
            image_places=move(self.image_places),
            frames=self.frames.moved(move),
            pictures={
                name: value if name == "image_grid_thw" else move(value)
                for name, value in self.pictures.items()
            },
        )


def groups_of_rows(
    rows: Sequence[PackedRow], row_tokens: int | None = None
) -> Iterator[list[PackedRow]]:
    """Consecutive rows that go through a frozen part of a model together, as one joined row.

    A pass costs the host the same whatever its length, and keeps nothing for a backward pass.

    row_tokens: counted for every row, so that as many rows make as many groups whatever they hold;
    None: as many as it has.
    """
    group: list[PackedRow] = []
    total = 0
    for row in rows:
        length = row_tokens or row.input_ids.shape[1]
        if group and total + length > _JOINED_TOKENS:
            yield group
            group, total = [], 0
        group.append(row)
        total += length
    yield group


def joined_row(rows: Sequence[PackedRow]) -> PackedRow:
    """Several rows as one, on their device; supervised tokens and pictures stay in order."""
    if len(rows) == 1:
        return rows[0]
    starts = list(accumulate((row.input_ids.shape[1] for row in rows), initial=0))[:-1]
    placed = list(zip(rows, starts, strict=True))
    return PackedRow(
        input_ids=torch.cat([row.input_ids for row in rows], dim=1),
        position_ids=torch.cat([row.position_ids for row in rows], dim=-1),
        samples=Segments.joined([row.samples for row in rows]),
        predicting=torch.cat([row.predicting + start for row, start in placed]),
        labels=torch.cat([row.labels for row in rows]),
        visual_spans=[
            (start + first, count) for row, start in placed for first, count in row.visual_spans
        ],
        image_places=torch.cat([row.image_places + start for row, start in placed]),
        pictures={
            name: torch.cat([row.pictures[name] for row in rows]) for name in rows[0].pictures
        },
        grids=[grid for row in rows for grid in row.grids],
        frames=Segments.joined([row.frames for row in rows]),
        record_indexes=[index for row in rows for index in row.record_indexes],
    )


def packed_row(samples: Sequence[Mapping[str, Any]], visual: VisualInputs) -> PackedRow:
    """Pack prepared samples (rows of the Arrow artifact) in the given order."""
    ids: list[int] = []
    lengths: list[int] = []
    predicting: list[int] = []
    labels: list[int] = []
    spans: list[tuple[int, int]] = []
    positions: list[Tensor] = []
    images: list[Image.Image] = []
    grids: list[Grid] = []
    for sample in samples:
        start = len(ids)
        tokens = sample["input_ids"]
        supervised = [i for i, flag in enumerate(sample["labels_mask"]) if flag]
        assert supervised and supervised[0] > 0, "a sample supervises something, never its start"
        predicting += [start + i - 1 for i in supervised]
        labels += [tokens[i] for i in supervised]
        grids_here = [(frames, rows, columns) for frames, rows, columns in sample["image_grids"]]
        spans_here = _visual_spans(tokens, start, grids_here, visual)
        starts = [first - start for first, _ in spans_here]
        positions.append(visual.positions(len(tokens), starts, grids_here))
        images += [open_picture(content, _ADMITTED_PIXELS) for content in sample["images"]]
        grids += grids_here
        spans += spans_here
        ids += tokens
        lengths.append(len(tokens))
    if not images:
        filler = visual.smallest_picture()
        grid, count = visual.grid_and_tokens(filler)
        positions.append(visual.positions(count, [0], [grid]))
        images.append(filler)
        grids.append(grid)
        ids += [visual.image_token_id] * count
        lengths.append(count)
    input_ids = torch.tensor([ids], dtype=torch.long)
    return PackedRow(
        input_ids=input_ids,
        position_ids=_with_batch(torch.cat(positions, dim=1)),
        samples=Segments.of(lengths),
        predicting=torch.tensor(predicting, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        visual_spans=spans,
        image_places=(input_ids[0] == visual.image_token_id).nonzero().flatten(),
        pictures=visual.tensors(images),
        grids=grids,
        frames=Segments.of([rows * columns for t, rows, columns in grids for _ in range(t)]),
        record_indexes=[int(sample["record_index"]) for sample in samples],
    )


def _with_batch(positions: Tensor) -> Tensor:
    """Positions of a batch of one row: (3, 1, L) from (3, L), or (1, L) as they are."""
    return positions if len(positions) == 1 else positions[:, None]


def _visual_spans(
    tokens: Sequence[int], start: int, grids: Sequence[Grid], visual: VisualInputs
) -> list[tuple[int, int]]:
    """Where each picture's image tokens stand; pictures follow one another in the sequence."""
    places = [i for i, token in enumerate(tokens) if token == visual.image_token_id]
    spans = []
    first = 0
    for grid in grids:
        count = visual.tokens(grid)
        place = places[first : first + count]
        assert len(place) == count and place[-1] - place[0] == count - 1, (
            "the image tokens of one picture stand together"
        )
        spans.append((start + place[0], count))
        first += count
    assert first == len(places), "every image token belongs to a picture"
    return spans
