"""From a question to the tokens that are put to a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grace_core.errors import GraceError
from grace_core.evaluation.items import Picture, Question
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
        ids = chat_tokens(question, self._tokenizer)
        placeholder = self._visual.image_token_id
        places = [place for place, token in enumerate(ids) if token == placeholder]
        pictures = question.pictures
        if len(places) != len(pictures):
            raise GraceError(
                f"the prompt of item {question.id} holds {len(places)} picture placeholders "
                f"instead of {len(pictures)}; remove the placeholder from the question's text"
            )
        for picture in pictures:
            self.measure(picture)
        grids = [self._grids[picture.key] for picture in pictures]
        expanded: list[int] = []
        starts: list[int] = []
        before = 0
        for place, grid in zip(places, grids, strict=True):
            expanded += ids[before:place]
            starts.append(len(expanded))
            expanded += [placeholder] * self._visual.tokens(grid)
            before = place + 1
        return Prompt(question, expanded + ids[before:], starts, grids)

    def positions(self, prompt: Prompt) -> Tensor:
        """Rotary positions (3, L) or (1, L), int64; an answer goes on after the largest."""
        return self._visual.positions(len(prompt), prompt.starts, prompt.grids)

    def measure(self, picture: Picture) -> None:
        """Find out a picture's grid; threads may do that beforehand. Raises as `encode` does."""
        if picture.key not in self._grids:
            self._grids[picture.key] = self._visual.grid_of_size(*picture.size())


def chat_text(question: Question, tokenizer: Any) -> str:
    """The chat as text, with one placeholder for each picture, up to where the answer begins."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in question.content
    ]
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def chat_tokens(question: Question, tokenizer: Any) -> list[int]:
    """Token ids of `chat_text`."""
    text = chat_text(question, tokenizer)
    begins_itself = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not begins_itself)["input_ids"]
    return ids


def distinct(pictures: Iterable[Picture]) -> list[Picture]:
    """Each picture once, in the order of first appearance."""
    return list({picture.key: picture for picture in reversed(list(pictures))}.values())[::-1]
