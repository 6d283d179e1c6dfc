"""The VQA accuracy of VQAv2, TextVQA and VizWiz: how many of ten people answered the same.

Answers are brought into one form first, as EvalAI's processor does: lower case, no punctuation, no
articles, numbers up to ten as digits, contractions with their apostrophe.

Sources: GT-Vision-Lab/VQA, `vqaEval.py`; Antol et al., VQA (ICCV 2015), section 4;
facebookresearch/mmf, `mmf/utils/m4c_evaluators.py`, `EvalAIAnswerProcessor`, which LLaVA and
lmms-eval use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

from grace_core.evaluation.answers.punctuation import PERIODS_REMOVED, drop_marks

_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's "
    "ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't "
    "she'd've should've shouldn't shouldn't've somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're "
    "what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()


def _without_some_apostrophes(word: str) -> list[str]:
    """The word with one or more of its apostrophes left out."""
    places = [place for place, character in enumerate(word) if character == "'"]
    chosen = (c for n in range(1, len(places) + 1) for c in combinations(places, n))
    return ["".join(c for i, c in enumerate(word) if i not in dropped) for dropped in chosen]


_RESTORED = {form: word for word in _CONTRACTIONS for form in _without_some_apostrophes(word)}
"""Contractions without an apostrophe of theirs -> with it."""


def normalise(answer: str) -> str:
    """An answer in the form in which answers are compared."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = _PERIOD.sub("", drop_marks(text), count=PERIODS_REMOVED)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Mean over the annotators of min(1, equal answers of the others / 3), in [0, 1].

    With ten annotators: 0, 0.3, 0.6 and 0.9 for none to three of them, 1 for four or more.
    """
    given = normalise(answer)
    equal = [normalise(each) == given for each in annotators]
    count = sum(equal)
    return sum(min(1.0, (count - each) / 3) for each in equal) / len(equal)
