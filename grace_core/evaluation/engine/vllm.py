"""The engine that leaves generation to vLLM, where that is installed, for released checkpoints.

vLLM batches, pages its cache and captures graphs by itself; what is cut into batches here is only
recorded at once. It has kernels of its own: answers may differ from those of `generation`
where two tokens are about equally likely. What is called is described in vLLM's documentation,
"Offline inference" and "Multimodal inputs" (docs.vllm.ai).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.engine.interface import (
    BatchPlan,
    Unanswered,
    item_error,
    outcome_of,
)
from grace_core.evaluation.engine.prompts import chat_tokens
from grace_core.evaluation.items import Prediction, Question

_QUESTIONS = 256
"""Recorded at once; vLLM holds fewer than that in flight."""


def load_vllm(checkpoint: Path, pictures: int) -> Any:
    """A `vllm.LLM` of a release's folder, for questions of so many pictures at most.

    Raises GraceError where vLLM is not installed.
    """
    return _vllm().LLM(
        model=str(checkpoint),
        dtype="bfloat16",
        seed=0,
        trust_remote_code=False,
        limit_mm_per_prompt={"image": max(1, pictures)},
    )


class VllmEngine:
    """Answers questions with one checkpoint through `vllm.LLM.generate`, greedily."""

    def __init__(self, model: Any, tokenizer: Any, *, budgets: Mapping[str, int]) -> None:
        """
        Args:
            model: from `load_vllm`.
            tokenizer: with a chat template.
            budgets: tokens of a response at most, by kind of question.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._budgets = budgets

    def plan(self, questions: Sequence[Question], batch_tokens: int | None = None) -> BatchPlan:
        """Questions in their order, a number of them at a time; `batch_tokens` is that number."""
        size = batch_tokens or _QUESTIONS
        parts = [list(questions[at : at + size]) for at in range(0, len(questions), size)]
        return BatchPlan(parts, size)

    def answer(self, plan: Iterable[Sequence[Question]]) -> Iterator[list[Prediction | Unanswered]]:
        """See `Engine.answer`."""
        for questions in plan:
            yield self._answered(questions)

    def _answered(self, questions: Sequence[Question]) -> list[Prediction | Unanswered]:
        found: dict[str, Prediction | Unanswered] = {}
        asked: list[Question] = []
        prompts: list[dict[str, Any]] = []
        for question in questions:
            try:
                prompts.append(self._prompt(question))
                asked.append(question)
            except Exception as error:  # kept: the item's own, or the run ends with it
                found[question.id] = outcome_of(question, error)
        for prediction in self._ask(asked, prompts):
            found[prediction.item_id] = prediction
        return [found[question.id] for question in questions]

    def _ask(
        self, questions: Sequence[Question], prompts: Sequence[dict[str, Any]]
    ) -> Iterator[Prediction]:
        """Predictions of prompts; those that are refused together are put again one by one."""
        if not questions:
            return
        parameters = _vllm().SamplingParams
        settings = [
            parameters(temperature=0.0, max_tokens=self._budgets[question.kind])
            for question in questions
        ]
        try:
            outputs = self._model.generate(list(prompts), settings, use_tqdm=False)
        except ValueError as error:  # vLLM's answer to a prompt that is too long for the model
            if len(questions) == 1:
                yield item_error(questions[0], error)
                return
            for question, prompt in zip(questions, prompts, strict=True):
                yield from self._ask([question], [prompt])
            return
        for question, output in zip(questions, outputs, strict=True):
            (answer,) = output.outputs
            ended = answer.finish_reason == "stop"  # by a token that is no part of the answer
            tokens = len(answer.token_ids) - ended
            yield Prediction(question.id, answer.text.strip(), tokens=tokens)

    def _prompt(self, question: Question) -> dict[str, Any]:
        # Ids, so that no second beginning is put before a template's own. One placeholder stands
        # for a picture; vLLM repeats it.
        prompt: dict[str, Any] = {"prompt_token_ids": chat_tokens(question, self._tokenizer)}
        pictures = [picture.open() for picture in question.pictures]
        if pictures:
            prompt["multi_modal_data"] = {"image": pictures}
        return prompt


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise GraceError(
            f"evaluation.engine is vllm, which cannot be imported ({error}); install it in this "
            "environment, or set the engine to transformers"
        ) from error
