"""Scores with hand-counted answers, and the results table with the published figures."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.benchmarks.toy import TOY_CHOICE
from grace_core.evaluation.declaration import Metric
from grace_core.evaluation.items import Gold, Prediction
from grace_core.evaluation.score import score
from grace_core.evaluation.table import Label, ResultRow, ResultsTable, results_table

BENCHMARKS = ("HallB", "MMBench", "ScienceQA", "AI2D", "MMMU", "SEED", "MMStar")
PUBLISHED: dict[Label, tuple[float, ...]] = {
    "teacher": (61.1, 84.5, 85.0, 85.7, 69.6, 77.5, 70.9),
    "baseline": (51.4, 78.4, 81.4, 76.9, 53.4, 71.2, 58.3),
    "bf16": (66.9, 86.4, 86.2, 81.3, 72.1, 76.7, 67.3),
    "w8": (66.1, 85.5, 85.3, 80.4, 71.3, 75.9, 66.5),
    "w4": (65.4, 84.6, 84.3, 79.5, 70.5, 75.1, 65.8),
}
"""Accuracies in percent of the models published with the paper (Qwen3-VL 8B into 2B)."""

PUBLISHED_AVERAGES = {"teacher": 76.3, "baseline": 67.3, "bf16": 76.7, "w8": 75.9, "w4": 75.0}


def published_table() -> ResultsTable:
    """The table of the paper's models, through the code that makes ours."""
    return results_table(
        [
            ResultRow(label, dict(zip(BENCHMARKS, scores, strict=True)))
            for label, scores in PUBLISHED.items()
        ]
    )


CHOICES = {"A": "red", "B": "blue"}


def gold(name: str, answer: str, category: str) -> Gold:
    fields = {"category": category}
    if answer in CHOICES:
        return Gold(name, "mcq", CHOICES, (answer,), fields)
    return Gold(name, "yesno", None, (answer,), fields)


GOLDS = (gold("1", "A", "x"), gold("2", "B", "x"), gold("3", "Yes", "y"), gold("4", "No", "y"))


def test_right_wrong_and_unreadable_answers_are_counted() -> None:
    said = {"1": "The answer is A.", "2": "A", "3": "yes, it is", "4": "perhaps"}
    result = score(TOY_CHOICE, GOLDS, [Prediction(name, text) for name, text in said.items()])
    assert (result.total, result.answered) == (4, 4)
    assert (result.parse_failures, result.errors, result.missing) == (1, 0, 0)
    assert result.metrics == {
        "policy.accuracy": Metric(50.0, 2, 4),
        "policy.by_category.x": Metric(50.0, 1, 2),
        "policy.by_category.y": Metric(50.0, 1, 2),
    }
    assert result.coverage == "4 of 4 answered, 1 unreadable"
    written = json.loads(json.dumps(result.to_dict()))
    assert written["headline"] == {"metric": "policy.accuracy", "percent": 50.0}
    assert written["metrics"]["policy.accuracy"] == {"percent": 50.0, "correct": 2, "total": 4}
    assert [item.to_dict() for item in result.items[::3]] == [
        {"id": "1", "response": said["1"], "error": None, "answer": "A", "correct": True},
        {"id": "4", "response": "perhaps", "error": None, "answer": "", "correct": False},
    ]


def test_answers_without_an_end_are_told_apart_from_unreadable_ones() -> None:
    said = [
        Prediction("1", "The answer is A.", tokens=8),
        Prediction("2", "I look at the picture and", tokens=8),
        Prediction("3", "perhaps", tokens=2),
        Prediction("4", "who can say, as I", tokens=4),
    ]
    result = score(TOY_CHOICE, GOLDS, said, budgets={"mcq": 8, "yesno": 4})
    assert (result.parse_failures, result.cut_off) == (3, 2)
    assert [item.to_dict().get("cut_off") for item in result.items] == [True, True, None, True]
    assert result.coverage == "4 of 4 answered, 3 unreadable (2 of them cut off)"
    assert result.to_dict()["cut_off"] == 2
    assert score(TOY_CHOICE, GOLDS, said).cut_off == 0, "no budget is known"


def test_items_have_in_common_what_the_benchmark_says_or_their_picture() -> None:
    result = score(TOY_CHOICE, GOLDS, [], pictures={"1": "red", "2": "red"})
    assert [item.to_dict().get("cluster") for item in result.items] == ["red", "red", None, None]
    fields = {"category": "VS", "subcategory": "map", "set_id": "1", "figure_id": "2"}
    fields |= {"question_id": "0", "picture": "yes"}
    hallusion = Gold("x", "yesno", None, ("Yes",), fields)
    (item,) = score(find_benchmark("hallusionbench"), [hallusion], [], pictures={"x": "red"}).items
    assert item.to_dict()["cluster"] == "VS_map_1"


