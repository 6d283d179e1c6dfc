"""Features of pictures: what the vision tower says of each, once.

Questions share pictures (the rotations of an MMBench question, all questions about one diagram), so
features are kept by the picture's key, the least recently used ones leaving first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_core.evaluation.items import Picture
from grace_core.models.families import Family
from grace_core.models.forward import picture_features
from grace_core.models.segments import Segments
from grace_core.models.visual_inputs import Grid, VisualInputs

_PATCHES = {"cuda": 65_536, "cpu": 4096}
"""Patches of one pass of the vision tower, at most; a single picture may have more."""

# dims: V image tokens of a picture, d width of the decoder


@dataclass(frozen=True)
class Features:
    """Of one picture."""

    tokens: Tensor
    """(V, d): what takes the place of its image tokens."""

    deepstack: tuple[Tensor, ...]
    """(V, d) each: what Qwen3-VL adds after its first layers; empty for other families."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tokens, *self.deepstack))


@dataclass(frozen=True)
class Pixels:
    """One picture as the image processor makes it, still on the host."""

    key: str
    grid: Grid
    tensors: Mapping[str, Tensor]


def read_pixels(picture: Picture, visual: VisualInputs) -> Pixels:
    """Decode and process a picture; the work of a thread."""
    image = picture.open()
    return Pixels(picture.key, visual.grid(image), visual.tensors([image]))


class FeatureStore:
    """Features of one model by picture, at most `limit` bytes of them."""

    def __init__(self, model: Any, family: Family, visual: VisualInputs, limit: int) -> None:
        self._model = model
        self._family = family
        self._visual = visual
        self._limit = limit
        self._held: OrderedDict[str, Features] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def of(self, pictures: Sequence[Picture], ready: Mapping[str, Pixels]) -> dict[str, Features]:
        """Features of these pictures by key.

        ready: pixels that are processed already; of other pictures that are not held they are
        made here.
        """
        found = {p.key: self._held[p.key] for p in pictures if p.key in self._held}
        missing = {picture.key: picture for picture in pictures if picture.key not in found}
        pixels = [
            ready[key] if key in ready else read_pixels(picture, self._visual)
            for key, picture in missing.items()
        ]
        for part in _parts(pixels, _PATCHES[self._model.device.type]):
            found |= self._compute(part)
        for key, features in found.items():
            self._hold(key, features)
        return found

    def _compute(self, pixels: Sequence[Pixels]) -> dict[str, Features]:
        device = self._model.device
        names = pixels[0].tensors
        tensors = {name: torch.cat([one.tensors[name] for one in pixels]) for name in names}
        grids = [one.grid for one in pixels]
        frames = Segments.of([rows * columns for t, rows, columns in grids for _ in range(t)])
        moved = {  # the grids' numbers stay where they are read
            name: value if name == "image_grid_thw" else value.to(device, non_blocking=True)
            for name, value in tensors.items()
        }
        whole, deepstack = picture_features(
            self._model,
            self._family,
            moved,
            grids,
            frames.moved(lambda tensor: tensor.to(device, non_blocking=True)),
        )
        counts = [self._visual.tokens(grid) for grid in grids]
        layers = [layer.split(counts) for layer in deepstack]
        # Copies: a view would keep the whole pass's features while any of its pictures is held.
        return {
            one.key: Features(tokens.clone(), tuple(layer[at].clone() for layer in layers))
            for at, (one, tokens) in enumerate(zip(pixels, whole.split(counts), strict=True))
        }

    def _hold(self, key: str, features: Features) -> None:
        if key in self._held:
            self._held.move_to_end(key)
            return
        self._held[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._limit:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= oldest.nbytes


def _parts(pixels: Sequence[Pixels], patches: int) -> Iterator[list[Pixels]]:
    part: list[Pixels] = []
    size = 0
    for one in pixels:
        count = one.grid[0] * one.grid[1] * one.grid[2]
        if part and size + count > patches:
            yield part
            part, size = [], 0
        part.append(one)
        size += count
    if part:
        yield part
