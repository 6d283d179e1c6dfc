"""Rules: readers bound to golds. `POLICY` is the one that all benchmarks share."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence

from grace_core.evaluation.answers.letters import extract_letter
from grace_core.evaluation.answers.mmmu import open_is_right, read_open
from grace_core.evaluation.answers.yesno import extract_yes_no
from grace_core.evaluation.declaration import Reading, Rule
from grace_core.evaluation.items import Gold


def lettered(texts: Sequence[str]) -> dict[str, str]:
    """Options by letter, from A. Raises ValueError for none, or more than there are letters."""
    if not 0 < len(texts) <= len(string.ascii_uppercase):
        raise ValueError(f"{len(texts)} options; between 1 and 26 can have a letter")
    return dict(zip(string.ascii_uppercase, texts, strict=False))


def read_by_kind(gold: Gold, response: str) -> Reading:
    """Judge a response by the reader of its kind; what cannot be read is wrong."""
    if gold.kind == "mcq":
        assert gold.choices is not None
        answer = extract_letter(response, gold.choices)
        return Reading(answer, answer in gold.answers)
    if gold.kind == "yesno":
        said = extract_yes_no(response)
        return Reading("" if said == "Unknown" else said, said in gold.answers)
    return read_open_answer(gold, response)


def read_open_answer(gold: Gold, response: str) -> Reading:
    """Judge an answer in the model's own words by MMMU's rule."""
    said = read_open(response)
    return Reading(str(said[0]), open_is_right(said, gold.answers))


POLICY = Rule(
    "policy",
    "letters: the last container such as <answer>, else the last declaration, else labels that "
    'agree (after lmms-eval mcq_extract @00a12d40); yes/no: exactly one of "yes" and "no" '
    "(VLMEvalKit YOrN_Extraction @e8e78f05); own words: MMMU's open answers @bb0b95a9; what cannot "
    "be read is wrong",
    read_by_kind,
)


def official(source: str, read: Callable[[str, Mapping[str, str]], str]) -> Rule:
    """The authors' rule for letters; `read` takes a response and the item's choices."""

    def judge(gold: Gold, response: str) -> Reading:
        assert gold.choices is not None
        answer = read(response, gold.choices)
        return Reading(answer, answer in gold.answers)

    return Rule("official", source, judge)
