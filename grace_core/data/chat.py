"""Conversations as token ids, with the supervised tokens marked, by the checkpoint's chat template.

What is supervised is read off the template and never from token ids written down here. With
`render` the template's output as a string, an answer's supervised span

- begins where `render(turns before the answer, add_generation_prompt=True)` ends, which is where
  the model takes over when it generates;
- ends behind the first control token that the template writes after the answer's text within that
  turn (`<|im_end|>`, `</s>`, `<|eot_id|>`); what follows it, such as a line break, is not
  supervised. A template that writes none (LLaVA-1.5's as published: `ASSISTANT: text `) would teach
  the model never to stop, so the tokenizer's `eos_token` is put right behind the answer's text.

The template's part is found by rendering stand-ins in place of the texts, so it cannot depend on
what a record says. The texts are then set in, and the result is compared with the template's
rendering of the real conversation: a template that treats a text specially (some cut `</think>`
sections) sends the record to quarantine rather than train on what is never seen in use.

The whole string is encoded at once and spans are mapped by character offsets, so tokens are those
of ordinary use. A token that reaches over the beginning of a span (an answer that opens with a
line break may merge with the template's) holds answer text and is supervised.

Control tokens are the tokenizer's special tokens, further added tokens that the template names, and
the image token. They come from the template only: a text that contains one, typed out, would encode
to it, so such a record goes to quarantine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_core.data.sharegpt4v import IMAGE_TAG, Reason, Turn, UnusableRecord
from grace_core.errors import GraceError

Segments = tuple[str, ...]
"""A turn cut at its pictures: texts, with `IMAGE_TAG` itself for each picture."""

# The stand-in of a text: its number between private-use characters, between em spaces. A template
# that trims texts takes the em spaces away, which tells us to trim the real text.
_STAND_IN = "\u2003\ue000{}\ue001\u2003"
_FOUND_STAND_IN = re.compile("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)")
_TAG_WITH_LINE_BREAKS = re.compile(rf"(?:\r?\n)?{re.escape(IMAGE_TAG)}(?:\r?\n)?")


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as a model reads it; both lists have one entry a token."""

    input_ids: list[int]
    """Image placeholders are expanded to one image token per merged visual token."""
    labels_mask: list[bool]
    """True for supervised tokens: the answers and what ends each of them."""


@dataclass(frozen=True)
class _Slot:
    """Where a text is set into the template's part."""

    trim_left: bool
    trim_right: bool


@dataclass(frozen=True)
class _Opening:
    """Here the supervised span of an answer begins."""


@dataclass(frozen=True)
class _Closing:
    """Here the supervised span of an answer ends; `inserted` is no part of the template."""

    inserted: str


_Piece = str | _Slot | _Opening | _Closing


