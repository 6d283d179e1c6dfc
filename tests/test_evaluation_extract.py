"""Reading answers: hand-made cases, recorded ones, and published scores of real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_core.evaluation.answers.letters import extract_letter
from grace_core.evaluation.answers.yesno import extract_yes_no


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("**B. blue**", "B"),
        ("ANSWER: B", "B"),
        ("The answer is B", "B"),
        ("The correct answer is **C. green**", "C"),
        ("B\n\nThe ball is blue.", "B"),
        ("B. The object marked C is too small.", "B"),
        ("A. First guess.\nThe answer is C.", "C"),
        ("Answer: A or B. Actually, I choose C.", "C"),
        (r"So it is $\boxed{\text{D}}$.", "D"),
        ("The answer is a because of the colour.", "A"),
        # Nothing here chooses a letter.
        ("", ""),
        ("The answer is DNA.", ""),
        ("The answer is a dog.", ""),
        ("Answer: I think the dog.", ""),
        ("The answer is not A.", ""),
        ("Because", ""),
        ("Dog", ""),
        ("Cannot tell", ""),
        ("Both A and B", ""),
        ("Answer: A and B", ""),
        ("The answer is A, B and C", ""),
        ("The answer is E.", ""),
        ("I cannot determine it, (A) and so on.", ""),
        ("A. red\nB. blue\nC. green\nD. yellow", ""),
        ("I choose B. Final answer: none of them", ""),
    ],
)
def test_letters(response: str, expected: str) -> None:
    assert extract_letter(response, "ABCD") == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Yes", "Yes"),
        ("No, it is not.", "No"),
        ("<answer>no</answer>", "No"),
        ("There is no cat.", "No"),
        ("Yes and no", "Unknown"),
        ("Eyes, noses and knots", "Unknown"),
        ("True", "Unknown"),
        ("", "Unknown"),
    ],
)
def test_yes_and_no(response: str, expected: str) -> None:
    assert extract_yes_no(response) == expected


@given(st.text(max_size=200), st.sampled_from(["AB", "ABCD", "ABCDEFGHIJ"]))
def test_any_text_gives_a_choice_or_nothing(response: str, letters: str) -> None:
    assert extract_letter(response, letters) in {"", *letters}
    assert extract_yes_no(response) in {"Yes", "No", "Unknown"}


@given(st.sampled_from("ABCD"), st.sampled_from("ABCD"))
def test_the_last_declaration_wins(first: str, last: str) -> None:
    assert extract_letter(f"The answer is {first}. No: the answer is {last}.", "ABCD") == last


@pytest.fixture(scope="module")
def cases(shared_data: Path) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads((shared_data / "answer_cases.json").read_text())
    return read


def test_recorded_cases_that_four_implementations_agree_on(cases: list[dict[str, Any]]) -> None:
    agreed = [case for case in cases if case["kind"] == "mcq" and case["agree"]]
    assert len(agreed) > 40
    wrong = {
        case["id"]: found
        for case in agreed
        if (found := extract_letter(case["response"], list(case["choices"]))) != case["expected"]
    }
    assert not wrong


def test_recorded_cases_where_implementations_differ(cases: list[dict[str, Any]]) -> None:
    # Option texts are not searched, hence `policy_expected` where there is one.
    disputed = [case for case in cases if case["kind"] == "mcq" and not case["agree"]]
    wrong = {
        case["id"]: found
        for case in disputed
        if (found := extract_letter(case["response"], list(case["choices"])))
        not in (case["expected"], case.get("policy_expected"))
    }
    assert not wrong


def test_recorded_yes_and_no(cases: list[dict[str, Any]]) -> None:
    recorded = [case for case in cases if case["kind"] == "yesno"]
    assert len(recorded) > 30
    assert [extract_yes_no(case["response"]) for case in recorded] == [
        case["expected"] for case in recorded
    ]
