"""Metrics of the seven benchmarks on small hand-counted rows in the data sets' own columns."""

from __future__ import annotations

from typing import Any

import pytest

from grace_core.evaluation.benchmarks import BENCHMARKS
from grace_core.evaluation.declaration import identified
from grace_core.evaluation.items import Prediction
from grace_core.evaluation.score import BenchmarkScore, score


def scored(name: str, rows: list[dict[str, Any]], said: dict[str, str]) -> BenchmarkScore:
    benchmark = BENCHMARKS[name]
    named = list(identified(benchmark, rows))
    golds = [benchmark.gold(row, item_id) for item_id, row in named]
    aside = {item_id for item_id, row in named if not benchmark.keep(row)}
    predictions = [Prediction(item_id, response) for item_id, response in said.items()]
    return score(benchmark, golds, predictions, aside)


def counts(result: BenchmarkScore, prefix: str = "") -> dict[str, tuple[int | None, int | None]]:
    return {
        name.removeprefix(prefix): (metric.correct, metric.total)
        for name, metric in result.metrics.items()
        if name.startswith(prefix)
    }


def rotation(index: int, answer: str | None, **options: str | None) -> dict[str, Any]:
    given = {"A": "red", "B": "blue", "C": None, "D": None, **options}
    return {"index": index, "answer": answer, "category": "colour", "L2-category": "low", **given}


def test_mmbench_counts_questions_by_index_not_by_options() -> None:
    rows = [
        rotation(1, "A"),
        rotation(1_000_001, "B"),
        rotation(2, "D", C="green", D="None"),  # four options, two rotations
        rotation(1_000_002, "C", C="NA", D="nan"),
        rotation(3, "B", C="nan", D="nan"),
    ]
    said = {"1": "A", "1000001": "A", "2": "D", "1000002": "C. NA", "3": "b"}
    result = scored("mmbench", rows, said)
    assert counts(result, "policy.") == {
        "circular": (2, 3),
        "vanilla_all_rows": (4, 5),
        "unrotated_rows": (3, 3),
        "circular_by_category.colour": (2, 3),
        "circular_by_l2_category.low": (2, 3),
    }
    # The authors' rule reads no lower-case letter.
    assert result.metrics["official.circular"].correct == 1
    assert result.headline is not None and result.headline[0] == "official.circular"


def test_mmbench_options_named_like_nothing_stay() -> None:
    gold = BENCHMARKS["mmbench"].gold
    assert gold(rotation(1, "A", A="None", B="NA"), "1").choices == {"A": "None", "B": "NA"}
    kept = gold(rotation(1, "D", C="nan", D="null"), "1").choices
    assert kept == {"A": "red", "B": "blue", "C": "nan", "D": "null"}
    with pytest.raises(ValueError, match="option C is missing"):
        gold(rotation(1, "D", D="green"), "1")
    with pytest.raises(ValueError, match="none of the choices"):
        gold(rotation(1, "C"), "1")


def test_mmbench_half_asked_questions_count_in_no_circle() -> None:
    rows = [rotation(1, "A"), rotation(1_000_001, "B"), rotation(2, "A")]
    result = scored("mmbench", rows, {"1": "A", "2": "A"})
    assert result.metrics["official.circular"].total == 1
    assert result.headline is None


def test_a_split_without_public_answers_has_no_score() -> None:
    result = scored("mmbench", [rotation(1, None), rotation(2, "nan")], {"1": "A", "2": "B"})
    assert result.metrics == {}
    assert result.answered == 2
    assert result.headline_refused == "2 of 2 items have no public answer; hand in the responses"
    assert result.items[1].to_dict() == {
        "id": "2",
        "response": "B",
        "error": None,
        "answer": "B",
        "correct": None,
        "group": "2",
    }


def science(answer: int, picture: bool, options: int = 2) -> dict[str, Any]:
    return {"choices": [f"c{n}" for n in range(options)], "answer": answer, "has_image": picture}


