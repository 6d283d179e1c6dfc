"""HallusionBench: 951 questions about pictures that deceive, and 178 asked without one.

The authors judge answers by GPT-4; without it, the words yes and no are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from grace_core.evaluation.declaration import (
    Benchmark,
    Column,
    Marked,
    Metrics,
    Reading,
    Row,
    Source,
)
from grace_core.evaluation.items import Gold, Picture
from grace_core.evaluation.metrics import share, where, whole_groups
from grace_core.evaluation.prompts import PromptStyle, yes_no_prompt
from grace_core.evaluation.rules import POLICY

_SET = ("category", "subcategory", "set_id")
_KEYS = (*_SET, "figure_id", "question_id")
_GOLDS = {"0": "No", "1": "Yes"}


def _gold(row: Row, item_id: str) -> Gold:
    answer = str(row["gt_answer"])
    if answer not in _GOLDS:
        raise ValueError(f"gt_answer {answer!r} must be 0 or 1")
    fields = {key: str(row[key]) for key in _KEYS}
    shown = row.get("has_image", row.get("image") is not None)
    fields["picture"] = "yes" if shown else "no"
    return Gold(item_id, "yesno", None, (_GOLDS[answer],), fields)


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    text = yes_no_prompt(style, row["question"])
    return (text,) if row["image"] is None else (row["image"], text)


def _key(last: str) -> Callable[[Gold], tuple[str, ...]]:
    return lambda gold: tuple(gold.fields[name] for name in (*_SET, last))


def _without_figure(gold: Gold) -> bool:
    """The control question of a picture that was left out."""
    return gold.fields["category"] == "VS" and gold.fields["figure_id"] == "0"


def _lenient(each: Marked) -> Marked:
    """Without the figure, not to answer is right: so the authors count it."""
    if each.reading is None or each.reading.answer or not _without_figure(each.gold):
        return each
    return replace(each, reading=Reading("", True))


def _accuracies(name: str, marked: Sequence[Marked]) -> Metrics:
    figures = [each for each in marked if not _without_figure(each.gold)]
    question, figure = _key("question_id"), _key("figure_id")
    over, complete = f"{name}.{{}}_over_answered_rows", f"{name}.{{}}_complete_groups_only"
    return {
        **share(f"{name}.aAcc", marked),
        **whole_groups(over.format("qAcc"), marked, question, complete=False),
        **whole_groups(over.format("fAcc"), figures, figure, complete=False),
        **whole_groups(complete.format("qAcc"), marked, question),
        **whole_groups(complete.format("fAcc"), figures, figure),
    }


def _metrics(marked: Sequence[Marked]) -> Metrics:
    pictured = where(marked, "picture", "yes")
    found = _accuracies("answered_rows_with_image", pictured)
    if len(pictured) < len(marked):
        found |= _accuracies("answered_rows_all", marked)
        found |= _accuracies("answered_rows_all_lenient", [_lenient(each) for each in marked])
    return found


def _of_pictures(golds: Sequence[Gold]) -> tuple[int, ...]:
    """The questions that all have a picture are a set of their own."""
    return (951,) if all(gold.fields["picture"] == "yes" for gold in golds) else ()


HALLUSIONBENCH = Benchmark(
    name="hallusionbench",
    title="HallusionBench",
    source=Source("lmms-lab/HallusionBench", "image+non_image"),
    columns={
        **{name: Column("identifier", scores=True) for name in _KEYS},
        "question": Column("text"),
        "gt_answer": Column("identifier", scores=True),
        "image": Column("picture", nullable=True),
    },
    gold=_gold,
    content=_content,
    identify=lambda row, position: "_".join(str(row[key]) for key in _KEYS),
    rules=(POLICY,),
    metrics=_metrics,
    headline=("policy.answered_rows_with_image.aAcc", "policy.answered_rows_all.aAcc"),
    group=lambda gold: gold.id if gold.fields["picture"] == "yes" else None,
    cluster=lambda gold: "_".join(gold.fields[name] for name in _SET),
    max_new_tokens={"yesno": 128},
    rows=1129,
    other_sizes=_of_pictures,
    licence="BSD-3-Clause",
)
