"""Conversations and benchmark items as rows of token ids for pretraining and scoring.

The same tokens that the chat template gives, put together piece by piece (pieces recur, so their
encodings are cached): `tests/test_toy_tokenizer.py` compares the two.
"""

from collections.abc import Sequence
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
    """Ids of a piece of rendered chat (special tokens are recognised)."""
    return tuple(shared_tokenizer()(text).input_ids)


def encode_conversation(
    turns: Sequence[Turn], *, newline_after_picture: bool, max_length: int
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation about one picture, and which of them are the assistant's.

    Turns that no longer fit `max_length` are dropped, the first must fit. The assistant's text and
    its end-of-turn token are supervised. A line break between picture and text, as ShareGPT4V's
    "<image>\\n" leaves it, is optional.
    """
    header = encode(f"{IM_START}assistant\n")
    ids: list[int] = []
    supervised: list[bool] = []
    for index, turn in enumerate(turns):
        opening = encode(f"{IM_START}user\n")
        if index == 0:
            opening = picture_prefix() + encode(VISION_END)
        line_break = "\n" if index == 0 and newline_after_picture else ""
        asked = (*opening, *encode(f"{line_break}{turn.prompt}{IM_END}\n"), *header)
        reply = encode(f"{IM_START}assistant\n{turn.answer}{IM_END}")[len(header) :]
        if index and len(ids) + len(asked) + len(reply) + 1 > max_length:
            break
        ids += [*asked, *reply, *encode("\n")]
        supervised += [False] * len(asked) + [True] * len(reply) + [False]
    assert len(ids) <= max_length
    return ids, supervised
