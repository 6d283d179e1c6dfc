"""Prompts as the decoder reads them: token ids with pictures in their places, packed into a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from PIL import Image

from grace_core.models.rows import PackedRow
from grace_core.models.segments import Segments
from grace_core.models.visual_inputs import Grid, VisualInputs


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    input_ids: list[int]
    """With one image token for each visual token of each picture."""

    pictures: tuple[Image.Image, ...] = ()
    """In the order of their tokens."""


def expanded(
    input_ids: Sequence[int], pictures: Sequence[Image.Image], visual: VisualInputs
) -> Prompt:
    """A prompt from ids with one image token a picture, as a chat template writes them.

    Args:
        pictures: as many as there are image tokens.
    """
    assert input_ids.count(visual.image_token_id) == len(pictures)
    counts = iter([visual.grid_and_tokens(picture)[1] for picture in pictures])
    ids: list[int] = []
    for token in input_ids:
        ids += [token] * (next(counts) if token == visual.image_token_id else 1)
    return Prompt(ids, tuple(pictures))


def prompt_row(prompts: Sequence[Prompt], visual: VisualInputs) -> PackedRow:
    """Prompts packed one after the other, on the CPU; each one's last token predicts."""
    lengths = [len(prompt.input_ids) for prompt in prompts]
    ids = torch.tensor([token for prompt in prompts for token in prompt.input_ids])
    grids = [[visual.grid(picture) for picture in prompt.pictures] for prompt in prompts]
    positions = torch.cat(
        [
            visual.positions(len(prompt.input_ids), _starts(prompt, of_it, visual), of_it)
            for prompt, of_it in zip(prompts, grids, strict=True)
        ],
        dim=1,
    )
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    flat = [grid for of_it in grids for grid in of_it]
    frames = [rows * columns for count, rows, columns in flat for _ in range(count)]
    return PackedRow(
        input_ids=ids[None],
        position_ids=positions if len(positions) == 1 else positions[:, None],
        samples=Segments.of(lengths),
        predicting=torch.tensor(list(accumulate(lengths))) - 1,
        labels=ids.new_empty(0),
        visual_spans=[],
        image_places=(ids == visual.image_token_id).nonzero().flatten(),
        pictures=visual.tensors(pictures) if pictures else {},
        grids=flat,
        frames=Segments.of(frames or [0]),
        record_indexes=[],
    )


def _starts(prompt: Prompt, grids: Sequence[Grid], visual: VisualInputs) -> list[int]:
    """Where each picture's tokens begin; they stand together, pictures one after the other."""
    places = [i for i, token in enumerate(prompt.input_ids) if token == visual.image_token_id]
    counts = [visual.tokens(grid) for grid in grids]
    assert sum(counts) == len(places), "every image token belongs to a picture"
    return [places[first] for first in accumulate(counts, initial=0) if first < len(places)]
