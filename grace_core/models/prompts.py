"""What all ways of asking a model share: a chat's tokens, its pictures' places, ends of turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grace_core.errors import GraceError


def chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    """A chat up to where the answer begins, with one placeholder for each picture.

    Args:
        messages: a role and a list of parts each, `{"type": "text", "text": ...}` or
            `{"type": "image"}`.
    """
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    return text


def chat_ids(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """Token ids of `chat_text`."""
    text = chat_text(messages, tokenizer)
    begins_itself = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not begins_itself)["input_ids"]
    return ids


def with_picture_tokens(
    ids: Sequence[int], counts: Sequence[int], placeholder: int
) -> tuple[list[int], list[int]]:
    """Repeat the placeholder of each picture for each of its tokens.

    Args:
        counts: image tokens of each picture, in order.

    Returns:
        The ids, and the place of each picture's first token.

    Raises:
        GraceError: a text holds the placeholder itself.
    """
    places = [place for place, token in enumerate(ids) if token == placeholder]
    if len(places) != len(counts):
        raise GraceError(
            f"the prompt holds {len(places)} picture placeholders for {len(counts)} pictures; "
            "remove the placeholder from the text"
        )
    expanded: list[int] = []
    starts: list[int] = []
    before = 0
    for place, count in zip(places, counts, strict=True):
        expanded += ids[before:place]
        starts.append(len(expanded))
        expanded += [placeholder] * count
        before = place + 1
    return [*expanded, *ids[before:]], starts


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a turn: those of the checkpoint's generation settings and the tokenizer's.

    Raises GraceError when there is none.
    """
    named = model.generation_config.eos_token_id
    found = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    found.discard(None)
    if not found:
        raise GraceError(
            "neither the tokenizer nor generation_config.json names an end-of-turn token; set "
            "eos_token in tokenizer_config.json"
        )
    return frozenset(found)
