"""GQA: 12578 balanced questions of testdev about 398 pictures, answered by a word or two."""

from __future__ import annotations

from collections.abc import Sequence

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
from grace_core.evaluation.metrics import by_field, share
from grace_core.evaluation.prompts import PromptStyle, short_prompt


def _gold(row: Row, item_id: str) -> Gold:
    answers = () if row["answer"] is None else (row["answer"],)
    types = row["types"] or {}
    fields = {name: str(types[name]) for name in ("structural", "semantic") if types.get(name)}
    return Gold(item_id, "open", None, answers, fields)


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    return row["imageId"], short_prompt(style, row["question"])


def _read(gold: Gold, response: str) -> Reading:
    answer = response.strip().rstrip(".").lower()
    return Reading(answer, answer in gold.answers)


def _metrics(marked: Sequence[Marked]) -> Metrics:
    return {
        **share("accuracy", marked),
        **by_field("by_structural_type", marked, "structural"),
        **by_field("by_semantic_type", marked, "semantic"),
    }


GQA = Benchmark(
    name="gqa",
    title="GQA",
    source=Source(
        "lmms-lab/GQA",
        "testdev",
        "testdev_balanced_instructions",
        pictures="testdev_balanced_images",
    ),
    columns={
        "id": Column("identifier", scores=True),
        "imageId": Column("picture"),
        "question": Column("text"),
        "answer": Column("text", scores=True, nullable=True),
        "types": Column("record", scores=True, nullable=True),
    },
    gold=_gold,
    content=_content,
    identify=lambda row, position: str(row["id"]),
    rules=(
        Rule(
            "official",
            "GQA eval.py: the answer itself and nothing else; LLaVA @c121f043 lowers the case and "
            "drops a period at the end before",
            _read,
        ),
    ),
    metrics=_metrics,
    headline=("official.accuracy",),
    max_new_tokens={"open": 16},
    rows=12_578,
    licence="CC BY 4.0",
)
