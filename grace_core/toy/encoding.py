"""Conversations and benchmark items as rows of token ids for pretraining and scoring.

The same tokens that the chat template gives, put together piece by piece (pieces recur, so their
encodings are cached): `tests/test_toy_tokenizer.py` compares the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from grace_core.toy.batched import VISUAL_TOKENS
from grace_core.toy.conversations import Turn
from grace_core.toy.tokenizer import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    VISION_END,
    VISION_START,
    shared_tokenizer,
)


@cache
def picture_prefix() -> tuple[int, ...]:
    """Ids of a user turn's opening with one picture."""
    return (*encode(f"{IM_START}user\n{VISION_START}"), *encode(IMAGE_PAD) * VISUAL_TOKENS)


@cache
def picture_start() -> int:
    """Column of the first image token in a row."""
    return len(picture_prefix()) - VISUAL_TOKENS


@cache
def encode(text: str) -> tuple[int, ...]:
    """Ids of a piece of rendered chat; special tokens are recognised."""
    return tuple(shared_tokenizer()(text).input_ids)


@dataclass
class Row:
    """Token ids with, for each, whether it is supervised and which segment it belongs to.

    Segment 0 is the opening with the picture, which everything may attend to. A conversation is one
    more segment; questions that must not see each other's answers are a segment each.
    """

    ids: list[int]
    supervised: list[bool]
    segments: list[int]

    def add(self, ids: Sequence[int], *, supervised: bool = False, segment: int = 1) -> None:
        self.ids += ids
        self.supervised += [supervised] * len(ids)
        self.segments += [segment] * len(ids)


def encode_conversation(
    turns: Sequence[Turn],
    *,
    newline_after_picture: bool,
    max_length: int,
    independent: bool = False,
) -> Row:
    """Encode a conversation about one picture.

    The assistant's text and its end-of-turn token are supervised. Turns that do not fit
    `max_length` are left out, the first must fit. A line break between picture and text, as
    ShareGPT4V's "<image>\\n" leaves it, is optional. With `independent`, each turn is encoded as
    the first one of a conversation of its own, all sharing the picture.
    """
    header = encode(f"{IM_START}assistant\n")
    row = Row([], [], [])
    row.add((*picture_prefix(), *encode(VISION_END)), segment=0)
    for index, turn in enumerate(turns):
        first = independent or index == 0
        opening = () if first else encode(f"{IM_START}user\n")
        line_break = "\n" if first and newline_after_picture else ""
        asked = (*opening, *encode(f"{line_break}{turn.prompt}{IM_END}\n"), *header)
        reply = encode(f"{IM_START}assistant\n{turn.answer}{IM_END}")[len(header) :]
        if index and len(row.ids) + len(asked) + len(reply) + 1 > max_length:
            continue
        segment = index + 1 if independent else 1
        row.add(asked, segment=segment)
        row.add(reply, supervised=True, segment=segment)
        row.add(encode("\n"), segment=segment)
    assert len(row.ids) <= max_length
    return row
