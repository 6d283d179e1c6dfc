"""Pictures of the toy world: coloured shapes, now and then with a short word, on a plain ground.

Each quarter of a picture holds at most one shape, and a word takes the upper or the lower half.
Everything is rasterised with NumPy alone, so the pixels depend on the seed and not on a drawing
library's version.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grace_core.toy.lettering import GLYPH_HEIGHT, SCALE, WORDS, word_mask

SIZE = 64
"""Edge of every picture in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (35, 160, 60),
    "blue": (45, 80, 220),
    "yellow": (235, 215, 50),
}
"""Colours of shapes."""

_INKS: dict[str, tuple[int, int, int]] = {"white": (245, 245, 245), "black": (18, 18, 18)}
"""Colours of words."""

PLACES = ("top left", "top right", "bottom left", "bottom right")
"""The four quarters, row by row."""

_Mask = NDArray[np.bool_]
_Grid = NDArray[np.floating[Any]]

# Membership of a pixel at offset (x, y) from the centre in a shape of "radius" r.
OUTLINES: dict[str, Callable[[_Grid, _Grid, float], _Mask]] = {
    "circle": lambda x, y, r: x**2 + y**2 <= r**2,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= 0.88 * r,
    "triangle": lambda x, y, r: (y <= 0.8 * r) & (y >= -r + 1.8 * abs(x)),
}
KINDS = tuple(OUTLINES)


@dataclass(frozen=True)
class Shape:
    """One shape: what it is, and where and how exactly it is drawn (pixels)."""

    kind: str
    colour: str
    large: bool
    place: int
    centre: tuple[float, float]
    radius: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Word:
    """A word in the upper (0) or lower (1) half; `corner` is its top left pixel (x, y)."""

    text: str
    row: int
    corner: tuple[int, int]
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture's content. `held_out` marks the benchmark's pictures, see `draw_scene`."""

    background: tuple[int, int, int]
    shapes: tuple[Shape, ...]
    word: Word | None
    held_out: bool

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(shape.name for shape in self.shapes)


def draw_scene(rng: random.Random, *, held_out: bool, with_word: bool | None = None) -> Scene:
    """Compose a scene of one to three shapes, with a word in two of five.

    Held-out and training pictures can never coincide: the red channel of the ground, which no shape
    covers in the corners, is even in the former and odd in the latter.
    """
    if with_word is None:
        with_word = rng.random() < 0.4
    red, green, blue = (rng.randrange(96, 160) for _ in range(3))
    background = (red & ~1 if held_out else red | 1, green, blue)
    word = _compose_word(rng) if with_word else None
    free = [place for place in range(4) if word is None or place // 2 != word.row]
    places = rng.sample(free, rng.choice((1, 2, 3) if word is None else (1, 2)))
    # Kinds and colours repeat often enough that counting is worth asking about.
    kinds = rng.sample(KINDS, 2)
    colours = rng.sample(sorted(COLOURS), 3)
    shapes = []
    for place in sorted(places):
        large = rng.random() < 0.5
        colour = rng.choice(colours)
        shapes.append(
            Shape(
                kind=rng.choice(kinds),
                colour=colour,
                large=large,
                place=place,
                centre=(_jittered_centre(rng, place % 2), _jittered_centre(rng, place // 2)),
                radius=rng.uniform(10.5, 12.5) if large else rng.uniform(5.0, 7.0),
                rgb=_jittered(rng, COLOURS[colour]),
            )
        )
    return Scene(background, tuple(shapes), word, held_out)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The scene's pixels: uint8 (64, 64, 3), RGB."""
    pixels = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    pixels[:] = scene.background
    for shape in scene.shapes:
        x = np.arange(SIZE)[None, :] + 0.5 - shape.centre[0]
        y = np.arange(SIZE)[:, None] + 0.5 - shape.centre[1]
        pixels[OUTLINES[shape.kind](x, y, shape.radius)] = shape.rgb
    if scene.word is not None:
        mask = word_mask(scene.word.text)
        left, top = scene.word.corner
        window = pixels[top : top + mask.shape[0], left : left + mask.shape[1]]
        window[mask] = scene.word.rgb
    return pixels


def _compose_word(rng: random.Random) -> Word:
    text = rng.choice(WORDS)
    row = rng.randrange(2)
    height, width = word_mask(text).shape
    assert height == GLYPH_HEIGHT * SCALE
    left = rng.randint(2, SIZE - 2 - width)
    top = row * SIZE // 2 + rng.randint(5, 13)
    return Word(text, row, (left, top), _jittered(rng, _INKS[rng.choice(("white", "black"))]))


def _jittered_centre(rng: random.Random, index: int) -> float:
    return (index + 0.5) * SIZE / 2 + rng.uniform(-2.5, 2.5)


def _jittered(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + rng.randint(-14, 14))) for c in rgb)
    return red, green, blue
