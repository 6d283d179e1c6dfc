"""A conversation with a model: turns of text and pictures, answers token by token.

What the model has read stays in the cache: of a further turn, only what comes after the common
beginning is put in. Whatever a chat template does to earlier turns, the tokens are those of the
whole conversation as the template writes it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from grace_core.errors import GraceError
from grace_core.inference.decoder import Decoder
from grace_core.inference.decoding import Decoding
from grace_core.inference.prompts import (
    Prompt,
    expanded,
    picture_starts,
    prompt_row,
    rest_of_prompt,
)
from grace_core.inference.sampling import Sampler
from grace_core.inference.text_stream import TextStream
from grace_core.models.loading import CheckpointFolder, load_tokenizer
from grace_core.models.prompts import chat_ids, stop_ids
from grace_core.models.visual_inputs import VisualInputs

_LEAST_CAPACITY = 2048
"""Tokens of the first cache; a conversation that outgrows it gets one of twice the size."""


@dataclass
class Answer:
    """How the last answer came about."""

    read: int = 0
    """Tokens of the conversation that were put in, without those in the cache already."""

    read_seconds: float = 0.0
    tokens: int = 0
    """Of the answer, the one that ends the turn left out."""

    seconds: float = 0.0
    """From the first token to the last."""

    complete: bool = False
    """Whether the model ended its turn, rather than the limit or whoever reads."""

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None for an answer of one token."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds else None


class Chat:
    """One conversation at a time with one model."""

    def __init__(
        self,
        model: Any,
        checkpoint: CheckpointFolder,
        *,
        max_pixels: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            model: of `load_release(checkpoint.path, device)`.
            max_pixels: pictures of more are made smaller, where the family's pictures differ in
                size; by default the checkpoint's own limit.
            temperature: 0 takes the likeliest token; above, see `Sampler`.
            seed: of the sampling of the whole conversation.

        Raises:
            GraceError: the tokenizer has no chat template or no end of turn, or the model's
                decoder is not known here.
        """
        self._visual = VisualInputs(checkpoint, max_pixels=max_pixels)
        self._tokenizer = load_tokenizer(checkpoint.path)
        self._stop_ids = stop_ids(model, self._tokenizer)
        self._decoder = Decoder(model, checkpoint.family)
        self._most = int(model.config.get_text_config().max_position_embeddings)
        self._sampler = (
            Sampler(temperature, seed=seed, device=model.device) if temperature else None
        )
        self._decoding: Decoding | None = None
        self._messages: list[dict[str, Any]] = []
        self._pictures: list[Image.Image] = []
        self._held: list[int] = []  # tokens in the cache
        self._held_pictures: Sequence[Image.Image] = ()  # among them
        self.answer = Answer()
        """Of the last question."""

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages, self._pictures, self._held = [], [], []

    def picture_tokens(self, picture: Image.Image) -> int:
        """Tokens that a picture takes of the conversation."""
        return self._visual.grid_and_tokens(picture)[1]

    def ask(
        self, text: str, pictures: Sequence[Image.Image] = (), *, max_new_tokens: int = 512
    ) -> Generator[str, None, None]:
        """The answer to the user's next turn, piece by piece.

        A reader who has enough closes the iterator, or raises in the midst of it: the answer so far
        is then part of the conversation. A turn that fails before its answer's first token is not.

        Args:
            text: of the turn; comes after its pictures.
            pictures: RGB.
            max_new_tokens: of the answer, at most.

        Raises:
            GraceError: the conversation is too long for the model or the device's memory, or the
                text holds the picture's placeholder.
        """
        self.answer = Answer()
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        messages = [*self._messages, {"role": "user", "content": content}]
        shown = [*self._pictures, *pictures]
        prompt = expanded(chat_ids(messages, self._tokenizer), shown, self._visual)
        decoding = self._room(len(prompt.input_ids), max_new_tokens)
        self._read(prompt, decoding)
        stream = TextStream(self._tokenizer)
        ids: list[int] = []
        begun = time.perf_counter()
        try:
            while True:
                token = int(decoding.tokens[0])
                self.answer.seconds = time.perf_counter() - begun
                if token in self._stop_ids:
                    self.answer.complete = True
                    break
                ids.append(token)
                self.answer.tokens = len(ids)
                yield stream.push(token)
                if len(ids) == max_new_tokens:
                    break
                with _memory_told():
                    decoding.step()
                self._held.append(token)
            yield stream.rest()
        finally:
            if ids or self.answer.complete:
                said = self._tokenizer.decode(ids, skip_special_tokens=True)
                spoken = {"role": "assistant", "content": [{"type": "text", "text": said}]}
                self._messages, self._pictures = [*messages, spoken], shown

    def _room(self, prompt: int, budget: int) -> Decoding:
        """A cache for prompt and answer: the present one where it is large enough."""
        needed = prompt + budget
        if needed > self._most:
            raise GraceError(
                f"the conversation takes {prompt:,} tokens and an answer up to {budget:,}, but the "
                f"model reads at most {self._most:,}; start anew (/reset), limit the answer "
                "(--max-new-tokens) or the pictures (--max-pixels)"
            )
        if self._decoding is None or self._decoding.capacity < needed:
            capacity = _LEAST_CAPACITY
            while capacity < needed:
                capacity *= 2
            self._decoding, self._held = None, []  # freed before the larger one is made
            with _memory_told():
                self._decoding = Decoding(
                    self._decoder,
                    rows=1,
                    capacity=min(capacity, self._most),
                    sampler=self._sampler,
                )
        return self._decoding

    def _read(self, prompt: Prompt, decoding: Decoding) -> None:
        """Put the conversation in, as far as it is not in the cache already."""
        begun = time.perf_counter()
        held = self._common(prompt)
        self._held = []  # until all of it is there
        with _memory_told():
            if held:
                decoding.extend(rest_of_prompt(prompt, held, self._visual), 0, held)
            else:
                decoding.put(prompt_row([prompt], self._visual), [0])
            decoding.tokens.tolist()  # waits for the device
        self._held, self._held_pictures = list(prompt.input_ids), prompt.pictures
        self.answer = Answer(len(prompt.input_ids) - held, time.perf_counter() - begun)

    def _common(self, prompt: Prompt) -> int:
        """Tokens at the beginning that are in the cache, pictures whole, and never all of them."""
        ids = prompt.input_ids
        count = 0
        while count < min(len(ids) - 1, len(self._held)) and ids[count] == self._held[count]:
            count += 1
        starts = picture_starts(prompt, self._visual)
        for number, (picture, start) in enumerate(zip(prompt.pictures, starts, strict=True)):
            known = self._held_pictures[number : number + 1]
            # Pictures of one size have equal tokens.
            if not (known and known[0] is picture) or start + self.picture_tokens(picture) > count:
                return min(count, start)
        return count


@contextmanager
def _memory_told() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GraceError(
            f"the device's memory is used up ({str(error).splitlines()[0]}); start anew (/reset), "
            "use fewer or smaller pictures (--max-pixels), or another device (--device cpu)"
        ) from error
