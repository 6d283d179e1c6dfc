"""What the regression gate demands, and that nothing is published behind its back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace_core.config import load_config
from grace_core.config.evaluation import Gate
from grace_core.errors import ConfigError
from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.gate import GateClosed, GateVerdict, judge, require_open
from grace_core.evaluation.recorded import read_items, read_responses
from grace_core.evaluation.report.comparison import compare
from grace_core.evaluation.report.recorded import find_recorded
from grace_core.evaluation.score import score
from tests.recorded_evaluations import Answers, write_recorded

ROOT = Path(__file__).resolve().parent.parent


def of(right: int, total: int = 100) -> Answers:
    return [True] * right + [False] * (total - right)


def verdict(folder: Path, gate: dict[str, Any], **answers: dict[str, Answers]) -> GateVerdict:
    places = [write_recorded(folder / label, label, scores) for label, scores in answers.items()]
    models = find_recorded(places)
    return judge(Gate.model_validate(gate), models, compare(models, seed=0))


RUN: dict[str, dict[str, Answers]] = {
    "teacher": {"a": of(20), "b": of(20)},
    "baseline": {"a": of(60), "b": of(70)},
    "bf16": {"a": of(80), "b": of(90)},
    "w4": {"a": of(75), "b": of(80)},
}


@pytest.mark.parametrize(
    ("gate", "problems"),
    [
        ({}, []),
        ({"floors": {"average": 77.5, "a": 75}}, []),
        (
            {"floors": {"average": 80, "a": 79}},
            [
                "GRACE W4G128, average: 77.50 %, 2.50 below the floor of 80",
                "GRACE W4G128, a: 75.00 %, 4.00 below the floor of 79",
            ],
        ),
        ({"retention": {"w8": 99, "w4": 91}}, []),
        (
            {"retention": {"w4": 95}},
            ["GRACE W4G128, average: 91.18 % of BF16, 3.82 below the retention of 95"],
        ),
        ({"min_gain": 12.5}, []),
        (
            {"min_gain": 15},
            ["GRACE W4G128, average: 12.50 points, 2.50 below the gain of 15"],
        ),
    ],
)
def test_shortfalls_say_who_and_by_how_much(
    tmp_path: Path, gate: dict[str, Any], problems: list[str]
) -> None:
    """The teacher and the baseline, which fall below every floor here, are not released."""
    found = verdict(tmp_path, gate, **RUN)
    assert [check.problem for check in found.shortfalls] == problems
    assert found.passed == (not problems)


def test_the_end_of_the_interval_may_decide(tmp_path: Path) -> None:
    """80 of 100: the normal interval is 72.2 to 87.8."""
    run = {"bf16": {"a": of(80)}}
    for decides, floor, passes in (
        ("value", 80, True),
        ("value", 80.5, False),
        ("lower_bound", 70, True),
        ("lower_bound", 75, False),
        ("upper_bound", 85, True),
        ("upper_bound", 90, False),
    ):
        gate = {"decides": decides, "floors": {"a": floor}}
        assert verdict(tmp_path, gate, **run).passed is passes, (decides, floor)


def test_unreadable_answers_are_limited(tmp_path: Path) -> None:
    write_recorded(tmp_path / "w4", "w4", {"a": of(90)}, unreadable=7)
    models = find_recorded([tmp_path / "w4"])
    comparison = compare(models, seed=0)
    assert judge(Gate(max_parse_failures={"others": 7}), models, comparison).passed
    (short,) = judge(Gate.model_validate({"max_parse_failures": 5}), models, comparison).shortfalls
    assert short.problem is not None and "7.00 % of the answers (7 of 100), 2.00 above 5" in (
        short.problem
    )


def test_unreadable_answers_may_be_limited_by_benchmark(tmp_path: Path) -> None:
    answers = {"a": of(90), "b": of(90)}
    write_recorded(tmp_path / "w4", "w4", answers, unreadable=7, scores={"cut_off": 3})
    models = find_recorded([tmp_path / "w4"])
    gate = Gate(max_parse_failures={"a": 10, "b": 5})
    (short,) = judge(gate, models, compare(models, seed=0)).shortfalls
    assert short.problem == (
        "GRACE W4G128, b: nothing can be read from 7.00 % of the answers (7 of 100), 2.00 above "
        "5 %; 3 of them were cut off, which more tokens (evaluation.max_new_tokens) may mend"
    )
    assert judge(Gate(max_parse_failures={"a": 10}), models, compare(models, seed=0)).passed


def test_the_recipe_does_not_ask_of_sentences_to_be_letters(
    shared_data: Path, tmp_path: Path
) -> None:
    """GPT-4V's real answers to HallusionBench, of which 19 % say neither yes nor no."""
    folder = shared_data / "golden" / "hallusionbench-gpt-4v"
    benchmark = find_benchmark("hallusionbench")
    items = read_items(benchmark, folder / "items.jsonl")
    said = read_responses(folder / "responses.jsonl")
    asked = {each.item_id for each in said}
    found = score(benchmark, [gold for gold in items.golds if gold.id in asked], said)
    assert (found.parse_failures, found.answered) == (49, 254)
    (tmp_path / "predictions").mkdir()
    lines = [json.dumps(item.to_dict()) + "\n" for item in found.items]
    (tmp_path / "predictions" / "hallusionbench.jsonl").write_text("".join(lines))
    summary = {"label": "w4", "benchmarks": {"hallusionbench": found.to_dict()}}
    (tmp_path / "results.json").write_text(json.dumps(summary))
    models = find_recorded([tmp_path])
    gate = load_config(ROOT / "configs/qwen3vl-8b-to-2b.yaml").evaluation.gate
    checks = judge(gate, models, compare(models, seed=0)).checks
    (limit,) = [check for check in checks if check.demand == "parse failures"]
    assert limit.passed and limit.found == pytest.approx(100 * 49 / 254)


def test_a_number_that_is_refused_passes_nothing(tmp_path: Path) -> None:
    run: dict[str, dict[str, Answers]] = {"w4": {"a": [True, None]}}
    gate = {"floors": {"a": 0, "average": 0}, "retention": {"w4": 0}, "min_gain": -100}
    found = verdict(tmp_path, gate, **run)
    assert [check.demand for check in found.shortfalls] == [
        *("complete", "floor", "floor", "retention", "gain"),
    ]
    assert verdict(tmp_path, {"complete": False}, **run).passed


def test_an_override_opens_a_closed_gate_and_stays_visible(tmp_path: Path) -> None:
    closed = verdict(tmp_path, {"floors": {"a": 100}}, **RUN)
    with pytest.raises(GateClosed, match=r"GRACE W4G128, a: 75.00 %, 25.00 below"):
        require_open(closed)
    overridden = verdict(tmp_path, {"floors": {"a": 100}, "override": "a demo"}, **RUN)
    require_open(overridden)
    assert not overridden.passed and overridden.override == "a demo"


def test_a_floor_for_what_is_not_measured_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"floors: nothing is scored on mmbench; there are avera"):
        load_config(ROOT / "configs/toy.yaml", ["evaluation.gate.floors={mmbench: 50}"])
    for limits, says in (
        ("{mmbench: 5}", r"max_parse_failures: nothing is scored on mmbench; there are toy-choi"),
        ("{toy-choice: 101}", r"gate.max_parse_failures.toy-choice: should be less than or equal"),
        ("-1", r"gate.max_parse_failures.others: should be greater than or equal to 0"),
        ("true", r"gate.max_parse_failures.others: a number is meant, not true or false"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_config(ROOT / "configs/toy.yaml", [f"evaluation.gate.max_parse_failures={limits}"])
