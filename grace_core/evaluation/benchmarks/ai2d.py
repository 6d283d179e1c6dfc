"""AI2D: 3088 questions about diagrams, whose labels are overdrawn with letters or left as they are.

The two give scores that differ by points; they are two benchmarks with names of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from grace_core.evaluation.answers.authors import ai2d_letter
from grace_core.evaluation.benchmarks.letters import gold_position
from grace_core.evaluation.declaration import Benchmark, Column, Marked, Metrics, Row, Source
from grace_core.evaluation.items import Gold, Picture
from grace_core.evaluation.metrics import share
from grace_core.evaluation.prompts import PromptStyle, choice_prompt
from grace_core.evaluation.rules import POLICY, lettered, official


def _gold(row: Row, item_id: str) -> Gold:
    choices = lettered(row["options"])
    return Gold(item_id, "mcq", choices, gold_position(row["answer"], choices))


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    return row["image"], choice_prompt(style, row["question"], lettered(row["options"]))


def _metrics(marked: Sequence[Marked]) -> Metrics:
    return share("accuracy", marked)


def _ai2d(name: str, title: str, repository: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        source=Source(repository, "test"),
        columns={
            "question": Column("text"),
            "options": Column("texts", scores=True),
            "answer": Column("identifier", scores=True, nullable=True),
            "image": Column("picture"),
        },
        gold=_gold,
        content=_content,
        identify=lambda row, position: str(position),
        rules=(
            official(
                'lmms-eval @75571cfe: "X." at the start or the whole response, equal to the letter '
                "without case and punctuation",
                lambda response, choices: ai2d_letter(response),
            ),
            POLICY,
        ),
        metrics=_metrics,
        headline=("official.accuracy",),
        max_new_tokens={"mcq": 16},
        rows=3088,
        licence="CC BY-SA 4.0",
    )


AI2D = _ai2d("ai2d", "AI2D (mask)", "lmms-lab/ai2d")
AI2D_NO_MASK = _ai2d("ai2d-no-mask", "AI2D (no mask)", "lmms-lab/ai2d-no-mask")
