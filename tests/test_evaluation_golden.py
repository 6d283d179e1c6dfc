"""Real rows and real responses: every metric that the golden sets record comes out the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.recorded import read_items, read_responses
from grace_core.evaluation.report.comparison import compare
from grace_core.evaluation.report.recorded import find_recorded
from grace_core.evaluation.score import BenchmarkScore, score

SETS = {
    "hallusionbench-gpt-4v": 49,
    "mmbench-llava-1.5-13b": 0,
    "mmmu-llava-1.5-13b": 2,
    "mmstar-llava-next-yi-34b": 0,
    "scienceqa-llava-13b-v0": 0,
    "seedbench-llava-1.5-13b": 0,
}
"""Golden set -> responses that the headline's rule reads nothing from."""

NOT_OURS = ("identical_question_text", "fallback_random_seed42", "recorded_parses")
"""Recorded values that need more than items and responses, or a random state."""


def counted(node: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Metrics of `expected.json`, by the path that leads to them."""
    if isinstance(node, dict) and {"correct", "total", "accuracy"} <= node.keys():
        yield name, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from counted(value, f"{name}.{key}" if name else key)


def scored(folder: Path, name: str) -> BenchmarkScore:
    benchmark = find_benchmark(name.partition("-")[0])
    items = read_items(benchmark, folder / "items.jsonl")
    return score(benchmark, items.golds, read_responses(folder / "responses.jsonl"), items.aside)


@pytest.mark.parametrize("name", SETS)
def test_recorded_metrics(shared_data: Path, name: str) -> None:
    folder = shared_data / "golden" / name
    expected = json.loads((folder / "expected.json").read_text())
    result = scored(folder, name)
    recorded = {
        metric: (value["correct"], value["total"])
        for section in ("official", "policy")
        for metric, value in counted(expected[section], section)
        if not any(each in metric for each in NOT_OURS)
    }
    assert len(recorded) >= 4
    found = {each: (value.correct, value.total) for each, value in result.metrics.items()}
    assert {each: found.get(each) for each in recorded} == recorded
    named = [] if expected["headline"] is None else expected["headline"].split(" and ")
    assert list(result.headlines) == named
    assert (result.headline_refused is None) == (expected["headline"] is not None)
    assert result.parse_failures == SETS[name]


@pytest.mark.parametrize("name", [name for name, failures in SETS.items() if failures < 49])
def test_reports_draw_what_the_headline_counts(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    result = scored(shared_data / "golden" / name, name)
    benchmark = result.benchmark.name
    summary = {"label": "w4", "benchmarks": {benchmark: result.to_dict()}}
    (tmp_path / "predictions").mkdir()
    (tmp_path / "results.json").write_text(json.dumps(summary))
    with (tmp_path / "predictions" / f"{benchmark}.jsonl").open("w") as file:
        file.writelines(json.dumps(item.to_dict()) + "\n" for item in result.items)
    (model,) = find_recorded([tmp_path])
    comparison = compare([model], seed=0)
    assert comparison.unresampled == {}
    found = comparison.estimates[model.key][benchmark]
    assert found.interval is not None and result.headline is not None
    total = result.headline[1].total
    assert total is not None
    half = 196 * (found.value / 100 * (1 - found.value / 100) / total) ** 0.5  # of the normal one
    assert found.interval.high - found.interval.low == pytest.approx(2 * half, rel=0.06)


def test_recorded_parse_failures(shared_data: Path) -> None:
    folder = shared_data / "golden" / "mmmu-llava-1.5-13b"
    expected = json.loads((folder / "expected.json").read_text())
    failures = {
        each.rule.name: list(each.parse_failures)
        for each in scored(folder, "mmmu-llava-1.5-13b").rules
    }
    assert failures == {
        "official.fallback_wrong": expected["official"]["fallback_wrong"]["fallback_ids"],
        "policy": expected["policy"]["parse_failure_ids"],
    }


def test_the_mean_over_finer_categories_is_another_number(shared_data: Path) -> None:
    folder = shared_data / "golden" / "mmstar-llava-next-yi-34b"
    metric = scored(folder, "mmstar-llava-next-yi-34b").metrics["official.macro_over_l2"]
    assert metric.percent == pytest.approx(52.7177, abs=1e-4)
    assert metric.total is None


def test_video_rows_are_neither_expected_nor_mixed_in(shared_data: Path) -> None:
    result = scored(shared_data / "golden" / "seedbench-llava-1.5-13b", "seedbench")
    assert (result.total, result.missing) == (14233, 0)
    assert result.headline is not None
    assert result.headline[1].total == 14233
