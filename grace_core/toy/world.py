"""The toy world's files: a training set in ShareGPT4V's schema and the held-out toy benchmark.

Everything is a function of (split, seed, index): `random.Random` seeded with a string gives the
same stream on every platform, and pictures are rasterised without a drawing library.
"""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from grace_core.errors import GraceError
from grace_core.toy.conversations import Mixture, converse
from grace_core.toy.pictures import Scene, draw_scene, render
from grace_core.toy.questions import (
    FAMILIES,
    MAX_COUNT,
    Asked,
    Question,
    ask_choice,
    ask_yesno,
    form_prompt,
    think_of,
)
from grace_core.whole_files import write_whole

TRAIN_FILE = "train.json"
TRAIN_METADATA_FILE = "train.meta.json"
ITEMS_FILE = "items.jsonl"
CHOICE_BENCHMARK = "toy-choice"
YESNO_BENCHMARK = "toy-yesno"


class BenchmarkItem(TypedDict):
    """One line of `items.jsonl`; `image` is relative to the file's folder."""

    id: str
    kind: str
    question: str
    choices: dict[str, str] | None
    answer: str
    category: str
    image: str


def stream(split: str, seed: int, index: int) -> random.Random:
    """The random stream of one record: independent of every other (split, seed, index)."""
    return random.Random(f"grace-toy/{split}/{seed}/{index}")


def prompt_for(item: Mapping[str, Any]) -> str:
    """The prompt of a benchmark item, worded as in the training conversations.

    Args:
        item: mapping with `kind` ("mcq" or "yesno"), `question` and `choices`, as `BenchmarkItem`.
    """
    return form_prompt(item["kind"], item["question"], item.get("choices"))


def chance_level(items: Iterable[Mapping[str, Any]]) -> float:
    """Expected accuracy of guessing uniformly among an item's options, in [0, 1]."""
    shares = [1 / len(item["choices"]) if item["choices"] else 0.5 for item in items]
    return sum(shares) / len(shares)


def write_training_set(
    folder: Path,
    *,
    count: int,
    seed: int,
    wrong_answer_share: float = 0.12,
    turns: tuple[int, int] = (1, 3),
) -> Path:
    """Write `count` conversations: `train.json`, `images/*.png` and `train.meta.json`.

    Annotations of real data sets, ShareGPT4V's included, are not all right; `wrong_answer_share` of
    the turns here get a plausible wrong answer. Which ones, the metadata file says.

    Args:
        folder: made if need be; pictures of an older set in it are overwritten by number.
        count: number of records, one picture each, at least 1.
        seed: of the generator; the same seed gives the same files.
        wrong_answer_share: in [0, 1).
        turns: least and greatest number of turns a conversation has.

    Returns:
        The path of `train.json`, written last.

    Raises:
        GraceError: `count`, `turns` or the share is out of range.
    """
    if count < 1:
        raise GraceError(f"Toy training set: count is {count}; ask for at least 1 record.")
    if not 0.0 <= wrong_answer_share < 1.0:
        raise GraceError(
            f"Toy training set: wrong_answer_share is {wrong_answer_share}; it must be in [0, 1)."
        )
    if not 1 <= turns[0] <= turns[1]:
        raise GraceError(f"Toy training set: turns is {turns}; need 1 <= least <= greatest.")
    mixture = Mixture(turns=turns, wrong_answer_share=wrong_answer_share)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    wrong_turns: list[list[Any]] = []
    number_of_turns = 0
    for index in range(count):
        rng = stream("train", seed, index)
        scene = draw_scene(rng, held_out=False)
        record_id = f"toy-{seed}-{index:06d}"
        image = f"images/{index:06d}.png"
        _save_picture(scene, folder / image)
        conversations: list[dict[str, str]] = []
        for turn_index, turn in enumerate(converse(scene, mixture, rng)):
            prefix = "" if conversations else "<image>\n"
            conversations.append({"from": "human", "value": prefix + turn.prompt})
            conversations.append({"from": "gpt", "value": turn.answer})
            number_of_turns += 1
            if turn.wrong:
                wrong_turns.append([record_id, turn_index])
        records.append({"id": record_id, "image": image, "conversations": conversations})
    metadata = {
        "generator": "grace_core.toy.world.write_training_set",
        "seed": seed,
        "count": count,
        "turns": list(turns),
        "wrong_answer_share": wrong_answer_share,
        "number_of_turns": number_of_turns,
        "number_of_wrong_turns": len(wrong_turns),
        "wrong_turns": wrong_turns,
    }
    write_whole(folder / TRAIN_METADATA_FILE, json.dumps(metadata, indent=1))
    path = folder / TRAIN_FILE
    write_whole(path, json.dumps(records, indent=1))
    return path


def write_benchmark(
    folder: Path, *, seed: int, choice_count: int = 400, yesno_count: int = 200
) -> tuple[Path, Path]:
    """Write the held-out benchmark: `toy-choice` and `toy-yesno`, each with `items.jsonl`.

    Families take turns, right options stand at every letter equally often, half of each family's
    yes/no questions are true and the counts asked for run from 0 to 3 in turn. So guessing scores
    `chance_level`: 0.5 for `toy-yesno` and (5 * 0.25 + 0.5) / 6 = 0.2917 for `toy-choice`, where
    `larger` has two options and the other five families four.

    Returns:
        The folders `toy-choice` and `toy-yesno` inside `folder`.

    Raises:
        GraceError: a count is below 1.
    """
    if choice_count < 1 or yesno_count < 1:
        raise GraceError(
            f"Toy benchmark: choice_count is {choice_count} and yesno_count {yesno_count}; "
            "ask for at least 1 item of each."
        )
    return (
        _write_items(folder / CHOICE_BENCHMARK, "mcq", choice_count, seed),
        _write_items(folder / YESNO_BENCHMARK, "yesno", yesno_count, seed),
    )


def _write_items(folder: Path, kind: str, count: int, seed: int) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        scene, asked = benchmark_item(kind, seed, index)
        image = f"images/{index:06d}.png"
        _save_picture(scene, folder / image)
        item: BenchmarkItem = {
            "id": f"{folder.name}-{seed}-{index:06d}",
            "kind": kind,
            "question": asked.question,
            "choices": asked.choices,
            "answer": asked.answer,
            "category": asked.family,
            "image": image,
        }
        lines.append(json.dumps(item) + "\n")
    write_whole(folder / ITEMS_FILE, "".join(lines))
    return folder


def benchmark_item(kind: str, seed: int, index: int) -> tuple[Scene, Asked]:
    """The scene and question of item `index` of the benchmark of that kind ("mcq" or "yesno")."""
    family = list(FAMILIES)[index % len(FAMILIES)]
    turn = index // len(FAMILIES)
    rng = stream(f"held-out/{kind}", seed, index)
    while True:  # until a scene offers the question; a handful of draws at most
        with_word = True if family == "word" else None
        scene = draw_scene(rng, held_out=True, with_word=with_word)
        question = think_of(family, scene, rng)
        if question is not None and _balances(question, turn):
            break
    if kind == "mcq":
        return scene, ask_choice(question, rng, slot=turn)
    return scene, ask_yesno(question, rng, truth=turn % 2 == 0)


def _balances(question: Question, turn: int) -> bool:
    return question.family != "count" or question.answer == str(turn % (MAX_COUNT + 1))


def _save_picture(scene: Scene, path: Path) -> None:
    Image.fromarray(render(scene)).save(path, format="PNG")
