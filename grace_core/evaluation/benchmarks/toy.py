"""The two benchmarks of the toy world: a letter, and yes or no."""

from __future__ import annotations

from collections.abc import Sequence

from grace_core.evaluation.declaration import Benchmark, Column, Marked, Metrics, Row
from grace_core.evaluation.items import Gold, Kind, Picture
from grace_core.evaluation.metrics import by_field, share
from grace_core.evaluation.prompts import PromptStyle
from grace_core.evaluation.rules import POLICY
from grace_core.toy.world import CHOICE_BENCHMARK, YESNO_BENCHMARK, prompt_for


def _gold(row: Row, item_id: str) -> Gold:
    kind, choices, answer = row["kind"], row.get("choices"), row["answer"]
    if kind == "yesno":
        if choices:
            raise ValueError("a yesno item has no choices")
        if answer not in ("Yes", "No"):
            raise ValueError(f"answer {answer!r} must be Yes or No")
    elif kind == "mcq":
        if not choices:
            raise ValueError("an mcq item needs choices")
        bad = [name for name in choices if not (len(name) == 1 and "A" <= name <= "Z")]
        if bad:
            raise ValueError(f"choices {bad} are not single letters A to Z")
        if answer not in choices:
            raise ValueError(f"answer {answer!r} is none of the choices {list(choices)}")
    else:
        raise ValueError(f"kind {kind!r} must be mcq or yesno")
    return Gold(item_id, kind, choices or None, (answer,), {"category": row["category"]})


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    """Worded as the toy models were taught, in whatever style."""
    return row["image"], prompt_for(row)


def _metrics(marked: Sequence[Marked]) -> Metrics:
    return {**share("accuracy", marked), **by_field("by_category", marked, "category")}


def _toy(name: str, title: str, kind: Kind) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        source=None,
        columns={
            "id": Column("text", scores=True),
            "kind": Column("text", scores=True),
            "question": Column("text"),
            "choices": Column("record", scores=True, nullable=True),
            "answer": Column("text", scores=True),
            "category": Column("text", scores=True),
            "image": Column("picture"),
        },
        gold=_gold,
        content=_content,
        identify=lambda row, position: str(row["id"]),
        rules=(POLICY,),
        metrics=_metrics,
        headline=("policy.accuracy",),
        max_new_tokens={kind: 8},
        licence="Apache-2.0",
    )


TOY_CHOICE = _toy(CHOICE_BENCHMARK, "toy-choice", "mcq")
TOY_YESNO = _toy(YESNO_BENCHMARK, "toy-yesno", "yesno")