class ConversationEncoder:
    """Encodes conversations for one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        """Check that the template can be trained on.

        Args:
            tokenizer: a fast tokenizer with a chat template that takes lists of text and image
                parts as message content.
            image_token_id: the token that stands for pictures, from the model's configuration.

        Raises:
            GraceError: the template does not fit; before any record is looked at.
        """
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        if not tokenizer.is_fast:
            raise GraceError(
                f"{self._name} is no fast tokenizer, so its tokens cannot be traced to characters; "
                "convert the checkpoint's tokenizer to tokenizer.json"
            )
        if not tokenizer.chat_template:
            raise GraceError(
                f"{self._name} has no chat template, which decides what is supervised; use an "
                "instruction-tuned checkpoint or add its chat_template.jinja"
            )
        template = tokenizer.get_chat_template()
        self._control_ids = {image_token_id} | {
            token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in template and not token.content.isspace())
        }
        self._frames: dict[tuple[Segments, ...], tuple[_Piece, ...]] = {}
        self.encode([Turn("user", f"{IMAGE_TAG}\nWhat is it?"), Turn("assistant", "This.")], [1])

    def encode(
        self, turns: Sequence[Turn], image_token_counts: Sequence[int]
    ) -> EncodedConversation:
        """Encode a conversation.

        One line break on either side of an `<image>` tag belongs to the tag, as ShareGPT4V writes
        it, and is dropped with it; all other text is kept.

        Args:
            turns: alternating, the user's first, the assistant's last.
            image_token_counts: merged visual tokens of each picture, in the order of the tags.

        Raises:
            UnusableRecord: CONTROL_TOKEN or TEMPLATE_CHANGES_TEXT.
            GraceError: the template cannot render such a conversation for training at all.
        """
        segments = [_cut_at_pictures(turn) for turn in turns]
        assert sum(part.count(IMAGE_TAG) for part in segments) == len(image_token_counts)
        chat = _Chat([turn.role for turn in turns], segments)
        text, texts, answers = self._compose(chat)

        begins_itself = self._tokenizer.bos_token and text.startswith(self._tokenizer.bos_token)
        encoded = self._tokenizer(
            text,
            add_special_tokens=not begins_itself,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        typed = np.isin(ids, list(self._control_ids)) & _within(offsets, texts)
        if typed.any():
            token = self._tokenizer.convert_ids_to_tokens(int(ids[typed][0]))
            raise UnusableRecord(Reason.CONTROL_TOKEN, f"a text contains {token!r}")
        return self._expand(ids, _within(offsets, answers), image_token_counts)

    def _expand(
        self, ids: np.ndarray, supervised: np.ndarray, image_token_counts: Sequence[int]
    ) -> EncodedConversation:
        is_image = ids == self._image_token_id
        if is_image.sum() != len(image_token_counts):
            image_token = self._tokenizer.convert_ids_to_tokens(self._image_token_id)
            raise GraceError(
                f"the chat template of {self._name} writes {int(is_image.sum())} image tokens "
                f"({image_token!r}) for {len(image_token_counts)} pictures; image_token_id of the "
                "model's configuration and the template must belong together"
            )
        assert not (is_image & supervised).any(), "pictures stand in user turns"
        repeats = np.ones_like(ids)
        repeats[is_image] = image_token_counts
        return EncodedConversation(
            np.repeat(ids, repeats).tolist(), np.repeat(supervised, repeats).tolist()
        )

    def _compose(self, chat: _Chat) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """The string to encode; the character spans of texts, and of what is supervised."""
        pieces = self._frame(chat)
        contents = iter(chat.texts())
        text = ""
        as_rendered = ""
        texts: list[tuple[int, int]] = []
        answers: list[tuple[int, int]] = []
        begin = 0
        for piece in pieces:
            addition = ""
            match piece:
                case str():
                    addition = piece
                case _Slot():
                    addition = next(contents)
                    addition = addition.lstrip() if piece.trim_left else addition
                    addition = addition.rstrip() if piece.trim_right else addition
                    texts.append((len(text), len(text) + len(addition)))
                case _Opening():
                    begin = len(text)
                case _Closing():
                    text += piece.inserted
                    answers.append((begin, len(text)))
            text += addition
            as_rendered += addition
        try:
            rendered = self._render(chat.messages(chat.texts()))
        except Exception as error:
            # A template is a program and may raise anything; that it renders stand-ins in the same
            # places is known, so here the texts are the cause.
            raise UnusableRecord(Reason.TEMPLATE_CHANGES_TEXT, f"refused: {error}") from error
        if rendered != as_rendered:
            at = len(_common_prefix(rendered, as_rendered))
            raise UnusableRecord(
                Reason.TEMPLATE_CHANGES_TEXT, f"near {as_rendered[max(0, at - 20) : at + 20]!r}"
            )
        return text, texts, answers

    def _frame(self, chat: _Chat) -> tuple[_Piece, ...]:
        """The template's part for a conversation of this shape, kept for the next such one."""
        shape = chat.shape()
        if shape not in self._frames:
            self._frames[shape] = tuple(self._build_frame(chat))
        return self._frames[shape]

    def _build_frame(self, chat: _Chat) -> list[_Piece]:
        messages = chat.messages([_STAND_IN.format(i) for i in range(len(chat.texts()))])
        whole = self._render_stand_ins(messages)
        found = list(_FOUND_STAND_IN.finditer(whole))
        if [int(match[2]) for match in found] != list(range(len(chat.texts()))):
            raise GraceError(
                f"the chat template of {self._name} does not write every text once and in order; "
                "it must accept lists of {'type': 'text'} and {'type': 'image'} parts"
            )
        turn_of_text = chat.turn_of_text()
        pieces: list[_Piece] = []
        at = 0
        for number, match in enumerate(found):
            turn = turn_of_text[number]
            slot = _Slot(trim_left=not match[1], trim_right=not match[3])
            if chat.roles[turn] == "user":
                pieces += [whole[at : match.start()], slot]
                at = match.end()
                continue
            prompt = self._render_stand_ins(messages[:turn], add_generation_prompt=True)
            if not whole.startswith(prompt) or not at <= len(prompt) <= match.start():
                raise GraceError(
                    f"the chat template of {self._name} is not fit for training: the generation "
                    f"prompt of turn {turn} is not how the finished conversation goes on. The "
                    f"prompt ends {_FOUND_STAND_IN.sub('...', prompt)[-60:]!r}; use a template "
                    "without forced reasoning, such as the instruction-tuned checkpoint's"
                )
            pieces += [whole[at : len(prompt)], _Opening(), whole[len(prompt) : match.start()]]
            pieces.append(slot)
            # What follows in this turn: the beginning of the next one differs from how a
            # conversation that ends here goes on, and some templates close the last turn otherwise.
            following = found[number + 1].start() if number + 1 < len(found) else len(whole)
            until_here = self._render_stand_ins(messages[: turn + 1])
            if turn + 1 == len(messages):
                tail = whole[match.end() :]
            else:
                here = [m for m in _FOUND_STAND_IN.finditer(until_here) if int(m[2]) == number]
                ending = until_here[here[0].end() :] if here else ""
                tail = _common_prefix(whole[match.end() : following], ending)
            length = self._closing_length(tail)
            if length:
                pieces += [tail[:length], _Closing("")]
            else:
                pieces.append(_Closing(self._end_token()))
            at = match.end() + length
        pieces.append(whole[at:])
        return pieces

    def _closing_length(self, tail: str) -> int:
        """Characters up to and including the first control token; 0 where there is none."""
        encoded = self._tokenizer(tail, add_special_tokens=False, return_offsets_mapping=True)
        for token_id, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token_id in self._control_ids:
                return int(end)
        return 0

    def _end_token(self) -> str:
        token = self._tokenizer.eos_token
        if not token:
            raise GraceError(
                f"{self._name} has no eos_token and its chat template ends answers with no control "
                "token, so a model could not learn to stop; set eos_token in tokenizer_config.json"
            )
        return str(token)

    def _render_stand_ins(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        try:
            return self._render(messages, add_generation_prompt)
        except Exception as error:
            # A template is a program and may raise anything.
            raise GraceError(
                f"the chat template of {self._name} refuses a conversation of {len(messages)} "
                f"turns ({error}); it must accept lists of {{'type': 'text'}} and "
                "{'type': 'image'} parts"
            ) from error

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(rendered, str)
        return rendered

    @property
    def _name(self) -> str:
        return str(self._tokenizer.name_or_path or type(self._tokenizer).__name__)


@dataclass(frozen=True)
class _Chat:
    """A conversation cut into segments, as a template takes it."""

    roles: list[str]
    segments: list[Segments]

    def texts(self) -> list[str]:
        return [part for turn in self.segments for part in turn if part != IMAGE_TAG]

    def turn_of_text(self) -> list[int]:
        return [
            number
            for number, turn in enumerate(self.segments)
            for part in turn
            if part != IMAGE_TAG
        ]

    def shape(self) -> tuple[Segments, ...]:
        """Roles alternate, so where the pictures are says everything that is not text."""
        return tuple(
            tuple(part if part == IMAGE_TAG else "" for part in turn) for turn in self.segments
        )

    def messages(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Messages of the template, with these texts in place of the conversation's own."""
        remaining = iter(texts)
        return [
            {
                "role": role,
                "content": [
                    {"type": "image"}
                    if part == IMAGE_TAG
                    else {"type": "text", "text": next(remaining)}
                    for part in turn
                ],
            }
            for role, turn in zip(self.roles, self.segments, strict=True)
        ]


def _cut_at_pictures(turn: Turn) -> Segments:
    if turn.role == "assistant":
        return (turn.text,)
    segments: list[str] = []
    for number, part in enumerate(_TAG_WITH_LINE_BREAKS.split(turn.text)):
        segments += [IMAGE_TAG] if number else []
        segments += [part] if part else []
    return tuple(segments)


def _within(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """(T,) bool: tokens of which at least one character lies in one of the spans."""
    inside = np.zeros(len(offsets), dtype=bool)
    for begin, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
    return inside


def _common_prefix(one: str, other: str) -> str:
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:at]
    return min(one, other, key=len)
