"""Asking a model the questions of a benchmark, many at a time.

Answers do not depend on the batch: prompts are padded on the left, masked, and decoded greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from grace_core.errors import GraceError
from grace_core.evaluation.items import Picture, Prediction, Question
from grace_core.models.visual_inputs import VisualInputs


@dataclass(frozen=True)
class _Prompt:
    question: Question
    input_ids: list[int]


def generate_answers(
    model: Any,
    tokenizer: Any,
    visual_inputs: VisualInputs,
    questions: Sequence[Question],
    *,
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """One prediction an item, in the order of `questions`.

    Items of similar length are answered together, the longest first, so that a batch that does not
    fit in memory shows at once. Generation is greedy, whatever the checkpoint's own generation
    settings say, and stops at the end of the turn.

    An exception on an item becomes its `error`; a batch that fails is asked again item by item, so
    that one bad item costs no other its answer.

    Args:
        model: on its device, in evaluation mode, with an attention that knows padding (`sdpa`).
        tokenizer: with a chat template.
        batch_size: items answered at once, at least 1.
        max_new_tokens: tokens of a response at most.
        on_progress: called with (items done, items in all) after each batch.
    """
    found: dict[str, Prediction] = {}
    prompts: list[_Prompt] = []
    for question in questions:
        try:
            prompts.append(_Prompt(question, _encode(question, tokenizer, visual_inputs)))
        except Exception as error:
            found[question.id] = _failed(question, error)
    prompts.sort(key=lambda prompt: len(prompt.input_ids), reverse=True)
    settings = _greedy(model, tokenizer, max_new_tokens)
    for batch in _batches(prompts, batch_size):
        for prediction in _ask(model, tokenizer, visual_inputs, batch, settings):
            found[prediction.item_id] = prediction
        if on_progress is not None:
            on_progress(len(found), len(questions))
    return [found[question.id] for question in questions]


def _encode(question: Question, tokenizer: Any, visual_inputs: VisualInputs) -> list[int]:
    """Token ids of the chat with each picture's placeholder expanded to one token each patch."""
    content = [
        {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part}
        for part in question.content
    ]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    begins_itself = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not begins_itself)["input_ids"]
    placeholder = visual_inputs.image_token_id
    pictures = question.pictures
    if ids.count(placeholder) != len(pictures):
        raise GraceError(
            f"the prompt of item {question.id} holds {ids.count(placeholder)} picture placeholders "
            f"instead of {len(pictures)}; remove the placeholder from the question's text"
        )
    waiting = iter(pictures)
    expanded: list[int] = []
    for token in ids:
        count = 1
        if token == placeholder:
            _, count = visual_inputs.grid_and_tokens(next(waiting).open())
        expanded += [token] * count
    return expanded


def _ask(
    model: Any,
    tokenizer: Any,
    visual_inputs: VisualInputs,
    batch: Sequence[_Prompt],
    settings: GenerationConfig,
) -> Iterator[Prediction]:
    try:
        responses = _respond(model, tokenizer, visual_inputs, batch, settings)
    except Exception as error:
        if len(batch) == 1:
            yield _failed(batch[0].question, error)
            return
        for prompt in batch:
            yield from _ask(model, tokenizer, visual_inputs, [prompt], settings)
        return
    for prompt, response in zip(batch, responses, strict=True):
        yield Prediction(prompt.question.id, response)


def _respond(
    model: Any,
    tokenizer: Any,
    visual_inputs: VisualInputs,
    batch: Sequence[_Prompt],
    settings: GenerationConfig,
) -> list[str]:
    """Responses to a batch, without control tokens and surrounding blanks."""
    longest = max(len(prompt.input_ids) for prompt in batch)
    input_ids = torch.full((len(batch), longest), settings.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(batch):
        start = longest - len(prompt.input_ids)
        input_ids[row, start:] = torch.tensor(prompt.input_ids)
        attention_mask[row, start:] = 1
    pictures = [picture.open() for prompt in batch for picture in prompt.question.pictures]
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        **(visual_inputs.tensors(pictures) if pictures else {}),
        **visual_inputs.token_types(input_ids),
    }
    output = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        generation_config=settings,
    )
    responses = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [response.strip() for response in responses]


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding; what is left unset here, the checkpoint's own settings would fill in."""
    stop = model.generation_config.eos_token_id
    stop_ids = set(stop if isinstance(stop, list) else [stop]) | {tokenizer.eos_token_id}
    stop_ids.discard(None)
    if not stop_ids:
        raise GraceError(
            "neither the tokenizer nor generation_config.json names an end-of-turn token; set "
            "eos_token in tokenizer_config.json"
        )
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(stop_ids),
        pad_token_id=min(stop_ids) if pad is None else pad,
    )


def _batches(prompts: Sequence[_Prompt], size: int) -> Iterator[Sequence[_Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _failed(question: Question, error: Exception) -> Prediction:
    return Prediction(question.id, "", f"{type(error).__name__}: {error}")
