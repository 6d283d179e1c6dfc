"""What is asked, what is right, and what was answered: one benchmark item's three sides."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image

Kind = Literal["mcq", "yesno", "open"]
"""How a question is to be answered: by a letter, by yes or no, or in a few words of one's own."""

MAX_DECODED_PIXELS = 100_000_000
"""A picture of more is an error of its item."""


@dataclass(frozen=True)
class FileSlice:
    """Bytes that lie within a larger file."""

    file: Path
    offset: int
    """Bytes before the first."""

    size: int
    """Bytes."""

    sha256: str
    """Of these bytes, in hexadecimal, so that they need not be read to be told apart."""

    def read(self) -> bytes:
        """Raises OSError where the file cannot be read, or ends before."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) != self.size:
            raise OSError(f"{self.file} ends within the {self.size} bytes from {self.offset}")
        return data


@dataclass(frozen=True)
class Picture:
    """An encoded picture that is read and decoded only when it is asked for."""

    source: bytes | Path | FileSlice = field(repr=False)
    """The encoded bytes, or where they lie."""

    @cached_property
    def key(self) -> str:
        """SHA-256 of the encoded bytes, in hexadecimal: equal pictures have equal keys.

        Raises OSError where the file cannot be read.
        """
        if isinstance(self.source, FileSlice):
            return self.source.sha256
        return hashlib.sha256(self.encoded()).hexdigest()

    def encoded(self) -> bytes:
        """The picture as it was found. Raises OSError where the file cannot be read."""
        if isinstance(self.source, bytes):
            return self.source
        return (
            self.source.read() if isinstance(self.source, FileSlice) else self.source.read_bytes()
        )

    def open(self) -> Image.Image:
        """Decode to upright RGB, as training does.

        Raises UnusableRecord for what is no picture, too large or too narrow, and OSError where
        the file cannot be read.
        """
        from grace_core.data.pictures import open_picture

        return open_picture(self.encoded(), MAX_DECODED_PIXELS)

    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture, without decoding it where its header tells.

        Raises as `open` does, except for damage that only decoding finds.
        """
        from grace_core.data.pictures import picture_size

        return picture_size(self.encoded(), MAX_DECODED_PIXELS)


@dataclass(frozen=True)
class Question:
    """What is put to the model: text and pictures, in order."""

    id: str
    kind: Kind
    content: tuple[str | Picture, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.content if isinstance(part, Picture))


@dataclass(frozen=True)
class Gold:
    """What is right, and what the metrics group by."""

    id: str
    kind: Kind
    choices: Mapping[str, str] | None
    """Upper-case letter -> option text, for `mcq` only. The text is "" where it is not known."""

    answers: tuple[str, ...]
    """Any of them is right: a letter, "Yes" or "No", or texts. Empty: the answer is not public."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """Columns that the metrics group by, such as category; nothing that the model is shown."""


@dataclass(frozen=True)
class Item:
    """A question and its gold, of one id."""

    question: Question
    gold: Gold

    @property
    def id(self) -> str:
        return self.gold.id


@dataclass(frozen=True)
class Prediction:
    """What came of one item: a response, or what is wrong with the item itself.

    It says the same however often the item is asked; what another try may mend is no prediction.
    """

    item_id: str
    response: str
    error: str | None = None
    tokens: int | None = None
    """Tokens of the response, where the engine counted them."""

    seconds: float | None = None
    """Time the item took, where the engine measured it."""
