"""How many questions a second the evaluation's engine answers, beside the usual loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from grace_core.bench.markdown import markdown_table
from grace_core.bench.questions import WORKLOADS, Workload, random_questions
from grace_core.bench.random_models import random_model, twin
from grace_core.bench.samples import folder_without_weights
from grace_core.bench.shapes import Shapes
from grace_core.evaluation.engine.generation import GenerationEngine
from grace_core.evaluation.engine.prompts import messages
from grace_core.evaluation.items import Prediction, Question
from grace_core.models.loading import expect_packed_rows, load_tokenizer
from grace_core.models.prompts import chat_text
from grace_core.models.visual_inputs import VisualInputs

GOALS = {"cuda": 20.0, "cpu": 3.0}
"""Questions a second over those of the plain loop."""

_COLUMNS = (
    "workload",
    "measured",
    "engine q/s",
    "one at a time q/s",
    "speed-up",
    "goal",
    "met",
    "same answers",
)
_TERMINAL = ("workload", "engine q/s", "one at a time q/s", "speed-up", "goal", "met")
"""Of these, those that a terminal is wide enough for."""


@dataclass(frozen=True)
class Rate:
    """Both ways of answering one workload."""

    workload: str
    title: str
    questions: int
    seconds: float
    plain_questions: int
    plain_seconds: float
    same: int
    """Of the plain loop's answers, those that the engine gave, too. In bf16 the last bits of logits
    depend on the batch, and those of random models lie close together."""

    goal: float
    batches: int

    @property
    def a_second(self) -> float:
        """Questions, of the engine."""
        return self.questions / self.seconds

    @property
    def plain_a_second(self) -> float:
        """Questions, of the loop."""
        return self.plain_questions / self.plain_seconds

    @property
    def speed_up(self) -> float:
        """How many times faster the engine is."""
        return self.a_second / self.plain_a_second


@dataclass
class EvaluationBench:
    """One model on one device, with random weights."""

    shapes: Shapes
    device: torch.device
    folder: Path
    """An empty one for small files."""

    dtype: torch.dtype = torch.bfloat16
    threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    _models: tuple[Any, Any] | None = None

    def rates(self, questions: int, plain_questions: int) -> Iterator[Rate]:
        """Each workload in turn.

        Args:
            questions: that the engine is asked, at least 1; for the longest answers a quarter.
            plain_questions: of these, that the loop is asked, too; likewise.
        """
        for workload in WORKLOADS:
            share = 4 if workload.kind == "open" else 1
            yield self._rate(workload, max(1, questions // share), max(1, plain_questions // share))

    @torch.inference_mode()
    def _rate(self, workload: Workload, count: int, plain_count: int) -> Rate:
        checkpoint = folder_without_weights(self.folder / workload.name, self.shapes, "student")
        tokenizer = load_tokenizer(checkpoint.path)
        visual = VisualInputs(checkpoint, max_pixels=self.shapes.picture_side**2)
        if self._models is None:
            torch.manual_seed(0)
            model = random_model(self.shapes, "student", self.device, dtype=self.dtype)
            plain = twin(model, self.shapes, "student")
            expect_packed_rows(model, checkpoint.family, "cached")
            for one in (model, plain):
                one.generation_config.eos_token_id = tokenizer.eos_token_id
            self._models = (model, plain)
        model, plain = self._models
        engine = GenerationEngine(
            model,
            checkpoint.family,
            tokenizer,
            visual,
            budgets={workload.kind: workload.answer_tokens},
            threads=self.threads,
        )
        warm = random_questions(workload, self.shapes, min(count, 32), seed=1)
        _answers(engine, warm)
        _alone(plain, tokenizer, visual, warm[:1], workload.answer_tokens)
        asked = random_questions(workload, self.shapes, count)
        self._wait()
        started = time.perf_counter()
        found, batches = _answers(engine, asked)
        self._wait()
        seconds = time.perf_counter() - started
        some = asked[:plain_count]
        started = time.perf_counter()
        alone = _alone(plain, tokenizer, visual, some, workload.answer_tokens)
        plain_seconds = time.perf_counter() - started
        return Rate(
            workload.name,
            workload.title,
            len(asked),
            seconds,
            len(some),
            plain_seconds,
            sum(found[question.id] == alone[question.id] for question in some),
            GOALS[self.device.type],
            batches,
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _answers(engine: GenerationEngine, questions: Sequence[Question]) -> tuple[dict[str, str], int]:
    """Responses by item, and in how many batches they were made."""
    plan = engine.plan(questions)
    responses = {}
    for outcome in (one for part in engine.answer(plan.batches) for one in part):
        assert isinstance(outcome, Prediction) and outcome.error is None, f"failed: {outcome}"
        responses[outcome.item_id] = outcome.response
    return responses, len(plan.batches)


def _alone(
    model: Any, tokenizer: Any, visual: VisualInputs, questions: Iterable[Question], budget: int
) -> dict[str, str]:
    """The usual loop: one question at a time through the library's `generate`."""
    said = {}
    for question in questions:
        pictures = [picture.open() for picture in question.pictures]
        text = chat_text(messages(question), tokenizer)
        placeholder = tokenizer.convert_ids_to_tokens(visual.image_token_id)
        _, count = visual.grid_and_tokens(pictures[0])
        text = text.replace(placeholder, placeholder * count)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            **visual.tensors(pictures),
            **visual.token_types(ids),
        }
        output = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=budget,
            do_sample=False,
        )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        said[question.id] = answer.strip()
    return said


@dataclass
class EvaluationTable:
    """Rates with what they were measured on."""

    shapes: str
    device: str
    environment: Mapping[str, str]
    rates: list[Rate] = field(default_factory=list)

    def to_json(self) -> str:
        """Everything, for programs."""
        derived = ("a_second", "plain_a_second", "speed_up")
        rates = [
            asdict(rate) | {name: getattr(rate, name) for name in derived} for rate in self.rates
        ]
        return json.dumps(asdict(self) | {"rates": rates}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """For documents."""
        return markdown_table(self._heading(), _COLUMNS, self._rows())

    def to_rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self._heading())
        for position, name in enumerate(_TERMINAL):
            table.add_column(name, justify="right" if position else "left")
        for row in self._rows():
            cells = dict(zip(_COLUMNS, row, strict=True))
            table.add_row(*(cells[name] for name in _TERMINAL))
        return table

    def _heading(self) -> str:
        versions = ", ".join(
            f"{name} {self.environment[name]}" for name in ("torch", "transformers")
        )
        return f"questions answered on {self.device}, {self.shapes} shapes, {versions}"

    def _rows(self) -> Iterable[tuple[str, ...]]:
        for rate in self.rates:
            yield (
                rate.workload,
                rate.title,
                f"{rate.a_second:.4g}",
                f"{rate.plain_a_second:.4g}",
                f"{rate.speed_up:.1f}",
                f"{rate.goal:g}",
                "yes" if rate.speed_up >= rate.goal else "no",
                f"{rate.same} of {rate.plain_questions}",
            )
