"""The toy world: determinism, schema, balance, held-out pictures, answers that fit the scene."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grace_core.errors import GraceError
from grace_core.toy.conversations import Mixture, converse
from grace_core.toy.lettering import WORDS, word_mask
from grace_core.toy.pictures import COLOURS, PLACES, SIZE, draw_scene, render
from grace_core.toy.questions import FAMILIES, LETTERS, ask_choice, ask_yesno, think_of
from grace_core.toy.world import (
    benchmark_item,
    chance_level,
    prompt_for,
    stream,
    write_benchmark,
    write_training_set,
)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _items(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def test_same_seed_same_bytes_other_seed_other_pictures(tmp_path: Path) -> None:
    write_training_set(tmp_path / "a", count=12, seed=3)
    write_training_set(tmp_path / "b", count=12, seed=3)
    write_training_set(tmp_path / "c", count=12, seed=4)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    pictures = [
        {d for name, d in _digests(tmp_path / x).items() if name.endswith(".png")} for x in "ac"
    ]
    assert not pictures[0] & pictures[1]


def test_a_longer_training_set_begins_with_the_shorter_one(tmp_path: Path) -> None:
    short = json.loads(write_training_set(tmp_path / "a", count=5, seed=3).read_text())
    long = json.loads(write_training_set(tmp_path / "b", count=9, seed=3).read_text())
    assert long[:5] == short


def test_training_records_follow_sharegpt4v(tmp_path: Path) -> None:
    path = write_training_set(tmp_path, count=40, seed=1, turns=(2, 4))
    records = json.loads(path.read_text())
    assert len({record["id"] for record in records}) == 40
    for record in records:
        assert set(record) == {"id", "image", "conversations"}
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        values = [turn["value"] for turn in record["conversations"]]
        assert values[0].startswith("<image>\n")
        assert sum(value.count("<image>") for value in values) == 1
        assert all(values)
        with Image.open(tmp_path / record["image"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))


def test_wrong_answers_are_as_many_as_recorded(tmp_path: Path) -> None:
    noisy = json.loads(
        write_training_set(tmp_path / "n", count=400, seed=5, wrong_answer_share=0.25).read_text()
    )
    metadata = json.loads((tmp_path / "n" / "train.meta.json").read_text())
    assert metadata["number_of_wrong_turns"] == len(metadata["wrong_turns"])
    assert metadata["number_of_turns"] == sum(len(r["conversations"]) // 2 for r in noisy)
    share = metadata["number_of_wrong_turns"] / metadata["number_of_turns"]
    assert abs(share - 0.25) < 0.06
    write_training_set(tmp_path / "c", count=400, seed=5, wrong_answer_share=0.0)
    assert json.loads((tmp_path / "c" / "train.meta.json").read_text())["wrong_turns"] == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"count": 0}, "count"),
        ({"count": 1, "wrong_answer_share": 1.0}, "wrong_answer_share"),
        ({"count": 1, "turns": (0, 2)}, "turns"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict, named: str) -> None:
    with pytest.raises(GraceError, match=named):
        write_training_set(tmp_path, seed=0, **arguments)


def test_benchmark_is_balanced_and_chance_is_known(tmp_path: Path) -> None:
    choice, yesno = write_benchmark(tmp_path, seed=11, choice_count=240, yesno_count=120)
    items = _items(choice)
    assert Counter(item["category"] for item in items) == dict.fromkeys(FAMILIES, 40)
    for family in FAMILIES:
        answers = Counter(item["answer"] for item in items if item["category"] == family)
        options = 2 if family == "larger" else 4
        assert answers == dict.fromkeys(LETTERS[:options], 40 // options)
    assert chance_level(items) == pytest.approx((5 * 0.25 + 0.5) / 6)
    items = _items(yesno)
    for family in FAMILIES:
        answers = Counter(item["answer"] for item in items if item["category"] == family)
        assert answers == {"Yes": 10, "No": 10}
    assert chance_level(items) == 0.5


def test_benchmark_items_have_the_declared_fields(tmp_path: Path) -> None:
    for folder in write_benchmark(tmp_path, seed=11, choice_count=12, yesno_count=12):
        for item in _items(folder):
            assert set(item) == {
                *("id", "kind", "question", "choices", "answer", "category", "image")
            }
            assert (folder / item["image"]).is_file()
            prompt = prompt_for(item)
            assert prompt.startswith(item["question"] + "\n")
            if item["kind"] == "mcq":
                assert item["answer"] in item["choices"]
                assert len(set(item["choices"].values())) == len(item["choices"])
                assert prompt.endswith("\nAnswer with the letter.")
                assert all(f"\n{k}. {v}\n" in prompt for k, v in item["choices"].items())
            else:
                assert item["choices"] is None
                assert prompt.endswith("\nAnswer yes or no.")


def test_no_held_out_picture_is_in_a_training_set(tmp_path: Path) -> None:
    write_training_set(tmp_path / "train", count=300, seed=11)
    write_benchmark(tmp_path / "bench", seed=11, choice_count=120, yesno_count=60)

    def pictures(folder: Path) -> set[bytes]:
        return {
            hashlib.sha256(np.asarray(Image.open(path)).tobytes()).digest()
            for path in folder.rglob("*.png")
        }

    assert not pictures(tmp_path / "train") & pictures(tmp_path / "bench")
    # Not by luck: the ground's red channel, seen in the corner, differs in parity.
    for index in range(300):
        training = render(draw_scene(stream("train", 1, index), held_out=False))
        held_out = render(draw_scene(stream("train", 1, index), held_out=True))
        assert training[0, 0, 0] % 2 == 1
        assert held_out[0, 0, 0] % 2 == 0


def _seen(scene_pixels: np.ndarray, place: int) -> str | None:
    """The colour that stands out most in a quarter, by nearest palette colour; None if empty."""
    half = SIZE // 2
    y, x = divmod(place, 2)
    quarter = scene_pixels[y * half : (y + 1) * half, x * half : (x + 1) * half].reshape(-1, 3)
    ground = scene_pixels[0, 0]
    drawn = quarter[(quarter != ground).any(axis=1)].astype(int)
    if len(drawn) < 12:
        return None
    mean = drawn.mean(axis=0)
    return min(COLOURS, key=lambda name: float(((np.array(COLOURS[name]) - mean) ** 2).sum()))


def test_pictures_show_what_the_scene_says() -> None:
    for index in range(200):
        scene = draw_scene(stream("test", 0, index), held_out=False, with_word=False)
        pixels = render(scene)
        seen = {place: _seen(pixels, place) for place in range(4)}
        expected = {shape.place: shape.colour for shape in scene.shapes}
        assert {place: colour for place, colour in seen.items() if colour} == expected


def test_large_shapes_cover_more_than_small_ones_of_their_kind() -> None:
    areas: dict[tuple[str, bool], list[int]] = {}
    for index in range(300):
        scene = draw_scene(stream("area", 0, index), held_out=False, with_word=False)
        if len(scene.shapes) == 1:
            pixels = render(scene)
            area = int((pixels != pixels[0, 0]).any(axis=2).sum())
            areas.setdefault((scene.shapes[0].kind, scene.shapes[0].large), []).append(area)
    for kind in {kind for kind, _ in areas}:
        assert min(areas[kind, True]) > max(areas[kind, False])


def test_words_are_legible_and_distinct() -> None:
    masks = {word: word_mask(word) for word in WORDS}
    assert all(mask.shape == (14, 12 * len(word) - 2) for word, mask in masks.items())
    assert len({mask.tobytes() for mask in masks.values()}) == len(WORDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_hold_and_wrong_ones_do_not(family: str) -> None:
    """Check each family's answer against the scene by an independent reading of the question."""
    asked = 0
    for index in range(150):
        rng = stream("answers", 0, index)
        scene = draw_scene(rng, held_out=False, with_word=True if family == "word" else None)
        question = think_of(family, scene, rng)
        if question is None:
            continue
        asked += 1
        candidates = (question.answer, *question.wrong)
        holds = [_holds(family, question.free, candidate, scene) for candidate in candidates]
        assert holds == [True] + [False] * len(question.wrong)
    assert asked > 20


