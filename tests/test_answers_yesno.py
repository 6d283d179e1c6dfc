"""Yes and no: hand-worked cases of the documented rule, and recorded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_core.evaluation.answers.yesno import extract_yes_no


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Yes", "Yes"),
        ("No, it is not.", "No"),
        ("<answer>no</answer>", "No"),
        ("There is no cat.", "No"),
        ("YES!", "Yes"),
        ("(yes)", "Yes"),
        ("yes/no", "Unknown"),
        ("Yes and no", "Unknown"),
        ("Eyes, noses and knots", "Unknown"),
        ("True", "Unknown"),
        ("", "Unknown"),
        # Neither asterisk, colon nor apostrophe is punctuation to this rule.
        ("**Yes**", "Unknown"),
        ("Answer:no", "Unknown"),
        ("'yes'", "Unknown"),
        # A mark beside a blank vanishes and joins, any other separates.
        ("well,yes", "Yes"),
        ("well,yes , sir", "Unknown"),
        ("1,000 people,no", "Unknown"),
        # The first 32 periods vanish.
        (" .a" * 31 + " no.", "No"),
        (" .a" * 32 + " no.", "Unknown"),
    ],
)
def test_yes_and_no(response: str, expected: str) -> None:
    assert extract_yes_no(response) == expected


@given(st.text(max_size=200))
def test_any_text_says_one_of_three(response: str) -> None:
    assert extract_yes_no(response) in {"Yes", "No", "Unknown"}


def test_recorded_cases(shared_data: Path) -> None:
    cases = json.loads((shared_data / "answer_cases.json").read_text())
    recorded = [case for case in cases if case["kind"] == "yesno"]
    assert len(recorded) > 30
    found = [extract_yes_no(case["response"]) for case in recorded]
    assert found == [case["expected"] for case in recorded]
