"""A process of an evaluation whose model is a stand-in: answers are functions of their questions.

python -m tests.engine_process FOLDER COUNT SECONDS_A_BATCH
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from grace_core.evaluation.engine.interface import BatchPlan
from grace_core.evaluation.engine.run import ask_all
from grace_core.evaluation.items import Prediction, Question


class Echo:
    """An engine without a model; like a real one, it draws a batch while it has one at hand."""

    def __init__(self, size: int = 3, seconds: float = 0.0) -> None:
        self.size = size
        self.seconds = seconds
        self.answered: list[str] = []

    def plan(self, questions: Sequence[Question], batch_tokens: int | None = None) -> BatchPlan:
        size = batch_tokens or self.size
        backwards = list(questions)[::-1]
        return BatchPlan([backwards[at : at + size] for at in range(0, len(backwards), size)], size)

    def answer(self, plan: Iterable[Sequence[Question]]) -> Iterator[list[Prediction]]:
        waiting: Sequence[Question] | None = None
        for batch in plan:
            if waiting is not None:
                yield self._answers(waiting)
            waiting = batch
        if waiting is not None:
            yield self._answers(waiting)

    def _answers(self, batch: Sequence[Question]) -> list[Prediction]:
        time.sleep(self.seconds)
        self.answered += [question.id for question in batch]
        return [expected(question) for question in batch]


def expected(question: Question) -> Prediction:
    """What `Echo` says."""
    return Prediction(question.id, f"said of {question.content[0]}\né\u2028", tokens=3)


def asked(count: int) -> list[Question]:
    """Questions that need no picture."""
    return [Question(f"q{number}", "mcq", (f"text {number}",)) for number in range(count)]


if __name__ == "__main__":
    ask_all(Echo(3, float(sys.argv[3])), asked(int(sys.argv[2])), Path(sys.argv[1]))
