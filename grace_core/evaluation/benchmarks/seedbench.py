"""SEED-Bench, its 14233 questions about single pictures; the video rows are not part of it."""

from __future__ import annotations

from collections.abc import Sequence

from grace_core.evaluation.answers.authors import exact_letter
from grace_core.evaluation.benchmarks.letters import gold_letter
from grace_core.evaluation.declaration import Benchmark, Column, Marked, Metrics, Row, Source
from grace_core.evaluation.items import Gold, Picture
from grace_core.evaluation.metrics import by_field, share, where
from grace_core.evaluation.prompts import PromptStyle, choice_prompt
from grace_core.evaluation.rules import POLICY, official

_TYPES = {
    "1": "Scene Understanding",
    "2": "Instance Identity",
    "3": "Instance Attributes",
    "4": "Instance Location",
    "5": "Instances Counting",
    "6": "Spatial Relation",
    "7": "Instance Interaction",
    "8": "Visual Reasoning",
    "9": "Text Understanding",
}


def _choices(row: Row) -> dict[str, str]:
    return {letter: row.get(f"choice_{letter.lower()}") or "" for letter in "ABCD"}


def _gold(row: Row, item_id: str) -> Gold:
    choices = _choices(row)
    fields = {"data_type": row["data_type"]}
    kind = row.get("question_type_id")
    if kind is not None:
        fields["type"] = _TYPES.get(str(kind), str(kind))
    return Gold(item_id, "mcq", choices, gold_letter(row["answer"], choices), fields)


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    return *row["image"], choice_prompt(style, row["question"], _choices(row))


def _metrics(marked: Sequence[Marked]) -> Metrics:
    images = where(marked, "data_type", "image")
    videos = where(marked, "data_type", "video")
    found = {**share("image", images), **by_field("image_by_type", images, "type")}
    if any(each.reading is not None for each in videos):
        found |= share("video", videos) | share("mixed_image_and_video", marked)
    return found


SEEDBENCH = Benchmark(
    name="seedbench",
    title="SEED-Bench",
    source=Source("lmms-lab/SEED-Bench", "test"),
    columns={
        "question_id": Column("identifier", scores=True),
        "question": Column("text"),
        "choice_a": Column("text"),
        "choice_b": Column("text"),
        "choice_c": Column("text"),
        "choice_d": Column("text"),
        "answer": Column("text", scores=True, nullable=True),
        "data_type": Column("text", scores=True),
        "question_type_id": Column("identifier"),
        "image": Column("pictures"),
    },
    gold=_gold,
    content=_content,
    identify=lambda row, position: str(row["question_id"]),
    rules=(
        official("LLaVA @c121f043: the response is the letter and nothing else", exact_letter),
        POLICY,
    ),
    metrics=_metrics,
    headline=("official.image",),
    max_new_tokens={"mcq": 16},
    rows=14233,
    licence="CC BY-NC 4.0",
    keep=lambda row: row["data_type"] == "image",
)
