"""MMBench: every question is asked once for each rotation of its options (CircularEval)."""

from __future__ import annotations

from collections.abc import Sequence

from grace_core.evaluation.answers.authors import mmbench_letter
from grace_core.evaluation.benchmarks.letters import gold_letter
from grace_core.evaluation.declaration import Benchmark, Column, Marked, Metrics, Row, Source
from grace_core.evaluation.items import Gold, Picture
from grace_core.evaluation.metrics import by_field, share, where, whole_groups
from grace_core.evaluation.prompts import PromptStyle, choice_prompt
from grace_core.evaluation.rules import POLICY, official

_ROTATION = 1_000_000
"""What is added to a question's index for each further rotation of its options."""

_MISSING = "nan"
"""What copies that passed through pandas hold where there is no option."""


def _choices(row: Row) -> dict[str, str]:
    """Options by letter; "None" and "NA" are texts like any other."""
    found = {letter: row.get(letter) for letter in "ABCD"}
    while found and list(found.values())[-1] in (None, "", _MISSING):
        found.popitem()
    absent = [letter for letter, text in found.items() if text is None]
    if absent or not found:
        raise ValueError(f"option {', '.join(absent) or 'A'} is missing")
    return {letter: str(text) for letter, text in found.items()}


def _gold(row: Row, item_id: str) -> Gold:
    choices = _choices(row)
    index = int(row["index"])
    fields = {
        "question": str(index % _ROTATION),
        "rotated": "no" if index < _ROTATION else "yes",
    }
    for name, columns in (("category", ("category",)), ("l2_category", _L2)):
        value = next((row[column] for column in columns if row.get(column)), None)
        if value is not None:
            fields[name] = value
    return Gold(item_id, "mcq", choices, gold_letter(row["answer"], choices), fields)


_L2 = ("L2-category", "l2-category")


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    hint = None if row["hint"] == _MISSING else row["hint"]
    return row["image"], choice_prompt(style, row["question"], _choices(row), hint=hint)


def _metrics(marked: Sequence[Marked]) -> Metrics:
    def circular(name: str, some: Sequence[Marked]) -> Metrics:
        return whole_groups(name, some, lambda gold: gold.fields["question"])

    return {
        **circular("circular", marked),
        **share("vanilla_all_rows", marked),
        **share("unrotated_rows", where(marked, "rotated", "no")),
        **by_field("circular_by_category", marked, "category", circular),
        **by_field("circular_by_l2_category", marked, "l2_category", circular),
    }


MMBENCH = Benchmark(
    name="mmbench",
    title="MMBench",
    source=Source("lmms-lab/MMBench", "dev", "en"),
    columns={
        "index": Column("identifier", scores=True),
        "question": Column("text"),
        "hint": Column("text", nullable=True),
        "A": Column("text", scores=True),
        "B": Column("text", scores=True),
        "C": Column("text", scores=True, nullable=True),
        "D": Column("text", scores=True, nullable=True),
        "answer": Column("text", scores=True, nullable=True),
        "category": Column("text"),
        "L2-category": Column("text", otherwise=("l2-category",)),
        "image": Column("picture"),
    },
    gold=_gold,
    content=_content,
    identify=lambda row, position: str(row["index"]),
    rules=(
        official(
            "VLMEvalKit @e8e78f05 without a judge: a letter among the last words, a stated answer, "
            "or one option's text; a question is right when all its rotations are",
            mmbench_letter,
        ),
        POLICY,
    ),
    metrics=_metrics,
    headline=("official.circular",),
    metric_titles={"official.circular": "CircularEval accuracy"},
    group=lambda gold: gold.fields["question"],
    max_new_tokens={"mcq": 128},
    rows=4329,
    other_sizes=lambda golds: (4377, 6666),  # dev of 2023-07-12, test
    licence="Apache-2.0",
)
