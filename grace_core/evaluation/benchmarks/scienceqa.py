"""ScienceQA test: 4241 questions with 2 to 5 options, of which 2017 have a picture (IMG)."""

from __future__ import annotations

from collections.abc import Sequence

from grace_core.evaluation.answers.authors import scienceqa_letter
from grace_core.evaluation.benchmarks.letters import gold_position
from grace_core.evaluation.declaration import Benchmark, Column, Marked, Metrics, Row, Source
from grace_core.evaluation.items import Gold, Picture
from grace_core.evaluation.metrics import by_field, share, where
from grace_core.evaluation.prompts import PromptStyle, choice_prompt
from grace_core.evaluation.rules import POLICY, lettered, official


def _gold(row: Row, item_id: str) -> Gold:
    choices = lettered(row["choices"])
    # Recorded rows come without their pictures and say whether there was one.
    shown = row.get("has_image", row.get("image") is not None)
    fields = {"picture": "yes" if shown else "no", "choices": str(len(choices))}
    return Gold(item_id, "mcq", choices, gold_position(row["answer"], choices), fields)


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    choices = lettered(row["choices"])
    text = choice_prompt(style, row["question"], choices, hint=row["hint"], own_hint="Context: {}")
    return (text,) if row["image"] is None else (row["image"], text)


def _metrics(marked: Sequence[Marked]) -> Metrics:
    pictured, plain = where(marked, "picture", "yes"), where(marked, "picture", "no")
    # Of the IMG configuration alone, "full" would name another benchmark.
    full = {**share("full", marked), **share("no_image", plain)} if plain else {}
    return {**full, **share("IMG", pictured), **by_field("by_number_of_choices", marked, "choices")}


def _of_img(golds: Sequence[Gold]) -> tuple[int, ...]:
    """Test and val of the IMG configuration, whose questions all have a picture."""
    return (2017, 2097) if all(gold.fields["picture"] == "yes" for gold in golds) else ()


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="ScienceQA",
    source=Source("lmms-lab/ScienceQA", "test", "ScienceQA-FULL"),
    columns={
        "image": Column("picture", nullable=True),
        "question": Column("text"),
        "choices": Column("texts", scores=True),
        "answer": Column("integer", scores=True, nullable=True),
        "hint": Column("text", nullable=True),
    },
    gold=_gold,
    content=_content,
    identify=lambda row, position: str(position),
    rules=(
        official(
            'LLaVA @c121f043: a bare letter, or "X. " at the start, or exactly one "The answer is '
            'X" with a character after it',
            lambda response, choices: scienceqa_letter(response),
        ),
        POLICY,
    ),
    metrics=_metrics,
    headline=("official.full", "official.IMG"),
    max_new_tokens={"mcq": 16},
    rows=4241,
    other_sizes=_of_img,
    licence="CC BY-NC-SA 4.0",
)
