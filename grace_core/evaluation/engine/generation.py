"""The engine that generates with transformers' models, on one device."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from grace_core.data.sharegpt4v import UnusableRecord
from grace_core.errors import GraceError
from grace_core.evaluation.engine.batches import Extent, batches
from grace_core.evaluation.engine.decoding import Decoder, EagerSteps, Row, Steps, decode
from grace_core.evaluation.engine.features import FeatureStore, Pixels, read_pixels
from grace_core.evaluation.engine.graphs import GraphSteps
from grace_core.evaluation.engine.interface import BatchPlan, Unanswered, outcome_of
from grace_core.evaluation.engine.key_values import KeyValues, bytes_per_token
from grace_core.evaluation.engine.prompts import (
    Prompt,
    PromptEncoder,
    distinct,
)
from grace_core.evaluation.items import Prediction, Question
from grace_core.models.families import Family
from grace_core.models.fused_forward import choose_forward
from grace_core.models.prompts import stop_ids
from grace_core.models.visual_inputs import VisualInputs

log = logging.getLogger(__name__)

_TOKENS = {"cuda": 65_536, "cpu": 4096}
"""Tokens of a batch at most, answers included: more makes no device faster."""

_SHARE = 0.3
"""Of the free memory, for the cache before its rows and columns are rounded up; the rest is for
that, and for what a pass over the prompts leaves about."""

_FEATURES = {"cuda": 4 << 30, "cpu": 1 << 30}
"""Bytes of picture features that are kept."""


@dataclass(frozen=True)
class _Prepared:
    questions: Sequence[Question]
    prompts: Mapping[str, Prompt | Exception]
    pixels: Mapping[str, Future[Pixels]]


class GenerationEngine:
    """Answers questions with one model, greedily, whatever its own generation settings say.

    A response ends with the turn (any token by which tokenizer or checkpoint end it) or at its
    kind's budget, and no earlier. Where several answers are declared, the last one counts, so
    nothing that a response says before its end settles it ("A at first glance. ... The answer is
    C."), and a rule that stops sooner would change what is read. Questions whose answer is
    complete cost nothing further: their rows leave the batch.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        tokenizer: Any,
        visual: VisualInputs,
        *,
        budgets: Mapping[str, int],
        batch_tokens: int | None = None,
        threads: int = 1,
        graphs: bool = True,
    ) -> None:
        """
        Args:
            model: on its device, loaded with `attention="cached"`.
            tokenizer: with a chat template.
            budgets: tokens of a response at most, at least 1, by kind of question.
            batch_tokens: of a batch at most, prompts and answers padded to the longest; None: what
                the device can make use of, at most a share of its free memory.
            threads: that decode and process pictures meanwhile.
            graphs: whether decoding may use CUDA graphs, on a GPU.
        """
        choose_forward(model, family, "auto")
        self._decoder = Decoder(model, family)
        self._tokenizer = tokenizer
        self._visual = visual
        self._encoder = PromptEncoder(tokenizer, visual)
        self._budgets = budgets
        self._batch_tokens = batch_tokens
        self._threads = threads
        on_gpu = model.device.type == "cuda"
        self._steps_type: type[EagerSteps | GraphSteps] = (
            GraphSteps if graphs and on_gpu else EagerSteps
        )
        self._planned = 0
        self._stop_ids = stop_ids(model, tokenizer)
        self._features = FeatureStore(model, family, visual, _FEATURES[model.device.type])
        self._prompts: dict[str, Prompt | Exception] = {}
        self._cache: KeyValues | None = None
        self._steps: Steps | None = None
        self._told = False

    def plan(self, questions: Sequence[Question], batch_tokens: int | None = None) -> BatchPlan:
        """Which questions are answered together; see `batches`."""
        with ThreadPoolExecutor(self._threads) as pool:
            for question in questions:
                pool.submit(self._measure, question)
        self._prompts = {question.id: self._encoded(question) for question in questions}
        extents = [self._extent(question) for question in questions]
        batch_tokens = batch_tokens or self._batch_tokens or self._fitting(extents)
        made = batches(extents, batch_tokens)
        self._planned = max(
            (
                self._places(len(batch), max(extents[i].tokens + extents[i].budget for i in batch))
                for batch in made
            ),
            default=0,
        )
        return BatchPlan([[questions[i] for i in batch] for batch in made], batch_tokens)

    def answer(self, plan: Iterable[Sequence[Question]]) -> Iterator[list[Prediction | Unanswered]]:
        """What came of each batch, one a question in its order.

        The next batch is asked for, and its pictures are made ready, while one is at work.
        """
        with ThreadPoolExecutor(self._threads, thread_name_prefix="pictures") as pool:
            waiting: _Prepared | None = None
            try:
                for questions in plan:
                    upcoming = self._prepare(questions, pool, waiting)
                    if waiting is not None:
                        yield self._answered(waiting)
                    waiting = upcoming
                if waiting is not None:
                    yield self._answered(waiting)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(
        self, questions: Sequence[Question], pool: ThreadPoolExecutor, before: _Prepared | None
    ) -> _Prepared:
        prompts = {question.id: self._prompt(question) for question in questions}
        asked = [q for q in questions if isinstance(prompts[q.id], Prompt)]
        underway = {} if before is None else before.pixels
        pixels = {
            picture.key: underway.get(picture.key)
            or pool.submit(read_pixels, picture, self._visual)
            for picture in distinct(p for question in asked for p in question.pictures)
            if picture.key not in self._features
        }
        return _Prepared(questions, prompts, pixels)

    def _answered(self, batch: _Prepared) -> list[Prediction | Unanswered]:
        found: dict[str, Prediction | Unanswered] = {}
        asked = []
        for question in batch.questions:
            prompt = batch.prompts[question.id]
            if isinstance(prompt, Prompt):
                asked.append(prompt)
            else:
                found[question.id] = outcome_of(question, prompt)
        for outcome in self._ask(asked, batch.pixels):
            found[outcome.item_id] = outcome
        return [found[question.id] for question in batch.questions]

    def _ask(
        self, prompts: Sequence[Prompt], pixels: Mapping[str, Future[Pixels]]
    ) -> Iterator[Prediction | Unanswered]:
        """What came of prompts; those that fail together are asked again in two halves."""
        if not prompts:
            return
        try:
            answers = self._generate(prompts, pixels)
        except Exception as error:
            if len(prompts) == 1:
                self._check_device(error)
                outcome = outcome_of(prompts[0].question, error)
                if isinstance(outcome, Unanswered):
                    log.warning("question %s could not be asked", outcome.item_id, exc_info=True)
                yield outcome
                return
            reason = f"{type(error).__name__}: {error}"
        else:
            for prompt, answer in zip(prompts, answers, strict=True):
                text = self._tokenizer.decode(answer, skip_special_tokens=True).strip()
                yield Prediction(prompt.question.id, text, tokens=len(answer))
            return
        # Out of the handler, so that the traceback no longer holds the tensors of what failed.
        if not self._told:
            self._told = True
            log.warning(
                "a batch of %d questions failed and is asked again in halves: %s",
                len(prompts),
                reason.splitlines()[0],
            )
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(prompts) // 2
        yield from self._ask(prompts[:half], pixels)
        yield from self._ask(prompts[half:], pixels)

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Prompt], pixels: Mapping[str, Future[Pixels]]
    ) -> list[list[int]]:
        pictures = distinct(p for prompt in prompts for p in prompt.question.pictures)
        ready = {p.key: pixels[p.key].result() for p in pictures if p.key in pixels}
        features = self._features.of(pictures, ready)
        rows = [
            Row(
                prompt.input_ids,
                self._encoder.positions(prompt),
                [
                    start + offset
                    for start, grid in zip(prompt.starts, prompt.grids, strict=True)
                    for offset in range(self._visual.tokens(grid))
                ],
                [features[picture.key] for picture in prompt.question.pictures],
                self._budgets[prompt.question.kind],
            )
            for prompt in prompts
        ]
        cache, steps = self._room(rows)
        return decode(self._decoder, steps, cache, rows, self._stop_ids)

    def _room(self, rows: Sequence[Row]) -> tuple[KeyValues, Steps]:
        """Cache and steps that hold these rows, made anew where the present ones are too small."""
        longest = max(len(row.input_ids) for row in rows) + max(row.budget for row in rows)
        needed = self._places(len(rows), longest)
        if self._cache is None or self._steps is None or self._cache.capacity < needed:
            self._cache = self._steps = None  # freed before the larger one is made
            model = self._decoder.model
            config = model.config.get_text_config()
            capacity = max(needed, self._planned)
            self._cache = KeyValues(config, capacity, model.dtype, model.device)
            self._steps = self._steps_type(self._decoder, self._cache)
        return self._cache, self._steps

    def _places(self, rows: int, tokens: int) -> int:
        """Tokens that the cache has room for when it holds so many rows of so many tokens."""
        return self._steps_type.rows(rows) * self._steps_type.columns(tokens)

    def _prompt(self, question: Question) -> Prompt | Exception:
        if question.id not in self._prompts:
            self._prompts[question.id] = self._encoded(question)
        return self._prompts[question.id]

    def _measure(self, question: Question) -> None:
        with suppress(Exception):  # met again when the question is encoded
            for picture in question.pictures:
                self._encoder.measure(picture)

    def _encoded(self, question: Question) -> Prompt | Exception:
        """The prompt, or what is wrong with the item itself.

        Raises whatever else goes wrong: without this prompt the batches would not be those that
        all processes and all runs share.
        """
        try:
            return self._encoder.encode(question)
        except (UnusableRecord, GraceError) as error:
            return error

    def _extent(self, question: Question) -> Extent:
        prompt, budget = self._prompts[question.id], self._budgets[question.kind]
        if not isinstance(prompt, Prompt):
            return Extent(1, budget, None)
        pictures = question.pictures
        return Extent(len(prompt), budget, pictures[0].key if pictures else None)

    def _fitting(self, extents: Sequence[Extent]) -> int:
        """Tokens of a batch."""
        model = self._decoder.model
        most = _TOKENS[model.device.type]
        if model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(model.device)
            token = bytes_per_token(model.config.get_text_config(), model.dtype)
            most = min(most, int(_SHARE * free) // token)
        # Batches of a short list stay small enough that several processes find work in it.
        total = sum(extent.tokens + extent.budget for extent in extents)
        return max(1, min(most, max(total // 8, most // 8)))

    def _check_device(self, error: Exception) -> None:
        """Raise the error of a GPU that has failed, and so would fail at all further items."""
        if self._decoder.device.type == "cuda":
            try:
                torch.cuda.synchronize(self._decoder.device)
            except RuntimeError:
                raise error from None
