"""VQA accuracy, GQA, POPE and MME: their authors' rules, worked by hand or by brute force."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_core.evaluation.answers.vqa import normalise, vqa_accuracy
from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.declaration import Reading
from grace_core.evaluation.items import Gold, Prediction
from grace_core.evaluation.score import BenchmarkScore, score


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("Two dogs.", "2 dogs"),
        ("The dog", "dog"),
        ("none", "0"),
        ("10,000", "10000"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("A man's hat", "man 's hat"),
        ("well-done", "well done"),
        ("yes!\n", "yes"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("", ""),
        ("an", ""),
    ],
)
def test_answers_are_brought_into_one_form(answer: str, form: str) -> None:
    assert normalise(answer) == form


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["cat", "dog", "cow"]), min_size=4, max_size=10))
def test_vqa_accuracy_is_the_mean_over_all_sets_of_one_person_less(people: list[str]) -> None:
    """The definition, over every choice of all annotators but one."""
    for answer in ("cat", "cow"):
        subsets = list(combinations(people, len(people) - 1))
        expected = sum(min(1.0, subset.count(answer) / 3) for subset in subsets) / len(subsets)
        assert vqa_accuracy(answer, people) == pytest.approx(expected, abs=1e-12)


def golds(kind: str, *rows: tuple[tuple[str, ...], Mapping[str, str]]) -> list[Gold]:
    return [
        Gold(str(number), kind, None, answers, fields)  # type: ignore[arg-type]
        for number, (answers, fields) in enumerate(rows)
    ]


def scored(name: str, rows: list[Gold], *responses: str | None) -> BenchmarkScore:
    answered = [
        Prediction(str(number), text) for number, text in enumerate(responses) if text is not None
    ]
    return score(find_benchmark(name), rows, answered)


def test_vqa_counts_an_answer_by_how_many_gave_it() -> None:
    people = ("net",) * 3 + ("mesh",) * 7
    rows = golds("open", (people, {"answer_type": "other"}), (people, {"answer_type": "number"}))
    result = scored("vqav2", rows, "A net.", "fence")
    assert result.metrics["official.vqa_accuracy"].percent == pytest.approx(45.0)
    assert result.metrics["official.by_answer_type.other"].percent == pytest.approx(90.0)
    assert [item.reading.correct for item in result.items if item.reading] == [True, False]


@pytest.mark.parametrize(
    ("response", "right"), [("Yes.", True), ("yes", True), ("yes, it is", False), ("", False)]
)
def test_gqa_is_the_answer_and_nothing_else(response: str, right: bool) -> None:
    (rule,) = find_benchmark("gqa").rules
    assert rule.read(golds("open", (("yes",), {}))[0], response).correct is right


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Yes, there is a dog.", "Yes"),
        ("No, there is none", "No"),
        ("There is no dog.", "No"),
        ("There is not a dog. Yes.", "No"),
        ("I see a cat. No dog.", "Yes"),  # only the first sentence is read
        ("", "Yes"),
    ],
)
def test_pope_takes_all_but_no_for_yes(response: str, answer: str) -> None:
    rule = find_benchmark("pope").rules[0]
    gold = golds("yesno", (("No",), {"category": "random"}))[0]
    assert rule.read(gold, response) == Reading(answer, answer == "No")


def test_pope_by_hand() -> None:
    kinds = ["random"] * 4 + ["popular"] * 2
    truths = ["Yes", "Yes", "No", "No", "Yes", "No"]
    said = ["yes", "no", "yes", "no", "yes", "no"]
    rows = golds("yesno", *[((t,), {"category": k}) for t, k in zip(truths, kinds, strict=True)])
    metrics = {name: m.percent for name, m in scored("pope", rows, *said).metrics.items()}
    # Random: tp 1, fp 1, fn 1; popular: tp 1.
    assert metrics["official.f1_by_category.random"] == pytest.approx(50.0)
    assert metrics["official.f1_by_category.popular"] == pytest.approx(100.0)
    assert metrics["official.mean_f1"] == pytest.approx(75.0)
    assert metrics["official.precision"] == pytest.approx(100 * 2 / 3)
    assert metrics["official.recall"] == pytest.approx(100 * 2 / 3)
    assert metrics["official.f1"] == pytest.approx(100 * 2 / 3)
    assert metrics["official.accuracy"] == pytest.approx(100 * 4 / 6)
    assert metrics["official.yes_ratio"] == pytest.approx(50.0)
    assert metrics["policy.accuracy"] == metrics["official.accuracy"]


def test_pope_without_any_yes_has_no_precision() -> None:
    rows = golds("yesno", (("No",), {"category": "random"}))
    metrics = scored("pope", rows, "no").metrics
    assert metrics["official.accuracy"].percent == 100.0
    assert not {"official.precision", "official.recall", "official.f1"} & metrics.keys()


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("y", "Yes"),
        ("N.", "No"),
        (" Yes, it is", "Yes"),
        ("Not at all", "No"),
        ("The answer is yes", ""),
        ("", ""),
    ],
)
def test_mme_reads_the_first_four_characters(response: str, answer: str) -> None:
    rule = find_benchmark("mme").rules[0]
    gold = golds("yesno", (("Yes",), {"category": "count", "picture": "1"}))[0]
    assert rule.read(gold, response) == Reading(answer, answer == "Yes")


def test_mme_adds_accuracy_and_accuracy_plus() -> None:
    """Two pictures a task: one with both answers right, one with one: 75 + 50 points."""
    tasks = ["existence", "count", "position", "color", "posters", "celebrity", "scene"]
    tasks += ["landmark", "artwork", "OCR", "commonsense_reasoning", "numerical_calculation"]
    tasks += ["text_translation", "code_reasoning"]
    rows, said = [], []
    for task in tasks:
        for picture in ("1.png", "2.png"):
            fields = {"category": task, "picture": picture}
            rows += [(("Yes",), fields), (("No",), fields)]
            said += ["yes", "no" if picture == "1.png" else "yes"]
    result = scored("mme", golds("yesno", *rows), *said)
    points = {name: metric.points for name, metric in result.metrics.items() if metric.points}
    assert points["official.by_task.OCR"] == pytest.approx(125.0)
    assert points["official.perception"] == pytest.approx(1250.0)
    assert points["official.cognition"] == pytest.approx(500.0)
    assert points["official.total"] == pytest.approx(1750.0)
    assert result.metrics["official.total"].percent == pytest.approx(62.5)
    assert result.metrics["official.accuracy_plus.OCR"].percent == 50.0
    assert result.headline is not None and result.headline[0] == "official.total"
    assert result.to_dict()["metrics"]["official.total"]["points"] == pytest.approx(1750.0)


def test_mme_has_no_total_while_an_answer_is_missing() -> None:
    fields = {"category": "OCR", "picture": "1.png"}
    result = scored("mme", golds("yesno", (("Yes",), fields), (("No",), fields)), "yes", None)
    assert result.headline is None
    assert "official.by_task.OCR" not in result.metrics
    assert "official.total" not in result.metrics
