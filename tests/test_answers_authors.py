"""The benchmarks' own letter rules, faults included: hand-worked from the published code."""

from __future__ import annotations

import pytest

from grace_core.evaluation.answers.authors import (
    ai2d_letter,
    exact_letter,
    mmbench_letter,
    mmstar_letter,
    scienceqa_letter,
)

CHOICES = {"A": "red", "B": "blue", "C": "green", "D": "yellow"}


@pytest.mark.parametrize(
    ("response", "expected"),
    [("A", "A"), ("a", ""), ("A.", ""), (" A", ""), ("E", ""), ("", ""), ("AB", "")],
)
def test_seedbench(response: str, expected: str) -> None:
    assert exact_letter(response, CHOICES) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("E", "E"),
        ("F", ""),
        ("b", ""),
        ("B.", ""),
        ("B. ", "B"),
        ("B. blue", "B"),
        ("B blue", ""),
        ("BECAUSE: x\nThe answer is C.", "C"),
        ("The answer is C", ""),  # a character must follow
        ("The answer is Cat", "C"),
        ("The answer is A. The answer is A.", ""),  # twice
        ("the answer is C.", ""),
        ("The answer is F.", "F"),
        ("", ""),
    ],
)
def test_scienceqa(response: str, expected: str) -> None:
    assert scienceqa_letter(response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        (" B. the leaf", "B"),
        ("B\n", ""),
        ("b. the leaf", ""),
        ("B) the leaf", ""),
        ("The answer is B", ""),
        ("7", ""),
        ("", ""),
    ],
)
def test_ai2d(response: str, expected: str) -> None:
    assert ai2d_letter(response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("b: blue", "B"),
        ("(b) blue", "B"),
        ("Option B", "B"),
        ("option\nb", "B"),
        ("The answer is B.", "B"),
        ("An apple", "A"),
        ("Both", "B"),
        ("The answer is a dog", "A"),
        ("The answer: B", ""),
        ("( B)", ""),
        ("E", ""),
        ("(", ""),
        ("", ""),
        ("  ", ""),
    ],
)
def test_mmstar(response: str, expected: str) -> None:
    assert mmstar_letter(response, CHOICES) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("(B) blue", "B"),
        ("The answer is B", "B"),
        # Only the first occurrence counts, and only among the last four words.
        ("A is what I see in here", ""),
        ("One two three four B", "B"),
        ("B one two three four", ""),
        # The stated answer has no boundary on its right.
        ("The answer is DNA and nothing else at all", "D"),
        ("the answer is **b** for these many good reasons", "B"),
        ("A or B, but the answer is C in the end, surely so", "C"),
        # The text of one option, in a reply not longer than twice all texts.
        ("it is blue", "B"),
        ("red and blue", ""),
        ("it is blue, " * 6, ""),
        ("Cannot determine the answer B", ""),
        ("Z", ""),
        ("Z, blue", ""),
        ("Failed to obtain answer via API B", ""),
        ("", ""),
    ],
)
def test_mmbench(response: str, expected: str) -> None:
    assert mmbench_letter(response, CHOICES) == expected
