"""Prompts as the decoder reads them: token ids with pictures in their places, packed into a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from PIL import Image
from torch import Tensor

from grace_core.models.prompts import with_picture_tokens
from grace_core.models.rows import PackedRow
from grace_core.models.segments import Segments
from grace_core.models.visual_inputs import VisualInputs


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

    Raises:
        GraceError: there are more image tokens, or fewer.
    """
    counts = [visual.grid_and_tokens(picture)[1] for picture in pictures]
    ids, _ = with_picture_tokens(input_ids, counts, visual.image_token_id)
    return Prompt(ids, tuple(pictures))


def prompt_row(prompts: Sequence[Prompt], visual: VisualInputs) -> PackedRow:
    """Prompts packed one after the other, on the CPU; each one's last token predicts."""
    return _row(
        [prompt.input_ids for prompt in prompts],
        [_positions(prompt, visual) for prompt in prompts],
        [picture for prompt in prompts for picture in prompt.pictures],
        visual,
    )


def rest_of_prompt(prompt: Prompt, held: int, visual: VisualInputs) -> PackedRow:
    """A prompt without its first tokens, on the CPU, for where these are in the cache.

    Args:
        held: number of these, less than the prompt's; no picture lies on both sides.
    """
    ids = prompt.input_ids[held:]
    starts = picture_starts(prompt, visual)
    pictures = [one for one, start in zip(prompt.pictures, starts, strict=True) if start >= held]
    counts = [visual.grid_and_tokens(picture)[1] for picture in pictures]
    assert ids.count(visual.image_token_id) == sum(counts), "a picture is put in as a whole"
    positions = _positions(prompt, visual)[:, held:]
    return _row([ids], [positions], pictures, visual)


def _row(
    input_ids: Sequence[Sequence[int]],
    position_ids: Sequence[Tensor],
    pictures: Sequence[Image.Image],
    visual: VisualInputs,
) -> PackedRow:
    lengths = [len(ids) for ids in input_ids]
    ids = torch.tensor([token for ids in input_ids for token in ids])
    positions = torch.cat(list(position_ids), dim=1)
    grids = [visual.grid(picture) for picture in pictures]
    frames = [rows * columns for count, rows, columns in grids for _ in range(count)]
    return PackedRow(
        input_ids=ids[None],
        position_ids=positions if len(positions) == 1 else positions[:, None],
        samples=Segments.of(lengths),
        predicting=torch.tensor(list(accumulate(lengths))) - 1,
        labels=ids.new_empty(0),
        visual_spans=[],
        image_places=(ids == visual.image_token_id).nonzero().flatten(),
        pictures=visual.tensors(list(pictures)) if pictures else {},
        grids=grids,
        frames=Segments.of(frames or [0]),
        record_indexes=[],
    )


def picture_starts(prompt: Prompt, visual: VisualInputs) -> list[int]:
    """Where each picture's tokens begin; they stand together, pictures one after the other."""
    places = [i for i, token in enumerate(prompt.input_ids) if token == visual.image_token_id]
    counts = [visual.grid_and_tokens(picture)[1] for picture in prompt.pictures]
    assert sum(counts) == len(places), "every image token belongs to a picture"
    return [places[first] for first in accumulate(counts, initial=0) if first < len(places)]


def _positions(prompt: Prompt, visual: VisualInputs) -> Tensor:
    """Rotary positions, (3, L) or (1, L) int64."""
    grids = [visual.grid(picture) for picture in prompt.pictures]
    return visual.positions(len(prompt.input_ids), picture_starts(prompt, visual), grids)