def _holds(family: str, text: str, candidate: str, scene) -> bool:  # type: ignore[no-untyped-def]
    shapes = scene.shapes
    words = text.rstrip("?").split()
    if family == "colour":
        return any(s.kind == words[-1] and s.colour == candidate for s in shapes)
    if family == "count":
        subject = text.removeprefix("How many ").removesuffix(" are there?")
        singular = "cross" if subject == "crosses" else subject.removesuffix("s")
        number = sum(
            singular in (s.kind, "shape") or singular == f"{s.colour} shape" for s in shapes
        )
        return candidate == str(number)
    if family == "exists":
        return any(f"{s.colour} {s.kind}" == candidate for s in shapes)
    if family == "where":
        return any(s.name == " ".join(words[-2:]) and PLACES[s.place] == candidate for s in shapes)
    if family == "larger":
        return next(s for s in shapes if s.name == candidate).large
    return scene.word is not None and scene.word.text == candidate


def test_choice_slots_and_yesno_truths_are_as_asked() -> None:
    rng = random.Random(0)
    scene = draw_scene(rng, held_out=False)
    question = think_of("exists", scene, rng)
    assert question is not None
    for slot in range(4):
        asked = ask_choice(question, rng, slot=slot)
        assert asked.answer == LETTERS[slot]
        assert asked.choices is not None and asked.choices[asked.answer] == question.answer
    assert ask_yesno(question, rng, truth=True).answer == "Yes"
    assert ask_yesno(question, rng, truth=False).answer == "No"


def test_mixture_forms_come_in_their_shares() -> None:
    mixture = Mixture(forms={"free": 0.5, "mcq": 0.5}, turns=(2, 2))
    prompts = []
    for index in range(300):
        rng = stream("shares", 0, index)
        prompts += [t.prompt for t in converse(draw_scene(rng, held_out=False), mixture, rng)]
    share = sum(prompt.endswith("Answer with the letter.") for prompt in prompts) / len(prompts)
    assert abs(share - 0.5) < 0.1


def test_benchmark_item_is_a_function_of_its_index() -> None:
    first, second = benchmark_item("mcq", 1, 5), benchmark_item("mcq", 1, 5)
    assert first == second
    assert benchmark_item("mcq", 2, 5)[0] != first[0]
