"""The bootstrap against every possible resample, and what is concluded from it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from grace_core.errors import GraceError
from grace_core.evaluation.report import resampling
from grace_core.evaluation.report.comparison import AVERAGE, Comparison, compare
from grace_core.evaluation.report.document import make_report
from grace_core.evaluation.report.published import published_for
from grace_core.evaluation.report.recorded import RecordedModel, find_recorded, read_recorded
from grace_core.evaluation.report.resampling import interval, resample
from tests.recorded_evaluations import Answers, recorded_files, write_recorded
from tests.test_evaluation_score import PUBLISHED, PUBLISHED_AVERAGES


def every_resample(correct: np.ndarray, groups: list[str], whole: bool) -> np.ndarray:
    """Shares (resamples, models) of all ways to draw the groups with replacement."""
    names = list(dict.fromkeys(groups))
    found = []
    for drawn in itertools.product(names, repeat=len(names)):
        chosen = [[at for at, group in enumerate(groups) if group == one] for one in drawn]
        if whole:
            found.append(np.mean([correct[rows].all(axis=0) for rows in chosen], axis=0))
        else:
            found.append(correct[np.concatenate(chosen)].mean(axis=0))
    return 100 * np.array(found)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("groups", ["abcde", "aabbbccd"])
def test_resamples_have_the_distribution_of_all_possible_ones(groups: str, whole: bool) -> None:
    random = np.random.default_rng(3)
    correct = random.random((len(groups), 2)) < 0.6
    exact = every_resample(correct, list(groups), whole)
    drawn = resample(correct, list(groups), whole_groups=whole, seed=1, name="b", resamples=200_000)
    for of_exact, of_drawn in (
        (exact[:, 0], drawn.draws[:, 0]),
        (exact[:, 0] - exact[:, 1], drawn.draws[:, 0] - drawn.draws[:, 1]),
    ):
        values = np.unique(np.round(of_exact, 6))
        for value in values:
            expected = np.mean(np.isclose(of_exact, value))
            found = np.mean(np.isclose(of_drawn, value))
            assert abs(found - expected) < 0.006, "five standard errors of 200,000 draws"
        assert np.isin(np.round(np.unique(of_drawn), 6), values).all()


def test_the_interval_of_a_large_sample_is_the_normal_one() -> None:
    random = np.random.default_rng(0)
    one = random.random(20_000) < 0.70
    other = np.where(random.random(20_000) < 0.9, one, ~one)
    drawn = resample(
        np.stack([one, other], axis=1), range(20_000), whole_groups=False, seed=0, name="b"
    )
    within = interval(drawn.draws[:, 0] - drawn.draws[:, 1])
    differences = 100 * (one.astype(float) - other)
    half = 1.96 * differences.std() / np.sqrt(20_000)
    assert within.low == pytest.approx(differences.mean() - half, abs=0.06 * half)
    assert within.high == pytest.approx(differences.mean() + half, abs=0.06 * half)


def clustered(random: np.random.Generator, pictures: int, questions: int) -> np.ndarray:
    """Answers (pictures x questions, 1), right by what is shown as much as by what is asked.

    A picture's share of right answers is uniform in [0, 1], so half of all answers are right.
    """
    hard = random.random((pictures, 1))
    return (random.random((pictures, questions)) < hard).reshape(-1, 1)


def test_intervals_cover_the_truth_where_questions_share_a_picture() -> None:
    """18 questions about each of 60 pictures, 300 times: 95 % of the intervals should hold 50."""
    random = np.random.default_rng(5)
    held = {"pictures": 0, "items alone": 0}
    for trial in range(300):
        correct = clustered(random, 60, 18)
        picture = np.repeat(range(60), 18).tolist()
        for name, clusters in (("pictures", picture), ("items alone", range(60 * 18))):
            drawn = resample(
                correct,
                range(60 * 18),
                whole_groups=False,
                clusters=clusters,
                seed=trial,
                name="b",
                resamples=1000,
            )
            within = interval(drawn.draws[:, 0])
            held[name] += within.low <= 50 <= within.high
    assert 0.91 <= held["pictures"] / 300 <= 0.98  # three standard errors about 94.5 %
    assert held["items alone"] / 300 < 0.65


def test_groups_are_drawn_with_their_cluster() -> None:
    """Questions asked in several items, two of them about one picture: every possible draw."""
    groups, clusters = "aabbccd", "xxxxyyz"
    correct = np.array([[1, 1], [1, 0], [1, 1], [1, 1], [0, 1], [1, 1], [1, 0]], dtype=bool)
    of_group = {
        group: correct[[at for at, one in enumerate(groups) if one == group]].all(axis=0)
        for group in "abcd"
    }
    per_cluster = {"x": "ab", "y": "c", "z": "d"}
    exact = []
    for drawn in itertools.product("xyz", repeat=3):
        chosen = [of_group[group] for cluster in drawn for group in per_cluster[cluster]]
        exact.append(100 * np.mean(chosen, axis=0))
    found = resample(
        correct,
        groups,
        whole_groups=True,
        clusters=clusters,
        seed=1,
        name="b",
        resamples=200_000,
    )
    assert found.value.tolist() == [75.0, 50.0]
    values, counts = np.unique(np.round(exact, 6), axis=0, return_counts=True)
    for value, count in zip(values, counts, strict=True):
        share = np.isclose(found.draws, value).all(axis=1).mean()
        assert abs(share - count / 27) < 0.006, "five standard errors of 200,000 draws"


def test_a_large_set_is_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = clustered(np.random.default_rng(1), 50, 18)
    clusters = np.repeat(range(50), 18).tolist()
    found = []
    for at_once in (10_000_000, 100):
        monkeypatch.setattr(resampling, "_COUNTS_AT_ONCE", at_once)
        drawn = resample(
            correct, range(900), whole_groups=False, clusters=clusters, seed=1, name="b"
        )
        found.append(drawn.draws)
    assert found[0].shape == (10_000, 1) and (found[0] == found[1]).all()


def models_of(folder: Path, **answers: dict[str, Answers]) -> list[RecordedModel]:
    return find_recorded(
        [write_recorded(folder / label, label, scores) for label, scores in answers.items()]
    )


def difference(comparison: Comparison, first: str, second: str, on: str) -> tuple[float, str]:
    (found,) = [
        each
        for each in comparison.differences
        if (each.first, each.second, each.on) == (first, second, on)
    ]
    assert found.interval.low <= found.value <= found.interval.high
    return round(found.value, 6), found.verdict


def test_verdicts_follow_the_intervals(tmp_path: Path) -> None:
    right: Answers = [True] * 90 + [False] * 10
    nearly: Answers = [False, True, *right[2:99], True]
    models = models_of(
        tmp_path,
        baseline={"a": [True] * 40 + [False] * 60, "b": [True] * 50 + [False] * 50},
        bf16={"a": right, "b": right},
        w4={"a": nearly, "b": right},
    )
    comparison = compare(models, seed=0)
    w4, bf16, baseline = "GRACE W4G128", "GRACE BF16", "Baseline"
    assert difference(comparison, w4, bf16, "a") == (0.0, "no difference shown")
    assert difference(comparison, w4, bf16, "b") == (0.0, "no difference shown")
    assert difference(comparison, bf16, baseline, "a") == (50.0, "better")
    assert difference(comparison, w4, baseline, AVERAGE) == (45.0, "better")
    (only,) = [each for each in comparison.differences if (each.first, each.on) == (w4, "a")][:1]
    assert (only.only_first, only.only_second) == (1, 1)
    assert comparison.estimates[bf16][AVERAGE].value == 90.0
    (kept,) = comparison.retention
    assert (kept.model, kept.of, kept.value) == (w4, bf16, 100.0)
    assert kept.interval is not None and kept.interval.low < 100.0 < kept.interval.high


def test_a_report_is_the_same_again(tmp_path: Path) -> None:
    models = models_of(tmp_path, bf16={"a": [True] * 7 + [False] * 3}, w4={"a": [True, False] * 5})
    assert compare(models, seed=4) == compare(models, seed=4)


def test_groups_stand_or_fall_together(tmp_path: Path) -> None:
    answers: Answers = [True, True, True, False]
    write_recorded(tmp_path / "w4", "w4", {"a": answers}, groups={"a": ["x", "x", "y", "y"]})
    comparison = compare(find_recorded([tmp_path / "w4"]), seed=0)
    estimate = comparison.estimates["GRACE W4G128"]["a"]
    assert estimate.value == 50.0 and estimate.interval is not None
    assert (estimate.interval.low, estimate.interval.high) == (0.0, 100.0)


def test_items_about_one_picture_are_drawn_together(tmp_path: Path) -> None:
    folder = write_recorded(tmp_path / "w4", "w4", {"a": [True] * 50 + [False] * 50})
    alone = compare(find_recorded([folder]), seed=0).estimates["GRACE W4G128"]["a"].interval
    lines = folder / "predictions" / "a.jsonl"
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    for at, record in enumerate(records):
        record["cluster"] = str(at // 50)
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    within = compare(find_recorded([folder]), seed=0).estimates["GRACE W4G128"]["a"].interval
    assert alone is not None and 39 < alone.low < alone.high < 61
    assert within is not None and (within.low, within.high) == (0.0, 100.0)
    one = [json.dumps(record | {"cluster": "one"}) + "\n" for record in records]
    lines.write_text("".join(one))
    refused = compare(find_recorded([folder]), seed=0)
    assert refused.estimates["GRACE W4G128"]["a"].interval is None
    assert "about one picture" in refused.unresampled["a"]


def test_partly_right_answers_count_in_part_and_items_may_be_left_out(tmp_path: Path) -> None:
    folder = write_recorded(tmp_path / "w4", "w4", {"a": [True, False, True, True]})
    lines = folder / "predictions" / "a.jsonl"
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    records[1] |= {"credit": 0.3}
    records[3] |= {"counted": False}
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    results = json.loads((folder / "results.json").read_text())
    results["benchmarks"]["a"]["headline"]["percent"] = 230 / 3
    (folder / "results.json").write_text(json.dumps(results))
    comparison = compare(find_recorded([folder]), seed=0)
    assert comparison.unresampled == {}
    within = comparison.estimates["GRACE W4G128"]["a"].interval
    assert within is not None
    # All draws the partly right one in 1 of 27, never in 8 of 27; each is more than 2.5 %.
    assert (within.low, within.high) == (pytest.approx(30.0), pytest.approx(100.0))


def test_categories_follow_the_rule_of_the_headline(tmp_path: Path) -> None:
    folder = write_recorded(tmp_path / "w4", "w4", {"a": [True, False]})
    results = json.loads((folder / "results.json").read_text())
    score = results["benchmarks"]["a"]
    score["headline"]["metric"] = "official.circular"
    names = ("official.circular_by_category.x.y", "official.by_l2.z", "policy.by_category.x.y")
    score["metrics"] = {name: {"percent": 50.0} for name in (*names, "official.circular")}
    (folder / "results.json").write_text(json.dumps(results))
    made = make_report(find_recorded([folder]), title="t")
    shown = {kind: list(values) for kind, values in made.categories("a").items()}
    assert shown == {"category": ["x.y"], "l2": ["z"]}


def test_what_cannot_be_compared_is_told_and_left_out(tmp_path: Path) -> None:
    more = models_of(tmp_path, bf16={"a": [True] * 4}, w4={"a": [True] * 5})
    told = compare(more, seed=0)
    assert told.unresampled == {"a": "GRACE W4G128 was scored on other items than GRACE BF16"}
    assert told.differences == [] and told.estimates["GRACE BF16"]["a"].interval is None

    files = recorded_files("w8", {"a": [True, False]})
    text = files["results.json"].replace(
        '"headline": {"metric": "policy.accuracy", "percent": 50',
        '"headline": {"metric": "policy.mean_of_three", "percent": 43',
    )
    folder = write_recorded(tmp_path / "w8", "w8", {"a": [True, False]})
    (folder / "results.json").write_text(text)
    assert "no share of items" in compare(find_recorded([folder]), seed=0).unresampled["a"]


def test_a_refused_number_takes_part_in_nothing(tmp_path: Path) -> None:
    models = models_of(
        tmp_path, bf16={"a": [True, None], "b": [True]}, w4={"a": [True], "b": [True]}
    )
    comparison = compare(models, seed=0)
    assert comparison.estimates["GRACE BF16"].keys() == {"b"}
    assert comparison.retention == []


def test_two_runs_of_one_label_are_told_apart(tmp_path: Path) -> None:
    for run in ("first", "second"):
        write_recorded(tmp_path / run / "artifacts" / "evaluate-w4-0", "w4", {"a": [True]})
    places = [tmp_path / run / "artifacts" / "evaluate-w4-0" for run in ("first", "second")]
    assert [model.key for model in find_recorded(places)] == [
        *("GRACE W4G128 (first)", "GRACE W4G128 (second)"),
    ]


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="holds no evaluation"):
        find_recorded([tmp_path])
    folder = write_recorded(tmp_path / "w4", "w4", {"a": [True, False]})
    lines = folder / "predictions" / "a.jsonl"
    lines.write_text(lines.read_text().splitlines()[0] + "\n")
    with pytest.raises(GraceError, match=r"a\.jsonl has 1 items, .* counts 2"):
        read_recorded(folder)
    lines.write_text("{\n")
    with pytest.raises(GraceError, match=r"a\.jsonl:1 is not as"):
        read_recorded(folder)


def test_published_figures_are_the_card_s() -> None:
    names = ("hallusionbench", "mmbench", "scienceqa", "ai2d", "mmmu", "seedbench", "mmstar")
    card = published_for("Qwen/Qwen3-VL-2B-Instruct", names)
    assert card is not None and card.averages == PUBLISHED_AVERAGES
    assert {label: tuple(row[name] for name in names) for label, row in card.scores.items()} == (
        PUBLISHED
    )
    some = published_for("Qwen/Qwen3-VL-2B-Instruct", ("mmbench", "toy-choice"))
    assert some is not None and some.averages == {}, "an average over other benchmarks"
    assert some.scores["w4"] == {"mmbench": 84.6}
    paper = published_for("Qwen/Qwen2-VL-2B-Instruct", ("scienceqa", "mmbench", "seedbench"))
    assert paper is not None and paper.averages["w4"] == 77.2
    assert published_for("somebody/else", names) is None
    assert published_for("Qwen/Qwen3-VL-2B-Instruct", ("toy-choice",)) is None
