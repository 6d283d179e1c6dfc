"""A 5x7 bitmap alphabet, so that words look the same whatever fonts a machine has."""

import numpy as np
from numpy.typing import NDArray

WORDS = (
    *("CAT", "DOG", "SUN", "MAP", "BOX", "HAT", "CUP", "KEY"),
    *("BUS", "PEN", "FISH", "BOAT", "MOON", "LAMP", "TREE", "STAR"),
)

GLYPH_HEIGHT, GLYPH_WIDTH, SCALE = 7, 5, 2

# A glyph is its seven rows from top to bottom as 5-bit numbers, the most significant bit leftmost.
_GLYPHS: dict[str, tuple[int, ...]] = {
    "A": (0b01110, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "B": (0b11110, 0b10001, 0b10001, 0b11110, 0b10001, 0b10001, 0b11110),
    "C": (0b01110, 0b10001, 0b10000, 0b10000, 0b10000, 0b10001, 0b01110),
    "D": (0b11110, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b11110),
    "E": (0b11111, 0b10000, 0b10000, 0b11110, 0b10000, 0b10000, 0b11111),
    "F": (0b11111, 0b10000, 0b10000, 0b11110, 0b10000, 0b10000, 0b10000),
    "G": (0b01110, 0b10001, 0b10000, 0b10111, 0b10001, 0b10001, 0b01110),
    "H": (0b10001, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "I": (0b01110, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110),
    "K": (0b10001, 0b10010, 0b10100, 0b11000, 0b10100, 0b10010, 0b10001),
    "L": (0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b11111),
    "M": (0b10001, 0b11011, 0b10101, 0b10101, 0b10001, 0b10001, 0b10001),
    "N": (0b10001, 0b11001, 0b10101, 0b10101, 0b10011, 0b10001, 0b10001),
    "O": (0b01110, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b01110),
    "P": (0b11110, 0b10001, 0b10001, 0b11110, 0b10000, 0b10000, 0b10000),
    "R": (0b11110, 0b10001, 0b10001, 0b11110, 0b10100, 0b10010, 0b10001),
    "S": (0b01111, 0b10000, 0b10000, 0b01110, 0b00001, 0b00001, 0b11110),
    "T": (0b11111, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100),
    "U": (0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b01110),
    "X": (0b10001, 0b10001, 0b01010, 0b00100, 0b01010, 0b10001, 0b10001),
    "Y": (0b10001, 0b10001, 0b01010, 0b00100, 0b00100, 0b00100, 0b00100),
}


def word_mask(word: str) -> NDArray[np.bool_]:
    """The word as a mask, bool (14, 12 * letters - 2): glyphs doubled, two pixels apart.

    Raises:
        KeyError: a letter that no word of `WORDS` uses.
    """
    gap = np.zeros((GLYPH_HEIGHT, 1), dtype=bool)
    columns: list[NDArray[np.bool_]] = []
    for letter in word:
        rows = np.array(_GLYPHS[letter])[:, None]
        glyph = (rows >> np.arange(GLYPH_WIDTH - 1, -1, -1)) & 1
        columns += [glyph.astype(bool), gap]
    return np.hstack(columns[:-1]).repeat(SCALE, axis=0).repeat(SCALE, axis=1)
