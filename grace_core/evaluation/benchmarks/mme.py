"""MME: 2374 yes/no questions, two about each picture, in ten tasks of perception and four of
cognition.

A task has up to 200 points: the per cent of right answers and, added to it, the per cent of
pictures with both answers right (accuracy+). Perception has 2000 points, cognition 800. Metrics are
per cent of these, with the points beside.
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
from grace_core.evaluation.metrics import share, where, whole_groups
from grace_core.evaluation.prompts import SHORT, PromptStyle, yes_no_prompt
from grace_core.evaluation.rules import POLICY

_PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
_COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
_INSTRUCTION = " Please answer yes or no."
"""Ends every question of the data set; LLaVA asks for a word or phrase in its place."""

_POINTS = 200
_GOLDS = {"yes": "Yes", "no": "No"}


def _gold(row: Row, item_id: str) -> Gold:
    answer = row["answer"].strip().rstrip(".").lower()
    if answer not in _GOLDS:
        raise ValueError(f"answer {row['answer']!r} must be yes or no")
    if row["category"] not in (*_PERCEPTION, *_COGNITION):
        raise ValueError(f"category {row['category']!r} is none of MME's 14 tasks")
    fields = {"category": row["category"], "picture": row["question_id"]}
    return Gold(item_id, "yesno", None, (_GOLDS[answer],), fields)


def _content(row: Row, style: PromptStyle) -> tuple[str | Picture, ...]:
    question = row["question"].strip().removesuffix(_INSTRUCTION)
    return row["image"], yes_no_prompt(style, question, own=f"\n{SHORT}")


def _read(gold: Gold, response: str) -> Reading:
    said = response.lower().strip().replace(".", "")
    start = {"y": "yes", "n": "no"}.get(said, said[:4])
    answer = next((_GOLDS[word] for word in ("yes", "no") if word in start), "")
    return Reading(answer, answer in gold.answers)


def _task(name: str, marked: Sequence[Marked]) -> Metrics:
    """Accuracy, accuracy+ and their sum in points; nothing while a picture lacks an answer."""
    some = where(marked, "category", name)
    if not some or any(each.reading is None for each in some):
        return {}
    accuracy = share(f"accuracy.{name}", some)
    both = whole_groups(f"accuracy_plus.{name}", some, lambda gold: gold.fields["picture"])
    points = accuracy[f"accuracy.{name}"].percent + both[f"accuracy_plus.{name}"].percent
    return {**accuracy, **both, f"by_task.{name}": Metric(100.0 * points / _POINTS, points=points)}


def _metrics(marked: Sequence[Marked]) -> Metrics:
    tasks: Metrics = {}
    for name in (*_PERCEPTION, *_COGNITION):
        tasks |= _task(name, marked)
    found: Metrics = {}
    groups = {"total": (*_PERCEPTION, *_COGNITION), "perception": _PERCEPTION}
    for title, names in (groups | {"cognition": _COGNITION}).items():
        scores = [tasks.get(f"by_task.{name}") for name in names]
        known = [each.points for each in scores if each is not None and each.points is not None]
        if len(known) == len(names):
            points = sum(known)
            found[title] = Metric(100.0 * points / (_POINTS * len(names)), points=points)
    return {**found, **share("accuracy", marked), **tasks}


MME = Benchmark(
    name="mme",
    title="MME",
    source=Source("lmms-lab/MME", "test"),
    columns={
        "question_id": Column("text", scores=True),
        "question": Column("text"),
        "answer": Column("text", scores=True),
        "category": Column("text", scores=True),
        "image": Column("picture"),
    },
    gold=_gold,
    content=_content,
    identify=lambda row, position: str(row["question_id"]),
    rules=(
        Rule(
            "official",
            "MME calculation.py, as lmms-eval @75571cfe has it: yes or no within the first four "
            "characters, periods left out; points are accuracy plus accuracy+, summed over tasks",
            _read,
        ),
        POLICY,
    ),
    metrics=_metrics,
    headline=("official.total", "official.perception", "official.accuracy"),
    metric_titles={
        "official.total": "MME score",
        "official.perception": "MME perception score",
    },
    max_new_tokens={"yesno": 16},
    rows=2374,
    licence="for research; see its authors' terms",
)