@pytest.mark.parametrize(
    ("fourth", "errors", "missing"), [([Prediction("4", "", "OSError: gone")], 1, 0), ([], 0, 1)]
)
def test_no_headline_unless_every_item_was_answered(
    fourth: list[Prediction], errors: int, missing: int
) -> None:
    first = [Prediction("1", "A"), Prediction("2", "B"), Prediction("3", "Yes")]
    result = score(TOY_CHOICE, GOLDS, [*first, *fourth])
    assert (result.answered, result.errors, result.missing) == (3, errors, missing)
    assert result.metrics["policy.accuracy"] == Metric(100.0, 3, 3)
    assert result.parse_failures == 0, "an error is not an unreadable answer"
    assert result.accuracy is None and result.headline is None
    assert "1 of 4 items" in str(result.to_dict()["headline_refused"])
    assert result.coverage.startswith("3 of 4 answered, 1 ")


def test_predictions_of_another_run_are_refused() -> None:
    with pytest.raises(GraceError, match=r"a prediction is of no item \('9'\)"):
        score(TOY_CHOICE, GOLDS, [Prediction("9", "A")])
    with pytest.raises(GraceError, match="'1' stands twice"):
        score(TOY_CHOICE, GOLDS, [Prediction("1", "A"), Prediction("1", "B")])


def test_published_averages_and_claims() -> None:
    table = published_table()
    rows = {row.label: row for row in table.rows}
    assert {label: round(row.average or 0, 1) for label, row in rows.items()} == PUBLISHED_AVERAGES
    assert round(table.gain(rows["bf16"]) or 0, 1) == 9.4
    assert round(table.kept(rows["w4"]) or 0) == 98
    assert table.kept(rows["bf16"]) is None and table.kept(rows["teacher"]) is None


def test_the_table_as_markdown() -> None:
    lines = published_table().to_markdown().splitlines()
    assert lines[0].split(" | ")[1:-3] == list(BENCHMARKS)
    assert lines[2] == (
        "| Teacher | 61.1 | 84.5 | 85.0 | 85.7 | 69.6 | 77.5 | 70.9 | 76.3 | +9.0 | – |"
    )
    # As published: the best 2B model of every column, hence not the teacher, is in bold.
    assert lines[4] == (
        "| GRACE BF16 | **66.9** | **86.4** | **86.2** | **81.3** | **72.1** | **76.7** "
        "| **67.3** | **76.7** | +9.4 | – |"
    )
    assert lines[6].endswith("| 75.0 | +7.7 | 97.8 % |")
    assert len({line.count("|") for line in lines}) == 1


def test_the_table_as_data_keeps_full_precision() -> None:
    rows = json.loads(json.dumps(published_table().to_dict()))["rows"]
    assert set(rows) == {"teacher", "baseline", "bf16", "w8", "w4"}
    for label, scores in PUBLISHED.items():
        assert [rows[label][name] for name in BENCHMARKS] == list(scores)
        assert rows[label]["average"] == pytest.approx(sum(scores) / 7, abs=1e-12)


def test_the_table_in_a_terminal() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(published_table().to_rich())
    text = console.export_text()
    assert "GRACE W4G128" in text and "97.8 %" in text and "+9.4" in text


def test_held_out_loss_stands_beside_and_is_not_averaged() -> None:
    table = results_table(
        [
            ResultRow("bf16", {"a": 80.0, "b": 60.0}, held_out_loss=1.2345),
            ResultRow("baseline", {"b": 50.0, "a": 50.0}),
        ]
    )
    assert [row.label for row in table.rows] == ["baseline", "bf16"]
    assert table.to_dict()["rows"]["bf16"] == {
        "b": 60.0,
        "a": 80.0,
        "average": 70.0,
        "held_out_loss": 1.2345,
    }
    assert "held_out_loss" not in table.to_dict()["rows"]["baseline"]
    assert table.to_markdown().splitlines()[-1].endswith("| 1.234 |")


def test_an_incomplete_row_has_no_average_and_no_gain() -> None:
    table = results_table(
        [
            ResultRow("baseline", {"a": 50.0, "b": 50.0}),
            ResultRow("bf16", {"a": 60.0, "b": None}),
            ResultRow("w4", {"a": 60.0, "b": 60.0}),
        ]
    )
    bf16, w4 = table.rows[1:]
    assert bf16.average is None and table.gain(bf16) is None
    assert table.kept(w4) is None and table.gain(w4) == 10.0
    assert "| GRACE BF16 | **60.0** | – | – | – | – |" in table.to_markdown()
    assert table.to_dict()["rows"]["bf16"]["average"] is None


def test_rows_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(GraceError, match="same benchmarks"):
        results_table([ResultRow("bf16", {"a": 1.0}), ResultRow("w4", {"b": 1.0})])
    with pytest.raises(GraceError, match="share a name"):
        results_table([ResultRow("bf16", {"a": 1.0}), ResultRow("bf16", {"a": 2.0})])
    with pytest.raises(GraceError, match="no row"):
        results_table([])
