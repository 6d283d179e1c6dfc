"""VQAv2, TextVQA and VizWiz: open questions that ten people answered, scored by VQA accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from grace_core.evaluation.answers.vqa import normalise, vqa_accuracy
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
from grace_core.evaluation.metrics import by_field, mean_credit
from grace_core.evaluation.prompts import SHORT, PromptStyle, short_prompt

_MOST_ASK = 0.9
"""VQA accuracy of an answer that three of ten people gave: right in the paper's simple form."""

_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def _read(gold: Gold, response: str) -> Reading:
    credit = vqa_accuracy(response, gold.answers)
    return Reading(normalise(response), credit >= _MOST_ASK - 1e-9, credit)


_RULE = Rule(
    "official",
    "VQA accuracy: min(1, people of the same answer / 3), averaged over the ten sets of nine "
    "people, answers normalised as by EvalAI's processor (GT-Vision-Lab/VQA vqaEval.py; mmf "
    "m4c_evaluators.py)",
    _read,
)


def _gold(row: Row, item_id: str) -> Gold:
    answers = row["answers"] or []
    texts = tuple(each["answer"] if isinstance(each, dict) else each for each in answers)
    if len(texts) == 1:
        raise ValueError("answers holds one text, but the rule compares what several people said")
    fields = {name: row[name] for name in ("answer_type", "category") if row.get(name)}
    return Gold(item_id, "open", None, texts, fields)


def _metrics(marked: Sequence[Marked]) -> Metrics:
    return {
        **mean_credit("vqa_accuracy", marked),
        **by_field("by_answer_type", marked, "answer_type", mean_credit),
        **by_field("by_category", marked, "category", mean_credit),
    }


def _vqa(
    name: str,
    title: str,
    source: Source,
    rows: int,
    *,
    answers: Column,
    grouped_by: str | None = None,
    own: str = f"\n{SHORT}",
) -> Benchmark:
    def content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
        return row["image"], short_prompt(style, row["question"], own=own)

    group = {grouped_by: Column("text", scores=True, nullable=True)} if grouped_by else {}
    return Benchmark(
        name=name,
        title=title,
        source=source,
        columns={
            "question_id": Column("identifier", scores=True),
            "question": Column("text"),
            "answers": answers,
            **group,
            "image": Column("picture"),
        },
        gold=_gold,
        content=content,
        identify=lambda row, position: str(row["question_id"]),
        rules=(_RULE,),
        metrics=_metrics,
        headline=("official.vqa_accuracy",),
        metric_titles={"official.vqa_accuracy": "VQA accuracy"},
        max_new_tokens={"open": 16},
        rows=rows,
        licence="CC BY 4.0",
    )


_LISTED = Column("texts", scores=True, nullable=True)

VQAV2 = _vqa(
    "vqav2",
    "VQAv2",
    Source("lmms-lab/VQAv2", "validation"),
    214_354,
    answers=Column("records", scores=True, nullable=True),
    grouped_by="answer_type",
)
TEXTVQA = _vqa(
    "textvqa", "TextVQA", Source("lmms-lab/textvqa", "validation"), 5000, answers=_LISTED
)
VIZWIZ = _vqa(
    "vizwiz",
    "VizWiz",
    Source("lmms-lab/VizWiz-VQA", "val"),
    4319,
    answers=_LISTED,
    grouped_by="category",
    own=f"\n{_UNANSWERABLE}\n{SHORT}",
)
