"""What every engine can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from grace_core.data.sharegpt4v import UnusableRecord
from grace_core.errors import GraceError
from grace_core.evaluation.items import Prediction, Question


@dataclass(frozen=True)
class BatchPlan:
    """Which questions are answered together."""

    batches: list[list[Question]]
    batch_tokens: int
    """Tokens of a batch at most, that these batches were made with."""


@dataclass(frozen=True)
class Unanswered:
    """A question that could not be asked for a reason that is not its own; it is asked again."""

    item_id: str
    reason: str


def outcome_of(question: Question, error: Exception) -> Prediction | Unanswered:
    """What an error makes of a question: its own error, or nothing yet.

    An item's own are a picture that cannot be decoded and a text that cannot be put as it is. All
    else (a file that cannot be read just now, memory that somebody else holds) may go well later.
    """
    if isinstance(error, UnusableRecord | GraceError):
        return item_error(question, error)
    return Unanswered(question.id, f"{type(error).__name__}: {error}")


def item_error(question: Question, error: Exception) -> Prediction:
    """What is wrong with the item itself."""
    return Prediction(question.id, "", f"{type(error).__name__}: {error}")


class Engine(Protocol):
    """Answers questions with one model."""

    def plan(self, questions: Sequence[Question], batch_tokens: int | None = None) -> BatchPlan:
        """Cut questions into batches, the same ones for the same questions and `batch_tokens`.

        batch_tokens: None lets the engine choose.
        """

    def answer(
        self, plan: Iterable[Sequence[Question]]
    ) -> Iterator[Sequence[Prediction | Unanswered]]:
        """What came of each batch, one a question in its order; batches are drawn as needed.

        What is wrong with an item is its prediction's `error`. Raises only where no further item
        could be answered either.
        """
