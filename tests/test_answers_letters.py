"""Letters: hand-worked cases of the documented rule, and recorded ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_core.evaluation.answers.letters import extract_letter

CONTAINERS = [
    ("<answer>b</answer>", "B"),
    ("<answer> C", "C"),
    ("answer> d", "D"),
    (r"So it is $\boxed{\text{D}}$.", "D"),
    (r"\boxed{A} after all \boxed{C}", "C"),
    (r"\boxed{B} The answer is A.", "B"),
    ("The answer is A. <answer>B</answer>", "B"),
    ("<answer>The answer is C, not A</answer>", "C"),
    ("<answer>(B) the blue one</answer>", "B"),
    # The last container decides, readable or not.
    (r"\boxed{A} then \boxed{E}", ""),
    ("The answer is A. <answer>the dog</answer>", ""),
    ("<answer>A or B</answer>", ""),
    ("<answer>A\nB</answer>", ""),
    ("The answer is A. \\boxed{B", ""),
    ("<answer><b>B</b></answer>", ""),
    ("<answer><answer>B</answer>", ""),
    ("B</answer>", ""),
    ("<answer B", ""),
    (r"\boxed{\boxed{B}}", ""),
]
DECLARATIONS = [
    ("ANSWER: B", "B"),
    ("Final answer = B", "B"),
    ("The answer is B", "B"),
    ("The correct answer is **C. green**", "C"),
    ("the answer is b because the image shows a dog", "B"),
    ("I pick C and stop", "C"),
    ("Option B is the right choice, as A lacks wheels", "B"),
    ("A. First guess.\nThe answer is C.", "C"),
    ("Answer: A or B. Actually, I choose C.", "C"),
    ("The answer is a because of the colour.", "A"),
    ("My answer is option (D), the yellow one", "D"),
    ("The answer should be D.", "D"),
    ("I'd choose “C”.", "C"),
    ("答案是B。", "B"),
    ("정답은 b입니다.", "B"),
    ("答えはBです。", "B"),
    ("The answer is（C）", "C"),
    # The last declaration decides, readable or not.
    ("Answer: B. Final answer: Z", ""),
    ("I choose B. Final answer: none of them", ""),
    ("The answer is DNA.", ""),
    ("The answer is B.com", ""),
    ("The answer is A-frame", ""),
    ("The answer is not A.", ""),
    ("The answer is E.", ""),
    ("Answer: A and B", ""),
    ("The answer is A, B and C", ""),
    ("Answer: B/C", ""),
    ("Answer: B C", ""),
    # "a" is the article, "I" the pronoun.
    ("The answer is a dog.", ""),
    ("Answer: I think the dog.", ""),
]
LABELS = [
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("**B. blue**", "B"),
    ("`c`", "C"),
    ("b)", "B"),
    ("B\n\nThe ball is blue.", "B"),
    ("B. The object marked C is too small.", "B"),
    ("(b) the nucleus", "B"),
    ("c: the object on the left", "C"),
    ("A because it is the only one", "A"),
    ("b is correct", "B"),
    ("The visible count matches (C).", "C"),
    ("The red object is above the table.\nB", "B"),
    ("After checking the diagram, C.", "C"),
    ("Four wheels; D", "D"),
    ("(B) is my selection.\n(B)", "B"),
    # No letter out of running text.
    ("A triangle has three sides.", ""),
    ("I'll go with plan b", ""),
    ("Both A and B", ""),
    ("Vitamin B", ""),
    ("the value of C", ""),
    ("Because", ""),
    ("Dog", ""),
    ("See http://example.com/B.", ""),
    ("naïveB.", ""),
    # Labels that do not agree, and refusals.
    ("A. red\nB. blue\nC. green\nD. yellow", ""),
    ("(A) or (B)", ""),
    ("B. blue\n(C)", ""),
    ("Cannot tell", ""),
    ("I cannot determine it, (A) and so on.", ""),
    ("", ""),
    (" \n\t", ""),
    ("...", ""),
]


@pytest.mark.parametrize(("response", "expected"), [*CONTAINERS, *DECLARATIONS, *LABELS])
def test_letters(response: str, expected: str) -> None:
    assert extract_letter(response, "ABCD") == expected


@pytest.mark.parametrize("letters", ["AB", "ABCDE", "ABCDEFGHIJ", "ACF"])
@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "({})",
        "{}. Selected.",
        "{}) Selected.",
        "Answer: {}",
        "The answer is {} because the objects match.",
        "I choose {}.",
        "Option {} is correct.",
        "<answer>{}</answer>",
        r"\boxed{{{}}}",
        "**{}**",
    ],
)
def test_every_letter_in_every_form(form: str, letters: str) -> None:
    for letter in letters:
        assert extract_letter(form.format(letter), letters) == letter
        assert extract_letter(form.format(letter.lower()), letters) == letter
        others = letters.replace(letter, "")
        assert extract_letter(form.format(letter), others) == "", "a letter that is not offered"


def test_options_may_be_lettered_in_lower_case() -> None:
    assert extract_letter("The answer is (x)", "xyz") == "X"


PIECES = ["A. ", "(B) ", "(", "**", "\\boxed{", "the answer is ", "1", "{"]


@pytest.mark.parametrize("piece", PIECES)
def test_a_derailed_response_is_read_all_the_same(piece: str) -> None:
    """A model that repeats itself up to its last token."""
    assert extract_letter(piece * 4000, "ABCD") in {"", "A", "B"}


@given(st.text(max_size=200), st.sampled_from(["AB", "ABCD", "ABCDEFGHIJ"]))
def test_any_text_gives_a_choice_or_nothing(response: str, letters: str) -> None:
    assert extract_letter(response, letters) in {"", *letters}


@given(st.sampled_from("ABCD"), st.sampled_from("ABCD"))
def test_the_last_declaration_wins(first: str, last: str) -> None:
    assert extract_letter(f"The answer is {first}. No: the answer is {last}.", "ABCD") == last


@pytest.fixture(scope="module")
def cases(shared_data: Path) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads((shared_data / "answer_cases.json").read_text())
    return [case for case in read if case["kind"] == "mcq"]


@pytest.mark.parametrize("unanimous", [True, False])
def test_recorded_cases(cases: list[dict[str, Any]], unanimous: bool) -> None:
    chosen = [case for case in cases if bool(case["agree"]) == unanimous]
    assert len(chosen) > 40
    wrong = {
        case["id"]: found
        for case in chosen
        # Option texts are not searched, hence `policy_expected` where there is one.
        if (found := extract_letter(case["response"], list(case["choices"])))
        not in (case["expected"], case.get("policy_expected"))
    }
    assert not wrong
