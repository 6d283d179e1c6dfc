"""The engine over vLLM, against a stand-in for the part of its API that is used.

It takes what vLLM's documentation says that `LLM` and `SamplingParams` take; vLLM itself is not
run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grace_core.errors import GraceError
from grace_core.evaluation.engine.interface import Unanswered
from grace_core.evaluation.engine.run import ask_all
from grace_core.evaluation.engine.vllm import VllmEngine, load_vllm
from grace_core.evaluation.items import Picture, Prediction, Question
from grace_core.toy.tokenizer import shared_tokenizer
from tests.engine_models import picture

BUDGETS = {"mcq": 4, "yesno": 5, "open": 60}


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int


class StandIn:
    """`LLM`: answers with the number of pictures and what it may say; refuses long prompts."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.calls: list[int] = []

    def generate(
        self, prompts: list[dict[str, Any]], sampling: list[SamplingParams], *, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        assert not use_tqdm and len(prompts) == len(sampling)
        self.calls.append(len(prompts))
        if any(len(prompt["prompt_token_ids"]) > 500 for prompt in prompts):
            raise ValueError("The decoder prompt is longer than the maximum model length")
        found = []
        for prompt, settings in zip(prompts, sampling, strict=True):
            assert settings.temperature == 0.0
            pictures = prompt.get("multi_modal_data", {"image": []})["image"]
            chat = shared_tokenizer().decode(prompt["prompt_token_ids"])
            assert chat.count("<|image_pad|>") == len(pictures)
            assert all(one.mode == "RGB" for one in pictures)
            assert chat.endswith("<|im_start|>assistant\n")
            text = f" {len(pictures)} pictures, {settings.max_tokens} tokens\n"
            ended = settings.max_tokens > 4
            made = SimpleNamespace(
                text=text,
                token_ids=[1] * 4 + [2] * ended,  # with the token that ended it
                finish_reason="stop" if ended else "length",
            )
            found.append(SimpleNamespace(outputs=[made]))
        return found


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    module = ModuleType("vllm")
    module.LLM = StandIn  # type: ignore[attr-defined]
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return VllmEngine(load_vllm(Path("release"), 2), shared_tokenizer(), budgets=BUDGETS)


def test_questions_reach_the_model_and_answers_come_back(
    engine: VllmEngine, tmp_path: Path
) -> None:
    asked = [
        Question("none", "open", ("Why?",)),
        Question("one", "mcq", (picture(0), "Which?")),
        Question("two", "yesno", ("Are ", picture(0), " and ", picture(1), " alike?")),
    ]
    found = ask_all(engine, asked, tmp_path)
    assert [(one.item_id, one.response, one.error, one.tokens) for one in found] == [
        ("none", "0 pictures, 60 tokens", None, 4),
        ("one", "1 pictures, 4 tokens", None, 4),
        ("two", "2 pictures, 5 tokens", None, 4),
    ]
    arguments = engine._model.arguments
    assert arguments["model"] == "release"
    assert arguments["limit_mm_per_prompt"] == {"image": 2}
    assert arguments["trust_remote_code"] is False


def test_one_bad_item_costs_no_other_its_answer(engine: VllmEngine) -> None:
    asked = [
        Question("broken", "mcq", (Picture(b"no picture"), "Which?")),
        Question("long", "mcq", ("Why " * 400,)),
        Question("good", "mcq", (picture(0), "Which?")),
    ]
    (found,) = engine.answer(engine.plan(asked).batches)
    assert [one.item_id for one in found] == ["broken", "long", "good"]
    assert "none of the formats" in str(found[0].error)
    assert "longer than the maximum" in str(found[1].error)
    assert found[2].error is None
    assert engine._model.calls == [2, 1, 1]


def test_a_picture_that_cannot_be_read_now_is_asked_again(
    engine: VllmEngine, tmp_path: Path
) -> None:
    asked = [
        Question("gone", "mcq", (Picture(tmp_path / "gone.png"), "Which?")),
        Question("good", "mcq", (picture(0), "Which?")),
    ]
    (found,) = engine.answer(engine.plan(asked).batches)
    assert isinstance(found[0], Unanswered) and "FileNotFoundError" in found[0].reason
    assert isinstance(found[1], Prediction) and found[1].error is None


def test_without_vllm_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(GraceError, match="set the engine to transformers"):
        load_vllm(Path("release"), 1)
