"""How the benchmarks' own code reads a letter. Each returns "" where it reads none.

These rules are kept as they are, faults included, because published numbers were made with them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_letter(response: str, choices: Mapping[str, str]) -> str:
    """SEED-Bench as LLaVA scores it (commit c121f043): the response is the letter."""
    return response if response in choices else ""


_SCIENCEQA_LETTERS = "ABCDE"
_SCIENCEQA_ANSWER = re.compile(r"The answer is ([A-Z]).")


def scienceqa_letter(response: str) -> str:
    """ScienceQA as LLaVA scores it (commit c121f043, `eval_science_qa.py`).

    A bare letter; or "X. " at the start; or "The answer is X" followed by any one character,
    exactly once. The letter may be one that the question does not offer.
    """
    if response in tuple(_SCIENCEQA_LETTERS):
        return response
    if len(response) >= 3 and response[0] in _SCIENCEQA_LETTERS and response[1:3] == ". ":
        return response[0]
    found = _SCIENCEQA_ANSWER.findall(response)
    return found[0] if len(found) == 1 else ""


_AI2D_LABEL = re.compile(r"\s*([A-Z])\.")


def ai2d_letter(response: str) -> str:
    """AI2D as lmms-eval scores it (commit 75571cfe): exact match without case and punctuation.

    "X." at the start stands for the letter, else the whole response does, blanks included.
    """
    label = _AI2D_LABEL.match(response)
    said = (label[1] if label else response).lower().translate(_DROP_PUNCTUATION)
    return said.upper() if len(said) == 1 and said.isalpha() else ""


def mmstar_letter(response: str, choices: Mapping[str, str]) -> str:
    """MMStar's own rule (commit 88f243ab, `eval/vlmeval/evaluate/mmstar.py`), lower-cased.

    The first character; or the one after "(", "option " or "the answer is ". Words are not told
    from letters there: "An apple" says A.
    """
    said = response.lower().strip().replace("\n", " ")
    for start in ("(", "option ", "the answer is "):
        if said.startswith(start):
            said = said[len(start) :]
            break
    letter = said[:1].upper()
    return letter if letter in choices else ""


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILED = "Failed to obtain answer via API"
_MARKS_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_NONE = "Z"
"""What models are told to say there where no option fits."""

_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def mmbench_letter(response: str, choices: Mapping[str, str]) -> str:
    """MMBench as VLMEvalKit matches it without a judge (commit e8e78f05, `matching_util.py`).

    The one letter that stands as a word, if it does so first among the last four words; else the
    first "answer is X", whatever follows X; else the one option whose text the response contains,
    unless it is longer than twice all options.
    """
    if any(refusal in response for refusal in _REFUSALS):
        return ""
    words = response.translate(_MARKS_TO_SPACES).split()
    if _API_FAILED not in response:
        standing = [letter for letter in choices if letter in words]
        if len(standing) == 1 and words.index(standing[0]) >= len(words) - _LAST_WORDS:
            return standing[0]
        if not standing and _NONE in words:
            return ""
        stated = _ANSWER_IS.search(response)
        if stated and stated[1].upper() in choices:
            return stated[1].upper()
    return _letter_by_text(response.lower(), choices)


def _letter_by_text(response: str, choices: Mapping[str, str]) -> str:
    texts = {letter: text.lower() for letter, text in choices.items()}
    if len(response) > 2 * sum(map(len, texts.values())):
        return ""
    contained = [letter for letter, text in texts.items() if text in response]
    return contained[0] if len(contained) == 1 else ""
