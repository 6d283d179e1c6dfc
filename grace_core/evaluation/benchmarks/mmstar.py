"""MMStar: 1500 questions that need their picture, in 6 categories of 250 and 18 below."""

from __future__ import annotations

from collections.abc import Sequence

from grace_core.evaluation.answers.authors import mmstar_letter
from grace_core.evaluation.benchmarks.letters import gold_letter
from grace_core.evaluation.declaration import (
    Benchmark,
    Column,
    Marked,
    Metrics,
    Row,
    Source,
)
from grace_core.evaluation.items import Gold, Picture
from grace_core.evaluation.metrics import by_field, mean_of, share
from grace_core.evaluation.prompts import LETTER, PromptStyle, inline_choice_prompt
from grace_core.evaluation.rules import POLICY, official

_CHOICES = dict.fromkeys("ABCD", "")
"""The options stand within the question's text."""


def _gold(row: Row, item_id: str) -> Gold:
    fields = {"category": row["category"], "l2_category": row["l2_category"]}
    return Gold(item_id, "mcq", _CHOICES, gold_letter(row["answer"], _CHOICES), fields)


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    # lmms-eval's instruction lacks the period here.
    own = f"\n{LETTER.rstrip('.')}"
    return row["image"], inline_choice_prompt(style, row["question"], own=own)


def _metrics(marked: Sequence[Marked]) -> Metrics:
    finer = by_field("by_l2_category", marked, "l2_category")
    return {
        **share("micro", marked),
        **by_field("by_category", marked, "category"),
        **finer,
        **mean_of("macro_over_l2", finer),  # what lmms-eval calls average
    }


MMSTAR = Benchmark(
    name="mmstar",
    title="MMStar",
    source=Source("Lin-Chen/MMStar", "val", "val"),
    columns={
        "index": Column("identifier", scores=True),
        "question": Column("text"),
        "image": Column("picture"),
        "answer": Column("text", scores=True, nullable=True),
        "category": Column("text", scores=True),
        "l2_category": Column("text", scores=True),
    },
    gold=_gold,
    content=_content,
    identify=lambda row, position: str(row["index"]),
    rules=(
        official(
            'MMStar @88f243ab: the first character, or the one after "(", "option " or "the answer '
            'is ", in any case',
            mmstar_letter,
        ),
        POLICY,
    ),
    metrics=_metrics,
    headline=("official.micro",),
    max_new_tokens={"mcq": 128},
    rows=1500,
    licence="none stated",
)