def test_scienceqa_full_and_img() -> None:
    rows = [science(0, True), science(1, False, 3), science(1, True)]
    said = {"0": "The answer is A.", "1": "C", "2": "B) c1"}
    result = scored("scienceqa", rows, said)
    assert counts(result, "official.") == {
        "full": (1, 3),
        "no_image": (0, 1),
        "IMG": (1, 2),
        "by_number_of_choices.2": (1, 2),
        "by_number_of_choices.3": (0, 1),
    }
    assert list(result.headlines) == ["official.full", "official.IMG"]
    assert result.parse_failures == 1
    assert result.metrics["policy.full"].correct == 2


def test_scienceqa_img_alone_has_no_full_score() -> None:
    result = scored("scienceqa", [science(0, True)], {"0": "A"})
    assert list(result.headlines) == ["official.IMG"]
    assert "official.full" not in result.metrics


def test_scienceqa_pictures_are_told_by_the_cell_without_the_added_column() -> None:
    rows = [{"choices": ["a", "b"], "answer": 0, "image": cell} for cell in (None, b"...")]
    result = scored("scienceqa", rows, {"0": "A", "1": "A"})
    assert result.metrics["official.IMG"].total == 1


def test_a_letter_that_is_not_offered_is_read_and_wrong() -> None:
    result = scored("scienceqa", [science(0, True)], {"0": "E"})
    assert (result.parse_failures, result.metrics["official.IMG"].correct) == (0, 0)
    assert [len(rule.parse_failures) for rule in result.rules] == [0, 1]


def test_ai2d() -> None:
    rows = [{"options": ["a", "b", "c", "d"], "answer": answer} for answer in ("0", 1, "3")]
    said = {"0": "A. leaf", "1": "B) leaf", "2": "d"}
    for name in ("ai2d", "ai2d-no-mask"):
        result = scored(name, rows, said)
        assert counts(result) == {"official.accuracy": (2, 3), "policy.accuracy": (3, 3)}
        assert result.part_of == (3088,)
    with pytest.raises(ValueError, match="no position"):
        scored("ai2d", [{"options": ["a"], "answer": "4"}], {})


def mmmu(name: str, answer: str, *options: str, kind: str = "multiple-choice") -> dict[str, Any]:
    return {"id": name, "options": options, "question_type": kind, "answer": answer}


def test_mmmu() -> None:
    rows = [
        mmmu("validation_Math_1", "B", "a", "b"),
        mmmu("validation_Math_2", "B", "None", "it's"),
        mmmu("validation_Art_Theory_3", "['24/7', '3.429']", kind="open"),
        mmmu("validation_Art_Theory_4", "[0, 1)", kind="short-answer"),
    ]
    said = {
        "validation_Math_1": "I do not know what to say",
        "validation_Math_2": "I would say it's that one",
        "validation_Art_Theory_3": "about 3.43",
        "validation_Art_Theory_4": "the interval is [0, 1)",
    }
    result = scored("mmmu", rows, said)
    assert counts(result, "official.fallback_wrong.") == {
        "overall": (3, 4),
        "multiple_choice": (1, 2),
        "open": (2, 2),
        "by_domain.Art and Design": (2, 2),
        "by_domain.Science": (1, 2),
        "by_subject.Art_Theory": (2, 2),
        "by_subject.Math": (1, 2),
    }
    failures = {each.rule.name: each.parse_failures for each in result.rules}
    # "a" stands within "what": option texts are searched there, and here they are not.
    assert failures["policy"] == ("validation_Math_1", "validation_Math_2")
    assert failures["official.fallback_wrong"] == ()


def test_mmmu_rows_that_cannot_be_scored() -> None:
    gold = BENCHMARKS["mmmu"].gold
    assert gold(mmmu("test_Math_1", "?", "a", "b"), "x").answers == ()
    assert gold(mmmu("test_Math_1", "?", kind="open"), "x").answers == ()
    with pytest.raises(ValueError, match="30 subjects"):
        gold(mmmu("validation_Maths_1", "A", "a"), "x")
    with pytest.raises(ValueError, match="0 options"):
        gold(mmmu("validation_Math_1", "A"), "x")


