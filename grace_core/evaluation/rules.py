"""The rules that all benchmarks share: one reader for each kind of answer."""

from __future__ import annotations

from grace_core.evaluation.answers.letters import extract_letter
from grace_core.evaluation.answers.yesno import extract_yes_no
from grace_core.evaluation.declaration import Reading, Rule
from grace_core.evaluation.items import Gold


def read_by_kind(gold: Gold, response: str) -> Reading:
    """Judge a response by the reader of its kind; what cannot be read is wrong."""
    if gold.kind == "mcq":
        assert gold.choices is not None
        answer = extract_letter(response, gold.choices)
    else:
        assert gold.kind == "yesno"
        said = extract_yes_no(response)
        answer = "" if said == "Unknown" else said
    return Reading(answer, answer in gold.answers)


POLICY = Rule(
    "policy",
    "letters: the last container, else the last declaration, else labels that agree; "
    "yes/no: exactly one of the two words",
    read_by_kind,
)
