"""Benchmark questions with random pictures and words, as many and as long as the shapes say."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

from PIL import Image

from grace_core.bench.shapes import Shapes
from grace_core.evaluation.items import Kind, Picture, Question


@dataclass(frozen=True)
class Workload:
    """One kind of benchmark."""

    name: str
    title: str
    kind: Kind
    answer_tokens: int
    """Of every answer: random models hardly ever end a turn of their own."""

    a_picture: int
    """Questions that share a picture."""


WORKLOADS = (
    Workload("letters", "a picture each, 8 tokens", "mcq", 8, 1),
    Workload("rotations", "four a picture, 8 tokens", "mcq", 8, 4),
    Workload("sentences", "a picture each, 128 tokens", "open", 128, 1),
)
"""As MMStar and MMBench ask for letters, the published scripts allowing 8 tokens; and open answers,
for which they allow 128."""


def random_questions(
    workload: Workload, shapes: Shapes, count: int, *, seed: int = 0
) -> list[Question]:
    """The same ones for the same seed."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        if number % workload.a_picture == 0:
            picture = _picture(shapes.picture_side, draw)
        # A letter of the bench's byte-level tokenizer is a token of its own.
        length = draw.randint(shapes.prompt_tokens // 2, shapes.prompt_tokens)
        words = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(length))
        made.append(Question(str(number), workload.kind, (picture, words)))
    return made


def _picture(side: int, draw: random.Random) -> Picture:
    """A JPEG as large and as smooth as a photograph, which decides how long it takes to read."""
    coarse = Image.frombytes("RGB", (16, 16), draw.randbytes(3 * 16 * 16))
    content = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return Picture(content.getvalue())
