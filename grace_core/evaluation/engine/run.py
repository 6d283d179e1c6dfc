"""All questions of a benchmark asked, by one process or by several that share the work.

Processes know nothing of one another but a folder: which batches are answered (`journal`) and which
one somebody is at (`claims`). So they may start and die when they like; as long as one is left,
everything is answered, and after all have been killed the next run goes on where they were.

A batch is answered as a whole or again as a whole, with the questions it always has. So what a
question's neighbours do to the last bits of its logits does not depend on what was killed when.

A batch with a question that could not be asked, for want of memory or because a file could not be
read, is not recorded: the others are answered, then the run ends with an error, and the next one
asks that batch again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from grace_core.errors import GraceError
from grace_core.evaluation.engine.claims import Claims
from grace_core.evaluation.engine.interface import BatchPlan, Engine, Unanswered
from grace_core.evaluation.engine.journal import Journal
from grace_core.evaluation.items import Prediction, Question

_LOOK_SECONDS = 0.2

_MOST_UNANSWERED = 20
"""Questions that one process could not ask; of more, it ends at once: the cause is not theirs."""

_NAMED = 3
"""Of these, how many the error names."""

ANSWERS = "answers"
"""Folder of the journals."""

PLAN_FILE = "plan.json"
"""Written by the first process of the first run; all others make the same batches."""


def ask_all(
    engine: Engine,
    questions: Sequence[Question],
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Predictions of all questions, in their order.

    Args:
        engine: the model that is asked.
        questions: with distinct ids.
        folder: of these questions and this model alone; what it holds is not asked again.
        on_progress: called with (questions answered by whomever, questions in all).

    Raises:
        GraceError: the folder was made for other questions, or some could not be asked.
    """
    if not questions:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    ids = [question.id for question in questions]
    with Journal(folder / ANSWERS) as journal, Claims(folder / "batches.lock") as claims:
        if not journal.holds(ids):
            plan = _agreed_plan(engine, questions, folder / PLAN_FILE)
            unanswered = _answer(engine, plan, journal, claims, on_progress, len(questions))
            if unanswered:
                raise GraceError(_refusal(unanswered, folder))
        if on_progress is not None:
            on_progress(len(questions), len(questions))
        return journal.in_order(ids)


def recorded(questions: Sequence[Question], folder: Path) -> list[Prediction] | None:
    """Predictions that the folder holds of these questions, in their order; None unless of all."""
    ids = [question.id for question in questions]
    journal = Journal(folder / ANSWERS)
    return journal.in_order(ids) if journal.holds(ids) else None


def _answer(
    engine: Engine,
    plan: BatchPlan,
    journal: Journal,
    claims: Claims,
    on_progress: Callable[[int, int], None] | None,
    total: int,
) -> list[Unanswered]:
    """Answer batches until all are, by whomever; returns the questions that this could not ask."""
    unanswered: dict[int, list[Unanswered]] = {}  # by batch
    contents = [[question.id for question in batch] for batch in plan.batches]
    taken: list[int] = []  # in the order in which the engine answers them

    def free_batches() -> Iterator[Sequence[Question]]:
        for number, batch in enumerate(plan.batches):
            if number in unanswered or journal.holds(contents[number]):
                continue
            if not claims.take(number):
                continue
            journal.refresh()  # whoever had it a moment ago may have answered it
            if journal.holds(contents[number]):
                claims.give(number)
                continue
            taken.append(number)
            yield batch

    def settled(number: int) -> bool:
        return number in unanswered or journal.holds(contents[number])

    def left() -> list[Unanswered]:
        return [
            each
            for number, batch in unanswered.items()
            if not journal.holds(contents[number])
            for each in batch
        ]

    while not all(map(settled, range(len(contents)))):
        at_work = False
        for outcomes in engine.answer(free_batches()):
            at_work = True
            number = taken.pop(0)
            failed = [one for one in outcomes if isinstance(one, Unanswered)]
            if failed:
                unanswered[number] = failed
            else:
                journal.append(one for one in outcomes if isinstance(one, Prediction))
            claims.give(number)
            if len(left()) > _MOST_UNANSWERED:
                return left()
            if on_progress is not None:
                on_progress(len(journal.predictions), total)
        if not at_work:  # others are at what is left; should they die, it is free again
            time.sleep(_LOOK_SECONDS)
            journal.refresh()
    journal.refresh()  # another process may have had better luck
    return left()


def _refusal(unanswered: Sequence[Unanswered], folder: Path) -> str:
    named = "; ".join(f"{each.item_id}: {each.reason}" for each in unanswered[:_NAMED])
    more = "; ..." if len(unanswered) > _NAMED else ""
    count = f"{len(unanswered)} questions" if len(unanswered) > 1 else "a question"
    return (
        f"{folder.name}: {count} could not be asked ({named}{more}); the log has more. Mend the "
        "cause, such as a disk that cannot be read or a program that holds the GPU's memory, and "
        f"run the same again: other answers are kept in {folder}, only what is missing is asked"
    )


def _agreed_plan(engine: Engine, questions: Sequence[Question], file: Path) -> BatchPlan:
    """The plan that all processes and all runs in this folder share."""
    identity = hashlib.sha256("\n".join(question.id for question in questions).encode()).hexdigest()
    agreed = _read_plan(file, identity)
    plan = engine.plan(questions, agreed)
    if agreed is None:
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        aside.write_text(
            json.dumps({"questions": identity, "batch_tokens": plan.batch_tokens}), encoding="utf-8"
        )
        try:
            os.link(aside, file)
        except FileExistsError:  # another process was faster
            plan = engine.plan(questions, _read_plan(file, identity))
        finally:
            aside.unlink()
    return plan


def _read_plan(file: Path, identity: str) -> int | None:
    """The tokens of a batch, as agreed; None where nothing is."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if found["questions"] != identity:
        raise GraceError(
            f"{file.parent} holds answers to other questions; remove it, or name another folder"
        )
    return int(found["batch_tokens"])
