"""MMMU's own parsers (repository MMMU-Benchmark/MMMU, commit bb0b95a9, `mmmu/utils/eval_utils.py`).

Where the authors' multiple-choice parser finds nothing it draws a letter at random; here that is a
response from which nothing can be read. The open parser is lenient by design: a gold text counts
wherever it stands within what is taken for the answer, so "no" is found in "I don't know".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_STRIPPED = ",.!?;:'"
_WORDS_THAT_MAY_NAME_AN_OPTION = 5
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
# The authors' patterns, which find the same when they neither start within a run of digits nor give
# digits back, and then take linear time on the digits that a derailed model repeats.
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d+)(?![,\d])")


def read_choice(response: str, choices: Mapping[str, str]) -> str:
    """The letter the authors' parser finds, or "" where it would draw one at random.

    Letters in parentheses, else letters between spaces, else, in more than five words, texts of
    options; of several the one whose last occurrence is latest. Case matters for letters only.

    choices: letter -> text of the option.
    """
    for mark in _STRIPPED:  # one after the other, as there: "B.'," loses its comma and quote only
        response = response.strip(mark)
    padded = f" {response} "
    for form in ("({})", " {} "):
        found = {letter: padded.rfind(form.format(letter)) for letter in choices}
        if any(place >= 0 for place in found.values()):
            return _latest(found)
    if len(padded.split()) <= _WORDS_THAT_MAY_NAME_AN_OPTION:
        return ""
    lowered = padded.lower()
    return _latest({letter: lowered.rfind(text.lower()) for letter, text in choices.items()})


def _latest(places: Mapping[str, int]) -> str:
    """The letter found last, the first of equals; "" where none was found."""
    best = max(places, key=lambda letter: places[letter], default="")
    return best if best and places[best] >= 0 else ""


def read_open(response: str) -> list[str | float]:
    """What a response may mean as an answer in its own words: texts, and numbers to 2 decimals.

    From each line the shortest tail after a word such as "is" or "answer" (in the last line also
    after "="), or else the whole response; and every number in these.
    """
    response = response.strip().strip(".").lower()
    parts = response.split("\n")
    tails = []
    for number, part in enumerate(parts, start=1):
        tail = _tail(part, (*_INDICATORS, "=") if number == len(parts) else _INDICATORS)
        if tail and tail not in _TRIVIAL:
            tails.append(tail)
    texts = tails or [response]
    numbers = [
        number
        for text in texts
        for pattern in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE)
        for number in pattern.findall(text)
    ]
    return list(dict.fromkeys(form for text in [*texts, *numbers] for form in _normalized(text)))


def open_is_right(said: Iterable[str | float], answers: Sequence[str]) -> bool:
    """Whether a gold text stands within a text of `said`, or a gold number equals one of it.

    said: from `read_open`; answers: any of them is right.
    """
    golds = [form for answer in answers for form in _normalized(answer)]
    texts = [gold for gold in golds if isinstance(gold, str)]
    numbers = [gold for gold in golds if not isinstance(gold, str)]
    return any(
        any(text in each for text in texts) if isinstance(each, str) else each in numbers
        for each in said
    )


def _tail(part: str, indicators: Sequence[str]) -> str:
    """The shortest text that follows the last occurrence of an indicator; "" without any.

    An indicator that ends the part leaves nothing, which any later one replaces.
    """
    shortest = ""
    for indicator in indicators:
        if indicator in part:
            tail = part.rpartition(indicator)[2].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def _normalized(text: str) -> list[str | float]:
    """A number rounded to 2 decimals, or lower-case text; a single character only beside a space,
    so that it is not found within words."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]
