"""Yes or no: the rule of VLMEvalKit's `YOrN_Extraction` (commit e8e78f05)."""

from __future__ import annotations

import re
from typing import Literal

from grace_core.evaluation.answers.punctuation import PERIODS_REMOVED, drop_marks

YesNo = Literal["Yes", "No", "Unknown"]

_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")


def extract_yes_no(response: str) -> YesNo:
    """Say Yes or No when exactly one of the two stands in `response` as a word, else "Unknown".

    "*", ":" and "'" are no punctuation there: "**Yes**" and "Answer:Yes" hold no such word.
    """
    spaced = drop_marks(response.lower())
    words = set(_PERIOD.sub("", spaced, count=PERIODS_REMOVED).split())
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"
