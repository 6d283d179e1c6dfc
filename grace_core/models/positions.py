"""Rotary positions of a sample, worked out on the host before its row goes to the device.

The library's `get_rope_index` asks the device for every token's type, once for each sample and
model; the positions depend on nothing but the tokens' places and the pictures' grids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multimodal_positions(
    length: int, pictures: Sequence[tuple[int, tuple[int, int, int]]]
) -> Tensor:
    """M-RoPE positions of one sample (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text counts on in all three axes alike. A picture's tokens are numbered by their place in time,
    height and width, from the position that it begins at; text goes on after its longer side.

    Args:
        length: tokens of the sample.
        pictures: place of the first token of each, and its grid of tokens (frames, rows, columns).

    Returns:
        (3, length) int64.
    """
    parts: list[Tensor] = []
    place = position = 0
    for start, (frames, rows, columns) in pictures:
        parts.append(_text(position, start - place))
        position += start - place
        axes = torch.meshgrid(
            torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij"
        )
        parts.append(torch.stack(axes).reshape(3, -1) + position)
        place = start + frames * rows * columns
        position += max(rows, columns)
    parts.append(_text(position, length - place))
    return torch.cat(parts, dim=1)


def plain_positions(length: int) -> Tensor:
    """(1, length) int64: 0, 1, 2, ..."""
    return torch.arange(length)[None]


def _text(position: int, length: int) -> Tensor:
    return (torch.arange(length) + position).expand(3, -1)
