"""Tiny models and questions for the tests of the generation engine."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from grace_core.evaluation.engine.generation import GenerationEngine
from grace_core.evaluation.items import Picture, Prediction, Question
from grace_core.models.loading import load_model, load_tokenizer, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from tests.tiny_models import FAMILIES

BUDGETS = {"mcq": 6, "yesno": 6, "open": 14}
SIZES = [(64, 64), (96, 64), (64, 128), (128, 128), (40, 200)]


def lively(family: str) -> Any:
    """A random model whose answers depend on what it is asked; small weights only echo."""
    build: Callable[..., Any] = FAMILIES[family]
    model = build(seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layers." in name:
                parameter.mul_(8.0)
    return model


class Loaded:
    """A checkpoint with everything that generation needs; fp32 on the CPU unless said otherwise."""

    def __init__(
        self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        checkpoint = read_checkpoint(folder)
        self.family = checkpoint.family
        self.model = load_model(checkpoint, device=device, dtype=dtype, attention="cached")
        self.plain = load_model(checkpoint, device=device, dtype=dtype)
        self.tokenizer = load_tokenizer(folder)
        self.visual = VisualInputs(checkpoint)

    def engine(self, **changes: Any) -> GenerationEngine:
        settings = {"budgets": BUDGETS, **changes}
        return GenerationEngine(self.model, self.family, self.tokenizer, self.visual, **settings)

    def answers(
        self, questions: list[Question], batch_tokens: int | None = None, **changes: Any
    ) -> list[Prediction]:
        """In the order of the questions."""
        engine = self.engine(**changes)
        plan = engine.plan(questions, batch_tokens)
        found = {one.item_id: one for part in engine.answer(plan.batches) for one in part}
        assert len(found) == len(questions)
        return [found[question.id] for question in questions]

    def alone(self, question: Question, budget: int) -> str:
        """The answer of the library's own `generate` to one question, by itself."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in question.content
        ]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pictures = [picture.open() for picture in question.pictures]
        for picture in pictures:
            _, count = self.visual.grid_and_tokens(picture)
            text = text.replace("<|image_pad|>", "<|repeated|>" * count, 1)
        text = text.replace("<|repeated|>", "<|image_pad|>")
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        arguments = {**self.visual.token_types(ids), "attention_mask": torch.ones_like(ids)}
        if pictures:
            arguments |= self.visual.tensors(pictures)
        device = self.plain.device
        output = self.plain.generate(
            input_ids=ids.to(device),
            max_new_tokens=budget,
            do_sample=False,
            **{name: value.to(device) for name, value in arguments.items()},
        )
        answer: str = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return answer.strip()


def picture(number: int) -> Picture:
    """Noise of one of several sizes."""
    generator = torch.Generator().manual_seed(number)
    width, height = SIZES[number % len(SIZES)]
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, "png")
    return Picture(stream.getvalue())


def questions(count: int) -> list[Question]:
    """One picture, two or none; text before, between and after; pictures shared; three kinds."""
    made = []
    for number in range(count):
        first, second = picture(number % 4), picture((number + 1) % 4)
        asked = f"What is number {number}" + " and so on" * (number % 4) + "?"
        content: tuple[str | Picture, ...] = (first, asked)
        if number % 5 == 3:
            content = ("Look at ", first, " and ", second, asked)
        elif number % 5 == 4:
            content = (asked,)
        kind = ("mcq", "yesno", "open")[number % 3]
        made.append(Question(f"q{number}", kind, content))  # type: ignore[arg-type]
    return made
