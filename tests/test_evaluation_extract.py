"""Reading answers: hand-made cases, recorded ones, and published scores of real models."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
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


def _options_of_mmbench(row: dict[str, Any]) -> str:
    return "".join(letter for letter in "ABCD" if row[letter] is not None)


@pytest.mark.parametrize(
    ("folder", "keep", "letters", "gold", "right", "failures"),
    [
        # 781 of 1500 and 9708 of 14233 are the published 52.1 % and 68.2 %.
        (
            "mmstar-llava-next-yi-34b",
            lambda row: True,
            lambda row: "ABCD",
            lambda row: row["answer"],
            781,
            0,
        ),
        (
            "seedbench-llava-1.5-13b",
            lambda row: row["data_type"] == "image",
            lambda row: "ABCD",
            lambda row: row["answer"],
            9708,
            0,
        ),
        (
            "mmbench-llava-1.5-13b",
            lambda row: True,
            _options_of_mmbench,
            lambda row: row["answer"],
            3346,
            0,
        ),
        (
            "scienceqa-llava-13b-v0",
            lambda row: True,
            lambda row: "ABCDE"[: len(row["choices"])],
            lambda row: "ABCDE"[row["answer"]],
            3855,
            1,
        ),
        (
            "mmmu-llava-1.5-13b",
            lambda row: row["question_type"] == "multiple-choice",
            lambda row: "ABCDEFGHIJ"[: len(ast.literal_eval(row["options"]))],
            lambda row: row["answer"],
            327,
            1,
        ),
    ],
)
def test_scores_of_real_models(
    shared_data: Path,
    folder: str,
    keep: Callable[[dict[str, Any]], bool],
    letters: Callable[[dict[str, Any]], str],
    gold: Callable[[dict[str, Any]], str],
    right: int,
    failures: int,
) -> None:
    rows, responses = _golden(shared_data, folder)
    pairs = [
        (extract_letter(response["response"], letters(row)), gold(row))
        for row, response in zip(rows, responses, strict=True)
        if keep(row)
    ]
    assert sum(found == answer for found, answer in pairs) == right
    assert sum(not found for found, _ in pairs) == failures


def test_yes_and_no_of_a_real_model(shared_data: Path) -> None:
    rows, responses = _golden(shared_data, "hallusionbench-gpt-4v")
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    gold = {"_".join(row[key] for key in keys): row["gt_answer"] for row in rows}
    found = [(extract_yes_no(each["response"]), gold[each["id"]]) for each in responses]
    assert sum(said == {"1": "Yes", "0": "No"}[answer] for said, answer in found) == 131
    assert sum(said == "Unknown" for said, _ in found) == 49


def _golden(shared_data: Path, folder: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    def read(name: str) -> list[dict[str, Any]]:
        lines = (shared_data / "golden" / folder / name).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    return read("items.jsonl"), read("responses.jsonl")
