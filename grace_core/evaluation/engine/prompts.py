"""From a question to the tokens that are put to a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grace_core.evaluation.items import Picture, Question
from grace_core.models.prompts import chat_ids, with_picture_tokens
from grace_core.models.visual_inputs import Grid, VisualInputs


@dataclass(frozen=True)
class Prompt:
    """One question as the model reads it."""

    question: Question
    input_ids: list[int]
    """The chat up to where the answer begins; one image token for each of a picture's."""

    starts: list[int]
    """Place of each picture's first image token."""

    grids: list[Grid]
    """Of each picture, in patches."""

    def __len__(self) -> int:
        return len(self.input_ids)


class PromptEncoder:
    """Makes prompts for one checkpoint."""

    def __init__(self, tokenizer: Any, visual: VisualInputs) -> None:
        """tokenizer: with a chat template."""
        self._tokenizer = tokenizer
        self._visual = visual
        self._grids: dict[str, Grid] = {}  # of each picture by its key

    def encode(self, question: Question) -> Prompt:
        """The question as one turn of the user, its text and pictures in order.

        Raises GraceError for a text that holds the picture's placeholder itself, and whatever a
        picture that cannot be read raises.
        """
        for picture in question.pictures:
            self.measure(picture)
        grids = [self._grids[picture.key] for picture in question.pictures]
        ids, starts = with_picture_tokens(
            chat_tokens(question, self._tokenizer),
            [self._visual.tokens(grid) for grid in grids],
            self._visual.image_token_id,
        )
        return Prompt(question, ids, starts, grids)

    def positions(self, prompt: Prompt) -> Tensor:
        """Rotary positions (3, L) or (1, L), int64; an answer goes on after the largest."""
        return self._visual.positions(len(prompt), prompt.starts, prompt.grids)

    def measure(self, picture: Picture) -> None:
        """Find out a picture's grid; threads may do that beforehand. Raises as `encode` does."""
        if picture.key not in self._grids:
            self._grids[picture.key] = self._visual.grid_of_size(*picture.size())


def messages(question: Question) -> list[dict[str, Any]]:
    """The question as one turn of the user."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in question.content
    ]
    return [{"role": "user", "content": content}]


def chat_tokens(question: Question, tokenizer: Any) -> list[int]:
    """Token ids up to where the answer begins, with one placeholder for each picture."""
    return chat_ids(messages(question), tokenizer)


def distinct(pictures: Iterable[Picture]) -> list[Picture]:
    """Each picture once, in the order of first appearance."""
    return list({picture.key: picture for picture in reversed(list(pictures))}.values())[::-1]
