"""Files of rows and responses: what is read of them, and how mistakes in them are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import BENCHMARKS, find_benchmark
from grace_core.evaluation.items import Prediction
from grace_core.evaluation.recorded import read_items, read_responses
from grace_core.evaluation.score import score

MMSTAR = BENCHMARKS["mmstar"]
ROW = {"index": 7, "answer": "A", "category": "math", "l2_category": "geometry"}


def jsonl(file: Path, *lines: object) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return file


def test_rows_need_only_what_scoring_needs(tmp_path: Path) -> None:
    read = read_items(MMSTAR, jsonl(tmp_path / "items.jsonl", ROW, "", {**ROW, "index": "8"}))
    assert [gold.id for gold in read.golds] == ["7", "8"]
    assert read.golds[0].answers == ("A",)
    assert read.golds[0].fields == {"category": "math", "l2_category": "geometry"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ({**ROW, "answer": "E"}, "answer 'E' is none of the choices A, B, C, D"),
        ({**ROW, "answer": 1}, "column 'answer'"),
        ({**ROW, "index": None}, "column 'index'"),
        (
            {key: ROW[key] for key in ROW if key != "category"},
            "column 'category', which should hold text, is missing",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, line: object, says: str) -> None:
    file = jsonl(tmp_path / "items.jsonl", ROW, "", line)
    with pytest.raises(GraceError) as caught:
        read_items(MMSTAR, file)
    assert f"{file}:3: " in str(caught.value)
    assert says in str(caught.value)


def test_a_file_of_another_kind_does_not_flood(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "items.jsonl", *[{"id": str(n), "response": "A"} for n in range(1000)])
    with pytest.raises(GraceError, match="and 980 more") as caught:
        read_items(MMSTAR, file)
    assert len(str(caught.value).splitlines()) < 30


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="cannot be read"):
        read_items(MMSTAR, tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GraceError, match="no UTF-8"):
        read_responses(tmp_path / "binary")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(GraceError, match="holds no item of MMStar"):
        read_items(MMSTAR, tmp_path / "empty")
    assert read_responses(tmp_path / "empty") == []


def test_responses(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "responses.jsonl",
        {"id": "a", "response": "yes\u2028no"},
        {"id": 2, "response": ""},
        {"id": "c", "response": None},
        {"id": "d", "response": "", "error": "OSError: gone", "tokens": 3},
    )
    assert read_responses(file) == [
        Prediction("a", "yes\u2028no"),
        Prediction("2", ""),
        Prediction("d", "", "OSError: gone"),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"id": "a", "response": "B"}, "id 'a' stands in line 1 already"),
        ({"response": "B"}, "id None"),
        ({"id": True, "response": "B"}, "id True"),
        ({"id": "b"}, "response None"),
        ({"id": "b", "response": 3}, "response 3"),
        ({"id": "b", "response": "B", "error": 1}, "error 1"),
        ("oops", "not JSON"),
    ],
)
def test_a_bad_response_is_named_with_its_line(tmp_path: Path, line: object, says: str) -> None:
    file = jsonl(tmp_path / "responses.jsonl", {"id": "a", "response": "A"}, line)
    with pytest.raises(GraceError) as caught:
        read_responses(file)
    assert f"{file}:2: " in str(caught.value)
    assert says in str(caught.value)


def test_null_is_missing_and_empty_is_unreadable(tmp_path: Path) -> None:
    items = jsonl(tmp_path / "items.jsonl", *[{**ROW, "index": n} for n in range(3)])
    said = [{"id": 0, "response": "A"}, {"id": 1, "response": ""}, {"id": 2, "response": None}]
    responses = read_responses(jsonl(tmp_path / "responses.jsonl", *said))
    result = score(MMSTAR, read_items(MMSTAR, items).golds, responses)
    assert (result.answered, result.missing, result.parse_failures) == (2, 1, 1)
    assert result.headline_refused == "1 of 3 items have no response"


def test_a_repeated_id_keeps_its_row_apart(tmp_path: Path) -> None:
    items = jsonl(tmp_path / "items.jsonl", ROW, {**ROW, "answer": "B"})
    said = [{"id": "7#2", "response": "B"}, {"id": "7", "response": "A"}]
    responses = read_responses(jsonl(tmp_path / "responses.jsonl", *said))
    result = score(MMSTAR, read_items(MMSTAR, items).golds, responses)
    assert result.accuracy == 100.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mmstr", "did you mean 'mmstar'"),
        ("MMStar", "did you mean 'mmstar'"),
        ("ai2d_no_mask", "did you mean 'ai2d-no-mask'"),
        ("hallusion", "did you mean 'hallusionbench'"),
        ("zzz", "known are hallusionbench, mmbench"),
    ],
)
def test_a_misspelt_benchmark(name: str, says: str) -> None:
    with pytest.raises(GraceError, match=says):
        find_benchmark(name)
