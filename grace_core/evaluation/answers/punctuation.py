"""The VQA evaluation's rule for punctuation, which VLMEvalKit took over.

Source: GT-Vision-Lab/VQA, `PythonEvaluationTools/vqaEvaluation/vqaEval.py`.
"""

from __future__ import annotations

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")

PERIODS_REMOVED = 32
"""A flag was passed there as the count: from the 33rd on, periods stay part of their words."""


def drop_marks(text: str) -> str:
    """A mark next to a space vanishes wherever it stands, any other becomes a space.

    In a text with a comma between digits all marks vanish. Periods are left as they are.
    """
    always_drop = _DIGIT_COMMA.search(text) is not None
    cleaned = text
    for mark in _MARKS:
        drop = always_drop or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if drop else " ")
    return cleaned