def seed(name: str, kind: str, type_id: int) -> dict[str, Any]:
    return {"question_id": name, "answer": "A", "data_type": kind, "question_type_id": type_id}


def test_seedbench_videos_stay_aside() -> None:
    rows = [seed("1", "image", 1), seed("1", "image", 9), seed("2", "video", 10)]
    result = scored("seedbench", rows, {"1": "A", "1#2": "A."})
    assert counts(result, "official.") == {
        "image": (1, 2),
        "image_by_type.Scene Understanding": (1, 1),
        "image_by_type.Text Understanding": (0, 1),
    }
    assert (result.total, result.missing) == (2, 0)
    assert result.headline is not None
    with_video = scored("seedbench", rows, {"1": "A", "1#2": "B", "2": "A"})
    assert with_video.metrics["official.mixed_image_and_video"].total == 3


def test_mmstar_mean_over_finer_categories_is_not_the_headline() -> None:
    rows = [
        {"index": index, "answer": "A", "category": "math", "l2_category": finer}
        for index, finer in enumerate(["geometry", "geometry", "geometry", "statistics"])
    ]
    result = scored("mmstar", rows, {"0": "A", "1": "a", "2": "An axe", "3": "The letter is A"})
    assert counts(result, "official.") == {
        "micro": (3, 4),
        "by_category.math": (3, 4),
        "by_l2_category.geometry": (3, 3),
        "by_l2_category.statistics": (0, 1),
        "macro_over_l2": (None, None),
    }
    assert result.metrics["official.macro_over_l2"].percent == 50.0
    assert result.headline is not None and result.headline[1].percent == 75.0


def hallusion(figure: str, question: str, gold: str, picture: bool = True) -> dict[str, Any]:
    place = {"category": "VS", "subcategory": "map", "set_id": "1"}
    return {
        **place,
        "figure_id": figure,
        "question_id": question,
        "gt_answer": gold,
        "has_image": picture,
    }


def test_hallusionbench_groups() -> None:
    rows = [
        hallusion("0", "0", "1", picture=False),
        hallusion("0", "1", "0", picture=False),
        hallusion("1", "0", "1"),
        hallusion("1", "1", "0"),
        hallusion("2", "0", "0"),
        hallusion("2", "1", "1"),
    ]
    answers = ["I cannot see it", "No.", "Yes", "no", "No", "No"]
    names = [f"VS_map_1_{row['figure_id']}_{row['question_id']}" for row in rows]
    result = scored("hallusionbench", rows, dict(zip(names, answers, strict=True)))
    # Right: not the first (unread), and not the last.
    assert counts(result, "policy.answered_rows_with_image.") == {
        "aAcc": (3, 4),
        "qAcc_over_answered_rows": (1, 2),
        "fAcc_over_answered_rows": (1, 2),
        "qAcc_complete_groups_only": (1, 2),
        "fAcc_complete_groups_only": (1, 2),
    }
    assert counts(result, "policy.answered_rows_all.") == {
        "aAcc": (4, 6),
        "qAcc_over_answered_rows": (0, 2),
        "fAcc_over_answered_rows": (1, 2),
        "qAcc_complete_groups_only": (0, 2),
        "fAcc_complete_groups_only": (1, 2),
    }
    lenient = counts(result, "policy.answered_rows_all_lenient.")
    assert lenient["aAcc"] == (5, 6)
    assert lenient["qAcc_complete_groups_only"] == (1, 2)
    # Of the answers to figure 2 one is missing: its group counts by what there is, or not at all.
    part = scored("hallusionbench", rows, dict(zip(names[:5], answers[:5], strict=True)))
    metrics = counts(part, "policy.answered_rows_with_image.")
    assert metrics["fAcc_over_answered_rows"] == (2, 2)
    assert metrics["fAcc_complete_groups_only"] == (1, 1)
    assert part.headline is None
