"""POPE: is there such a thing in the picture? 9000 questions, half of them about what is not there.

What is asked about is drawn at random, among the most frequent things, or among those that go with
what is there (adversarial); 3000 questions each.
"""

from __future__ import annotations

from collections.abc import Sequence

from grace_core.evaluation.declaration import (
    Benchmark,
    Column,
    Marked,
    Metric,
    Metrics,
    Reading,
    Row,
    Rule,
    Source,
)
from grace_core.evaluation.items import Gold, Picture
from grace_core.evaluation.metrics import by_field, mean_of, share
from grace_core.evaluation.prompts import SHORT, PromptStyle, yes_no_prompt
from grace_core.evaluation.rules import POLICY

_GOLDS = {"yes": "Yes", "no": "No"}


def _gold(row: Row, item_id: str) -> Gold:
    answer = row["answer"].strip().lower()
    if answer not in _GOLDS:
        raise ValueError(f"answer {row['answer']!r} must be yes or no")
    return Gold(item_id, "yesno", None, (_GOLDS[answer],), {"category": row["category"]})


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    return row["image"], yes_no_prompt(style, row["question"], own=f"\n{SHORT}")


def _read(gold: Gold, response: str) -> Reading:
    """No where the first sentence has one of three words, else Yes, whatever it says."""
    words = response.split(".")[0].replace(",", "").split(" ")
    answer = "No" if {"No", "not", "no"} & set(words) else "Yes"
    return Reading(answer, answer in gold.answers)


def _f1(name: str, marked: Sequence[Marked]) -> Metrics:
    """Of Yes: 2 tp / (2 tp + fp + fn)."""
    right, said, there = _counts(marked)
    return {name: Metric(200.0 * right / (said + there))} if said + there else {}


def _counts(marked: Sequence[Marked]) -> tuple[int, int, int]:
    """Yes said rightly, said at all, and true."""
    judged = [each for each in marked if each.reading is not None]
    said = [each for each in judged if each.reading and each.reading.answer == "Yes"]
    there = sum(each.gold.answers == ("Yes",) for each in judged)
    return sum(each.gold.answers == ("Yes",) for each in said), len(said), there


def _ratios(marked: Sequence[Marked]) -> Metrics:
    right, said, there = _counts(marked)
    total = sum(each.reading is not None for each in marked)
    shares = {"precision": (right, said), "recall": (right, there), "yes_ratio": (said, total)}
    return {
        name: Metric(100.0 * part / whole, part, whole)
        for name, (part, whole) in shares.items()
        if whole
    }


def _metrics(marked: Sequence[Marked]) -> Metrics:
    each = by_field("f1_by_category", marked, "category", _f1)
    return {
        **mean_of("mean_f1", each),
        **each,
        **_f1("f1", marked),
        **share("accuracy", marked),
        **by_field("accuracy_by_category", marked, "category"),
        **_ratios(marked),
    }


POPE = Benchmark(
    name="pope",
    title="POPE",
    source=Source("lmms-lab/POPE", "test"),
    columns={
        "question_id": Column("identifier", scores=True),
        "question": Column("text"),
        "answer": Column("text", scores=True),
        "category": Column("text", scores=True),
        "image": Column("picture"),
    },
    gold=_gold,
    content=_content,
    identify=lambda row, position: f"{row['category']}_{row['question_id']}",
    rules=(
        Rule(
            "official",
            'AoiDragon/POPE evaluate.py and LLaVA @c121f043: No where the first sentence has "No", '
            '"no" or "not" as a word, else Yes; nothing is a parse failure',
            _read,
        ),
        POLICY,
    ),
    metrics=_metrics,
    headline=("official.mean_f1",),
    metric_titles={"official.mean_f1": "F1"},
    max_new_tokens={"yesno": 16},
    rows=9000,
    licence="MIT",
)
