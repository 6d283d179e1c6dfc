"""How questions are worded: the styles of LLaVA, Qwen3-VL, VLMEvalKit and the GRACE scripts.

One sentence of the instruction moves scores by points, so a result is only comparable with another
of the same style. A benchmark names its parts (question, options, hint) and what its authors or
LLaVA word in a way of their own; the style puts them together.

Sources: LLaVA's `docs/Evaluation.md` and lmms-eval 0.7.3's tasks; VLMEvalKit's
`vlmeval/vlm/qwen3_vl/prompt.py` and `vlmeval/dataset/image_mcq.py`; the folder `evaluation` of the
GRACE repository.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grace_core.evaluation.items import Picture

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."

_PLACE = re.compile(r"<image (\d+)>")


@dataclass(frozen=True)
class PromptStyle:
    """The wording that a framework puts around question and options."""

    name: str
    question: str = "{}"
    """Around a question that has options, or that is open where `plain` is False."""

    hint: str | None = None
    """Around a hint; None: as the benchmark has it."""

    options: str = ""
    """The line before the options."""

    option: str = "{letter}. {text}"
    letter: str | None = None
    """Instruction below options; None: LETTER, set apart as the benchmark has it."""

    letter_inline: str | None = None
    """Instruction below a question that has its options in its text; None: the benchmark's."""

    yes_no: str = ""
    """What follows a question that is answered by yes or no."""

    short: str | None = None
    """What follows an open question; None: the benchmark's."""

    pictures_first: bool = False
    """Pictures before all text, whatever place the question gives them."""


LLAVA = PromptStyle("llava")
QWEN3_VL = PromptStyle(
    "qwen3-vl",
    question="Question: {}",
    hint="Hint: {}",
    options="Options:\n",
    letter="\nAnswer with the option letter only.",
    letter_inline="\nAnswer with the option letter only.",
    yes_no=" Please answer yes or no.",
    short="\nPlease answer concisely with short words or phrases when possible.",
    pictures_first=True,
)
VLMEVALKIT = PromptStyle(
    "vlmevalkit",
    question="Question: {}",
    hint="Hint: {}",
    options="Options:\n",
    letter="\nPlease select the correct answer from the options above. \n",
    letter_inline="\nPlease select the correct answer from the options above. \n",
    yes_no=" Please answer yes or no.",
    short="",
)
GRACE = PromptStyle(
    "grace",
    question="Question: {}",
    hint="Context: {}",
    options="Options:\n",
    option="({letter}) {text}",
    letter="\nAnswer with only the option letter.",
    letter_inline="\n\nAnswer with only the option letter (A, B, C, or D).",
    yes_no="\nAnswer with only 'Yes' or 'No'.",
    short="\nAnswer with a short phrase or number only.",
    pictures_first=True,
)

STYLES = {style.name: style for style in (LLAVA, QWEN3_VL, VLMEVALKIT, GRACE)}
"""By the name that configurations use."""


def choice_prompt(
    style: PromptStyle,
    question: str,
    choices: Mapping[str, str],
    *,
    hint: str | None = None,
    own_hint: str = "{}",
    own_gap: str = "\n",
) -> str:
    """A question with options, answered by a letter.

    Args:
        choices: letter -> text, in order.
        hint: None or "" for none.
        own_hint, own_gap: how LLaVA words the benchmark's hint, and what stands before LETTER.
    """
    lines = [(style.hint or own_hint).format(hint)] if hint else []
    lines.append(style.question.format(question))
    options = [style.option.format(letter=key, text=text) for key, text in choices.items()]
    lines.append(style.options + "\n".join(options))
    return "\n".join(lines) + (own_gap + LETTER if style.letter is None else style.letter)


def inline_choice_prompt(style: PromptStyle, question: str, *, own: str = "\n" + LETTER) -> str:
    """A question whose text holds its options already; `own` is LLaVA's instruction."""
    return question + (own if style.letter_inline is None else style.letter_inline)


def yes_no_prompt(style: PromptStyle, question: str, *, own: str = "") -> str:
    """A question to be answered by yes or no; `own` is LLaVA's instruction, such as SHORT."""
    return question + (own if style is LLAVA else style.yes_no)


def short_prompt(style: PromptStyle, question: str, *, own: str = "\n" + SHORT) -> str:
    """A question to be answered in a word or a few; `own` is LLaVA's instruction."""
    return question + (own if style.short is None else style.short)


def interleaved(
    style: PromptStyle, text: str, pictures: Sequence[Picture | None]
) -> tuple[str | Picture, ...]:
    """The text with pictures where it says `<image 1>`, `<image 2>`, ...; those that it does not
    mention come first.

    With `pictures_first` all come first, and the text keeps its marks, which tell them apart.

    Raises ValueError where the text names a picture that the row does not have.
    """
    mentioned = {int(number) for number in _PLACE.findall(text)}
    there = {number: each for number, each in enumerate(pictures, start=1) if each is not None}
    absent = sorted(mentioned - there.keys())
    if absent:
        raise ValueError(f"the text names <image {absent[0]}>, but the row has no such picture")
    if style.pictures_first:
        return (*there.values(), text)
    parts: list[str | Picture] = [each for number, each in there.items() if number not in mentioned]
    for place, piece in enumerate(_PLACE.split(text)):
        if place % 2:
            parts.append(there[int(piece)])
        elif piece:
            parts.append(piece)
    return tuple(parts)
