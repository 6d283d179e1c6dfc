"""MMMU: 30 college subjects in 6 domains; validation has 847 questions with options, 53 without."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from grace_core.evaluation.answers.mmmu import read_choice
from grace_core.evaluation.benchmarks.letters import gold_letter
from grace_core.evaluation.declaration import (
    Benchmark,
    Column,
    Marked,
    Metrics,
    Reading,
    Row,
    Rule,
    Source,
)
from grace_core.evaluation.items import Gold, Picture
from grace_core.evaluation.metrics import by_field, share, where
from grace_core.evaluation.prompts import (
    SHORT,
    PromptStyle,
    choice_prompt,
    interleaved,
    short_prompt,
)
from grace_core.evaluation.rules import POLICY, lettered, read_open_answer

_PICTURES = 7
_SUBJECTS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DOMAINS = {subject: domain for domain, subjects in _SUBJECTS.items() for subject in subjects}


def _open_golds(answer: str | None) -> tuple[str, ...]:
    """One text, or several where the data set keeps Python's text for a list of them."""
    if answer is None or answer.strip() in ("", "?"):
        return ()
    if answer.lstrip().startswith("["):
        try:
            listed = ast.literal_eval(answer)
        except (ValueError, SyntaxError):
            return (answer,)  # such as an interval, "[0, 1)"
        return tuple(str(each) for each in listed)
    return (answer,)


def _gold(row: Row, item_id: str) -> Gold:
    subject = "_".join(str(row["id"]).split("_")[1:-1])
    if subject not in _DOMAINS:
        raise ValueError(f"id {row['id']!r} names none of the 30 subjects")
    fields = {"subject": subject, "domain": _DOMAINS[subject], "type": row["question_type"]}
    if row["question_type"] != "multiple-choice":
        fields["type"] = "open"
        return Gold(item_id, "open", None, _open_golds(row["answer"]), fields)
    choices = lettered(row["options"])
    return Gold(item_id, "mcq", choices, gold_letter(row["answer"], choices), fields)


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    if row["question_type"] == "multiple-choice":
        options = lettered(row["options"])
        text = choice_prompt(style, row["question"], options, own_gap="\n\n")
    else:
        text = short_prompt(style, row["question"], own=f"\n\n{SHORT}")
    return interleaved(style, text, [row[f"image_{n}"] for n in range(1, _PICTURES + 1)])


def _read(gold: Gold, response: str) -> Reading:
    if gold.kind == "open":
        return read_open_answer(gold, response)
    assert gold.choices is not None
    answer = read_choice(response, gold.choices)
    return Reading(answer, answer in gold.answers)


def _metrics(marked: Sequence[Marked]) -> Metrics:
    return {
        **share("overall", marked),
        **share("multiple_choice", where(marked, "type", "multiple-choice")),
        **share("open", where(marked, "type", "open")),
        **by_field("by_domain", marked, "domain"),
        **by_field("by_subject", marked, "subject"),
    }


def _of_split(golds: Sequence[Gold]) -> tuple[int, ...]:
    """The ids say which split they are of."""
    splits = {gold.id.partition("_")[0] for gold in golds}
    sizes = {"dev": 150, "test": 10500}
    return tuple(sizes[name] for name in sizes if splits == {name})


MMMU = Benchmark(
    name="mmmu",
    title="MMMU",
    source=Source("MMMU/MMMU", "validation", "*"),
    columns={
        "id": Column("text", scores=True),
        "question": Column("text"),
        "options": Column("texts", scores=True),
        "question_type": Column("text", scores=True),
        "answer": Column("text", scores=True, nullable=True),
        **{f"image_{n}": Column("picture", nullable=True) for n in range(1, _PICTURES + 1)},
    },
    gold=_gold,
    content=_content,
    identify=lambda row, position: str(row["id"]),
    rules=(
        Rule(
            "official.fallback_wrong",
            "MMMU @bb0b95a9, its parsers for choices and open answers, list golds read; where they "
            "would draw a letter at random the response is unreadable and wrong",
            _read,
        ),
        POLICY,
    ),
    metrics=_metrics,
    headline=("official.fallback_wrong.overall",),
    max_new_tokens={"mcq": 128, "open": 128},
    rows=900,
    other_sizes=_of_split,
    licence="Apache-2.0",
)
