"""MMMU's parsers: hand-worked cases of the published rule, and recorded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_core.evaluation.answers.mmmu import open_is_right, read_choice, read_open

CHOICES = {"A": "$6", "B": "the blue ball", "C": "ball", "D": "None"}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("It is B or C", "C"),
        ("First (C), finally (A), never B", "A"),
        ("(A) (B) (A)", "A"),
        ("A dog (B)", "B"),
        ("A dog", "A"),  # to this rule the article is a letter
        ("Answer: A", "A"),
        # Between blanks only, and in upper case only.
        ("B) blue", ""),
        ("b", ""),
        ("Because", ""),
        ("The answer is:B", ""),
        # Marks are stripped in turn: the full stop before the quote stays.
        ("B.'", ""),
        ("B'.", "B"),
        # Texts of options in more than five words; the latest wins, of equals the first letter.
        ("the blue ball", ""),
        ("I think it is the blue ball", "C"),
        ("I think that it costs just $6", "A"),
        ("There is nothing, none of all these", "D"),
        ("There is nothing to be seen here", ""),
        ("", ""),
    ],
)
def test_choices(response: str, expected: str) -> None:
    assert read_choice(response, CHOICES) == expected


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("Paris", ["paris"]),
        ("The capital is Paris.", ["paris"]),
        # Besides the number itself: up to the point, and behind the comma.
        ("The result is 1,234.567", [1234.57, 1234.0, 234.57]),
        ("So x = 8", [8.0]),
        ("x = 8\nas shown", ["x = 8\nas shown", 8.0]),
        ("it is 3\nso the answer is 4", [3.0, 4.0]),
        ("-3.5", [-3.5]),
        ("1.5e3", [1500.0, 1.0, 3.0]),
        ("b", [" b", "b "]),
        ("The answer is :", ["the answer is :"]),
        ("", [""]),
    ],
)
def test_open_answers(response: str, said: list[str | float]) -> None:
    assert read_open(response) == said


@pytest.mark.parametrize(
    ("response", "golds", "right"),
    [
        ("12.35", ["12.345"], True),
        ("12.344", ["12.341"], True),
        ("about 10,000 people", ["10000"], True),
        ("10", ["10,000"], False),
        ("It is in Florida.", ["florida"], True),
        ("I don't know", ["no"], True),  # contained: the rule is that kind
        ("cab", ["b"], False),  # a single character stands beside a blank
        ("type b", ["b"], True),
        ("It is 24/7", ["24"], True),
        ("24/7", ["24/7", "24 hours"], True),
        ("half", ["1/2", "half"], True),
        ("nothing", [], False),
    ],
)
def test_open_judgement(response: str, golds: list[str], right: bool) -> None:
    assert open_is_right(read_open(response), golds) is right


@given(st.text(max_size=200))
def test_any_text_can_be_read(response: str) -> None:
    assert read_choice(response, CHOICES) in {"", *CHOICES}
    assert read_open(response)


def test_recorded_cases(shared_data: Path) -> None:
    cases = json.loads((shared_data / "answer_cases.json").read_text())
    opened = {case["id"]: case for case in cases if case["kind"] == "open"}
    assert len(opened) > 40
    assert {
        name
        for name, case in opened.items()
        if open_is_right(
            read_open(case["response"]),
            [case["gold"]] if isinstance(case["gold"], str) else case["gold"],
        )
        != case["expected"]
    } == set()
    theirs = [case for case in cases if str(case["authority"]).startswith("MMMU parse_multi")]
    assert len(theirs) > 20
    assert [read_choice(case["response"], case["choices"]) for case in theirs] == [
        case["expected"] for case in theirs
    ]
