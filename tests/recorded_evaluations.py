"""Evaluations as the stage leaves them, written from right and wrong answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Answers = Sequence[bool | None]
"""Right, wrong, or no answer, item by item."""


def recorded_files(
    label: str,
    benchmarks: Mapping[str, Answers],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    unreadable: int = 0,
    scores: Mapping[str, Any] | None = None,
    **summary: Any,
) -> dict[str, str]:
    """Text by path within the evaluation's folder.

    groups: benchmark -> group of each item; the headline then counts whole groups.
    unreadable: so many of the wrong answers are parse failures.
    scores: more of each benchmark's score.
    """
    files, found = {}, {}
    for name, answers in benchmarks.items():
        grouped = (groups or {}).get(name)
        lines, left = [], unreadable
        for number, correct in enumerate(answers):
            answer = None if correct is None else "A" if correct else "" if left > 0 else "B"
            left -= answer == ""
            line = {
                "id": f"{name}-{number}",
                "response": answer,
                "error": "OSError: gone" if correct is None else None,
                "answer": answer,
                "correct": correct,
            }
            lines.append(json.dumps(line | ({"group": grouped[number]} if grouped else {})))
        files[f"predictions/{name}.jsonl"] = "\n".join(lines) + "\n"
        found[name] = _score(name, answers, grouped, unreadable) | {**(scores or {})}
    whole = {"label": label, "benchmarks": found, **summary}
    return {"results.json": json.dumps(whole), **files}


def write_recorded(
    folder: Path, label: str, benchmarks: Mapping[str, Answers], **more: Any
) -> Path:
    for name, text in recorded_files(label, benchmarks, **more).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _score(
    name: str, answers: Answers, groups: Sequence[str] | None, unreadable: int
) -> dict[str, Any]:
    answered = [each for each in answers if each is not None]
    units = [bool(each) for each in answers]
    if groups:
        units = [
            all(answers[at] for at, group in enumerate(groups) if group == one)
            for one in dict.fromkeys(groups)
        ]
    metric = {"percent": 100 * sum(units) / len(units), "correct": sum(units), "total": len(units)}
    errors = len(answers) - len(answered)
    half = answers[: len(answers) // 2] or answers
    share = {"percent": 100 * sum(map(bool, half)) / len(half)}
    category = {**share, "correct": sum(map(bool, half)), "total": len(half)}
    return {
        "benchmark": name,
        "rules": {"policy": {"rule": "the first letter", "parse_failures": unreadable}},
        "total": len(answers),
        "answered": len(answered),
        "errors": errors,
        "missing": 0,
        "parse_failures": min(unreadable, answered.count(False)),
        "headline": None if errors else {"metric": "policy.accuracy", "percent": metric["percent"]},
        "headline_refused": f"{errors} of {len(answers)} items have no answer" if errors else None,
        "metrics": {"policy.accuracy": metric, "policy.by_category.first <half>": category},
    }
