"""What every engine can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from grace_core.evaluation.items import Prediction, Question


@dataclass(frozen=True)
class BatchPlan:
    """Which questions are answered together."""

    batches: list[list[Question]]
    batch_tokens: int
    """Tokens of a batch at most, that these batches were made with."""


class Engine(Protocol):
    """Answers questions with one model."""

    def plan(self, questions: Sequence[Question], batch_tokens: int | None = None) -> BatchPlan:
        """Cut questions into batches, the same ones for the same questions and `batch_tokens`.

        batch_tokens: None lets the engine choose.
        """

    def answer(self, plan: Iterable[Sequence[Question]]) -> Iterator[list[Prediction]]:
        """Predictions of each batch, one a question in its order; batches are drawn as needed.

        What goes wrong with an item is its prediction's `error`. Raises only where no further item
        could be answered either.
        """
