"""`grace score` and `grace extract`: what they print, and how mistakes end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grace_core.cli import main


@pytest.fixture
def recorded(tmp_path: Path) -> dict[str, Path]:
    rows = [
        {"index": n, "answer": "A", "category": "math", "l2_category": "geometry"} for n in range(4)
    ]
    said = [
        {"id": "0", "response": "A"},
        {"id": "1", "response": "The answer is A."},
        {"id": "2", "response": "B"},
        {"id": "3", "response": "who knows"},
    ]
    files = {"items": tmp_path / "items.jsonl", "responses": tmp_path / "responses.jsonl"}
    for name, lines in (("items", rows), ("responses", said)):
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """The command line takes over SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def files(recorded: dict[str, Path]) -> list[object]:
    return ["--items", recorded["items"], "--responses", recorded["responses"]]


def test_scores_for_programs(
    capsys: pytest.CaptureFixture[str], recorded: dict[str, Path], tmp_path: Path
) -> None:
    out_file = tmp_path / "scored.jsonl"
    code, out, _ = run(capsys, "score", "mmstar", *files(recorded), "--json", "--output", out_file)
    assert code == 0
    result: dict[str, Any] = json.loads(out)
    assert result["benchmark"] == "mmstar"
    assert [result[key] for key in ("total", "answered", "errors", "missing")] == [4, 4, 0, 0]
    assert result["parse_failures"] == 1
    assert result["headline"] == {"metric": "official.micro", "percent": 50.0}
    assert result["headline_refused"] is None
    assert result["part_of"] == [1500]
    assert result["metrics"]["official.micro"] == {"percent": 50.0, "correct": 2, "total": 4}
    assert set(result["rules"]) == {"official", "policy"}
    assert result["rules"]["policy"]["parse_failure_ids"] == ["3"]
    lines = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2", "3"]
    assert [line["correct"] for line in lines] == [True, True, False, False]
    assert [line["answer"] for line in lines] == ["A", "A", "B", ""]


def test_scores_for_people(capsys: pytest.CaptureFixture[str], recorded: dict[str, Path]) -> None:
    code, out, _ = run(capsys, "score", "mmstar", *files(recorded))
    assert code == 0
    assert "official.micro" in out and "by_category" not in out
    assert "Headline: 50.00 % (official.micro)" in out
    assert "4 of 4 answered, 1 unreadable, the benchmark has 1500" in " ".join(out.split())
    _, out, _ = run(capsys, "score", "mmstar", *files(recorded), "--all")
    assert "official.by_category.math" in out


def test_no_headline_when_items_are_missing(
    capsys: pytest.CaptureFixture[str], recorded: dict[str, Path]
) -> None:
    first = recorded["responses"].read_text().splitlines()[0]
    recorded["responses"].write_text(first + "\n")
    _, out, _ = run(capsys, "score", "mmstar", *files(recorded))
    assert "No headline: 3 of 4 items have no response" in out
    assert "Headline: " not in out.replace("No headline: ", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mmstr"], "did you mean 'mmstar'"),
        (["mmstar", "--output", "none/here.jsonl"], "does not exist"),
        (["ai2d"], "column 'options', which should hold a list of texts, is missing"),
    ],
)
def test_a_mistake_is_told_without_traceback(
    capsys: pytest.CaptureFixture[str],
    recorded: dict[str, Path],
    arguments: list[str],
    says: str,
) -> None:
    code, _, err = run(capsys, "score", *arguments, *files(recorded))
    assert code == 1
    assert says in err
    assert "Traceback" not in err


CASES = [
    {"id": "1", "kind": "mcq", "response": "B", "choices": {"A": "", "B": ""}, "expected": "B"},
    {"id": "2", "kind": "yesno", "response": "**Yes**", "expected": "Yes"},
    {"id": "3", "kind": "open", "response": "It is 3.001", "gold": "3", "expected": True},
    {
        "id": "4",
        "kind": "mcq",
        "response": "I would choose the red ball",
        "choices": {"A": "red ball", "B": "blue ball"},
        "expected": "A",
        "authority": "MMMU parser",
        "agree": False,
    },
    {
        "id": "5",
        "kind": "mcq",
        "response": "I would choose the red ball",
        "choices": {"A": "red ball", "B": "blue ball"},
        "expected": "A",
        "policy_expected": "",
        "agree": True,
    },
]


def test_cases(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(CASES))
    code, out, _ = run(capsys, "extract", "--cases", file, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["cases"], found["right"], found["percent"]) == (5, 4, 80.0)
    assert found["kinds"]["mcq"] == {"cases": 3, "right": 3, "percent": 100.0}
    assert found["unanimous"] == {"cases": 1, "right": 1, "percent": 100.0}
    assert [(case["id"], case["found"]) for case in found["differing"]] == [("2", "Unknown")]
    _, out, _ = run(capsys, "extract", "--cases", file)
    assert "all: 4 of 5 as expected (80.0 %)" in out
    assert "2 (yesno): 'Unknown' instead of 'Yes'" in out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("{}", "not a list of cases"),
        ("[]", "not a list of cases"),
        ('[{"id": "x", "kind": "mcq", "response": "B"}]', "case 'x'"),
        ('[{"id": "x", "kind": "essay", "response": "B", "expected": ""}]', "essay"),
        ("[1]", "case 0"),
    ],
)
def test_unusable_cases(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "cases.json"
    file.write_text(text)
    code, _, err = run(capsys, "extract", "--cases", file)
    assert code == 1
    assert says in err
    assert "Traceback" not in err
