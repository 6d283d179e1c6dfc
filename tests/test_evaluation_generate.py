"""Generated answers: the same for every batch size, and those of a loop without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from grace_core.evaluation.generate import generate_answers
from grace_core.evaluation.items import Picture, Prediction, Question
from grace_core.models.loading import load_model, load_tokenizer, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from tests.tiny_models import FAMILIES, save_tiny

SIZES = [(64, 64), (96, 64), (64, 128), (128, 128), (40, 200)]


class Loaded:
    """A checkpoint with everything that generation needs, in fp32."""

    def __init__(self, folder: Path) -> None:
        checkpoint = read_checkpoint(folder)
        self.model = load_model(checkpoint, device="cpu", dtype=torch.float32)
        self.tokenizer = load_tokenizer(folder)
        self.visual_inputs = VisualInputs(checkpoint)

    def answers(self, items: list[Question], batch_size: int, **changes: Any) -> list[Prediction]:
        settings = {"max_new_tokens": 6, **changes}
        return generate_answers(
            self.model, self.tokenizer, self.visual_inputs, items, batch_size=batch_size, **settings
        )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively(family: str) -> Any:
    """A random model whose answers depend on what it is asked; small weights only echo."""
    build: Callable[..., Any] = FAMILIES[family]
    model = build(seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layers." in name:
                parameter.mul_(8.0)
    return model


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(save_tiny(lively(request.param), tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number in range(11):
        file = folder / f"{number}.png"
        generator = torch.Generator().manual_seed(number)
        width, height = SIZES[number % len(SIZES)]
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file)
        text = f"What is number {number}" + " and so on" * (number % 4) + "?"
        if number % 2:
            text += "\nA. red\nB. blue"
        made.append(Question(f"i{number}", "open", (Picture(file), text)))
    return made


def test_answers_do_not_depend_on_the_batch(loaded: Loaded, items: list[Question]) -> None:
    alone = loaded.answers(items, batch_size=1)
    together = loaded.answers(items, batch_size=7)
    assert [each.item_id for each in alone] == [item.id for item in items]
    assert all(each.error is None for each in alone)
    assert alone == together
    assert len({each.response for each in alone}) > 1, "a constant answer would prove nothing"


def test_answers_are_those_of_a_plain_greedy_loop(loaded: Loaded, items: list[Question]) -> None:
    found = {each.item_id: each.response for each in loaded.answers(items, batch_size=4)}
    for item in items[:4]:
        expected, complete = _greedy_loop(loaded, item, steps=6)
        assert expected or complete
        assert found[item.id].startswith(expected)
        assert found[item.id] == expected or not complete


@torch.no_grad()
def _greedy_loop(loaded: Loaded, item: Question, steps: int) -> tuple[str, bool]:
    """One item, no padding, no cache, the whole sequence anew for each token.

    Ends early, and says so, where the random model itself utters a picture placeholder: the whole
    sequence could not be put to it again.
    """
    tokenizer, visual = loaded.tokenizer, loaded.visual_inputs
    (picture,) = (each.open() for each in item.pictures)
    tensors = visual.processor(images=[picture], return_tensors="pt")
    if "image_grid_thw" in tensors:
        count = int(tensors["image_grid_thw"].prod()) // 4
    else:
        count = 16
    text = (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
        f"{item.content[1]}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(steps):
        types = {}
        if "image_grid_thw" in tensors:
            types = {"mm_token_type_ids": (ids == visual.image_token_id).int()}
        logits = loaded.model(input_ids=ids, use_cache=False, **tensors, **types).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] in (tokenizer.eos_token_id, visual.image_token_id):
            break
    text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    return str(text).strip(), int(ids[0, -1]) != visual.image_token_id


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(save_tiny(lively("qwen3_vl"), tmp_path_factory.mktemp("qwen")))


@pytest.mark.parametrize("named_by", ["tokenizer", "checkpoint"])
def test_a_response_ends_with_the_turn(
    qwen: Loaded, items: list[Question], named_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = qwen.model.generate
    produced: list[list[int]] = []

    def spy(**arguments: Any) -> torch.Tensor:
        output: torch.Tensor = generate(**arguments)
        produced.append(output[0, arguments["input_ids"].shape[1] :].tolist())
        return output

    monkeypatch.setattr(qwen.model, "generate", spy)
    qwen.answers(items[:1], batch_size=1)
    (whole,) = produced
    assert len(whole) == 6
    end = next(at for at in range(1, len(whole)) if whole.index(whole[at]) == at)
    usual = qwen.tokenizer.eos_token
    if named_by == "tokenizer":
        qwen.tokenizer.eos_token = qwen.tokenizer.convert_ids_to_tokens(whole[end])
        assert qwen.tokenizer.eos_token_id == whole[end]
    else:
        monkeypatch.setattr(qwen.model.generation_config, "eos_token_id", [whole[end]])
    try:
        qwen.answers(items[:1], batch_size=1)
    finally:
        qwen.tokenizer.eos_token = usual
    assert produced[1] == whole[: end + 1]


def test_generation_settings_of_the_checkpoint_do_not_matter(
    qwen: Loaded, items: list[Question]
) -> None:
    plain = qwen.answers(items[:4], batch_size=4)
    settings = qwen.model.generation_config
    settings.do_sample, settings.repetition_penalty, settings.temperature = True, 5.0, 9.0
    try:
        assert qwen.answers(items[:4], batch_size=4) == plain
    finally:
        settings.do_sample, settings.repetition_penalty, settings.temperature = False, None, None


def test_one_bad_item_costs_no_other_its_answer(
    qwen: Loaded, items: list[Question], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    bad = Question("bad", "yesno", (Picture(broken), "What?"))
    gone = Question("gone", "yesno", (Picture(tmp_path / "gone.png"), "What?"))
    sly = Question("sly", "yesno", (*items[0].pictures, "What <|image_pad|>?"))
    found = qwen.answers([bad, *items[:3], gone, sly], batch_size=8)
    errors = {each.item_id: each.error for each in found if each.error is not None}
    assert set(errors) == {"bad", "gone", "sly"}
    assert "none of the formats" in str(errors["bad"])
    assert "FileNotFoundError" in str(errors["gone"])
    assert "2 picture placeholders" in str(errors["sly"])
    assert found[1:4] == qwen.answers(items[:3], batch_size=8)


def test_a_failing_batch_is_asked_again_item_by_item(
    qwen: Loaded, items: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = qwen.answers(items[:5], batch_size=1)
    generate = qwen.model.generate

    def refuses_batches(**arguments: Any) -> torch.Tensor:
        if len(arguments["input_ids"]) > 1:
            raise RuntimeError("out of memory")
        return generate(**arguments)

    monkeypatch.setattr(qwen.model, "generate", refuses_batches)
    assert qwen.answers(items[:5], batch_size=5) == expected


def test_progress_reaches_the_end(qwen: Loaded, items: list[Question]) -> None:
    seen: list[tuple[int, int]] = []
    qwen.answers(items, batch_size=4, on_progress=lambda *counts: seen.append(counts))
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_no_items_no_answers(qwen: Loaded) -> None:
    assert qwen.answers([], batch_size=4) == []
