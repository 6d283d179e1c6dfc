"""Reading benchmark folders, and saying what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks.toy import TOY_CHOICE, TOY_YESNO
from grace_core.evaluation.declaration import Benchmark
from grace_core.evaluation.items import Item, Picture
from grace_core.evaluation.loading.place import Wanted, locate
from grace_core.evaluation.loading.rows import load_items
from grace_core.toy.world import write_benchmark

GOOD = {
    "id": "q1",
    "kind": "mcq",
    "question": "What colour is the circle?",
    "choices": {"A": "red", "B": "blue"},
    "answer": "B",
    "category": "colour",
    "image": "images/1.png",
}


def load(benchmark: Benchmark, path: Path, **options: Any) -> list[Item]:
    return load_items(benchmark, locate(benchmark, Wanted(path=path)), **options)


def write(folder: Path, *lines: object) -> Path:
    folder.mkdir()
    (folder / "images").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "images" / "1.png")
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "items.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder


def test_the_toy_benchmark_is_read(tmp_path: Path) -> None:
    choice, yesno = write_benchmark(tmp_path, seed=1, choice_count=6, yesno_count=6)
    first = load(TOY_CHOICE, choice)
    assert len(first) == 6
    question, gold = first[0].question, first[0].gold
    assert gold.choices is not None and set(gold.answers) <= set(gold.choices)
    picture, text = question.content
    assert isinstance(text, str) and "\nA. " in text
    assert isinstance(picture, Picture) and picture.open().mode == "RGB"
    second = load(TOY_YESNO, yesno)
    assert {answer for each in second for answer in each.gold.answers} <= {"Yes", "No"}
    assert all(each.gold.choices is None for each in second)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": "C"}, "none of the choices"),
        ({"kind": "yesno"}, "no choices"),
        ({"kind": "yesno", "choices": None, "answer": "yes"}, "Yes or No"),
        ({"choices": None}, "needs choices"),
        ({"choices": {"a": "red"}, "answer": "a"}, "single letters"),
        ({"kind": "open"}, "kind"),
        ({"image": "images/2.png"}, "does not exist"),
        ({"image": "../secret.png"}, "leads out of the root"),
        ({"image": "/etc/hostname"}, "is absolute"),
        ({"question": 3}, "column 'question' should hold text, but holds a whole number (3)"),
        ({"question": None}, "column 'question' should hold text, but is empty"),
    ],
)
def test_a_bad_item_is_named_with_its_line(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "bench", GOOD, "", {**GOOD, "id": "q2", **change})
    with pytest.raises(GraceError, match=r"items\.jsonl:3: ") as caught:
        load(TOY_CHOICE, folder)
    assert says in str(caught.value)


def test_all_unusable_rows_are_listed_at_once(tmp_path: Path) -> None:
    bad = {**GOOD, "answer": "C"}
    folder = write(tmp_path / "bench", bad, GOOD, {**GOOD, "image": "images/2.png"}, *[bad] * 20)
    with pytest.raises(GraceError) as caught:
        load(TOY_CHOICE, folder)
    text = str(caught.value)
    assert "items.jsonl:1: answer 'C'" in text
    assert "items.jsonl:3: column 'image' names a picture" in text
    assert text.count("items.jsonl:") == 10


@pytest.mark.parametrize(
    ("line", "says"), [("{not json", "not JSON"), ("[]", "not a JSON object"), ("{}", "'id'")]
)
def test_a_line_that_is_no_row_is_named(line: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(GraceError, match=r"items\.jsonl:2: ") as caught:
        load(TOY_CHOICE, write(tmp_path / "bench", GOOD, line))
    assert says in str(caught.value)


def test_a_missing_or_empty_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="does not exist"):
        load(TOY_CHOICE, tmp_path / "nowhere")
    with pytest.raises(GraceError, match=r"no file of \.parquet, \.tsv"):
        load(TOY_CHOICE, tmp_path)
    with pytest.raises(GraceError, match="holds no items"):
        load(TOY_CHOICE, write(tmp_path / "empty"))


def test_a_repeated_id_is_told_apart(tmp_path: Path) -> None:
    items = load(TOY_CHOICE, write(tmp_path / "bench", GOOD, GOOD, GOOD))
    assert [item.id for item in items] == ["q1", "q1#2", "q1#3"]
