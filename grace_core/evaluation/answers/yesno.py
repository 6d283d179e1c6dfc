"""Yes or no: the rule of VLMEvalKit's `YOrN_Extraction` (commit e8e78f05)."""

from __future__ import annotations

import re
from typing import Literal

YesNo = Literal["Yes", "No", "Unknown"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_PERIODS_REMOVED = 32
"""A flag was passed there as the count: from the 33rd on, periods stay part of their words."""

_DIGIT_COMMA = re.compile(r"\d,\d")


def extract_yes_no(response: str) -> YesNo:
    """Say Yes or No when exactly one of the two stands in `response` as a word, else "Unknown".

    "*", ":" and "'" are no punctuation there: "**Yes**" and "Answer:Yes" hold no such word.
    """
    words = set(_without_punctuation(response.lower()).split())
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def _without_punctuation(text: str) -> str:
    """The VQA evaluation's rule: a mark next to a space vanishes, any other becomes a space."""
    always_drop = _DIGIT_COMMA.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        drop = always_drop or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if drop else " ")
    return _PERIOD.sub("", cleaned, count=_PERIODS_REMOVED)
