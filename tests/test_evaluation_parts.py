"""A part of a benchmark is called one, from the rows to the model card."""

from __future__ import annotations

import base64
import csv
import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grace_core.config.evaluation import Gate
from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.declaration import identified
from grace_core.evaluation.gate import judge
from grace_core.evaluation.items import Gold
from grace_core.evaluation.loading.cells import AsFound
from grace_core.evaluation.loading.place import Wanted, locate
from grace_core.evaluation.loading.rows import Questions, load_questions
from grace_core.evaluation.prompts import LLAVA
from grace_core.evaluation.recorded import read_items, read_responses
from grace_core.evaluation.report.comparison import compare
from grace_core.evaluation.report.document import make_report, published_beside
from grace_core.evaluation.report.files import report_files
from grace_core.evaluation.report.recorded import find_recorded
from grace_core.evaluation.score import BenchmarkScore, score
from grace_core.publish.release_facts import results_of
from grace_core.stages import StageContext
from grace_core.stages.evaluation import evaluate
from tests.benchmark_rows import BLUE, RED, ROWS, SCHEMAS, write_jsonl
from tests.evaluation_process import toy_config
from tests.recorded_evaluations import write_recorded

# --- which number of items is a part


def golds_of(name: str, count: int, **row: Any) -> list[Gold]:
    benchmark = find_benchmark(name)
    options = {"options": ["a", "b"]} if name == "mmmu" else {}  # texts stand for lists in files
    rows = [{**ROWS[name][0], **options, **row} for _ in range(count)]
    return [benchmark.gold(each, item_id) for item_id, each in identified(benchmark, rows)]


def part_of(name: str, golds: list[Gold], **known: bool) -> tuple[int, ...]:
    return score(find_benchmark(name), golds, [], **known).part_of  # type: ignore[arg-type]


def test_a_total_counts_for_the_set_that_it_is_the_size_of() -> None:
    assert part_of("mmmu", golds_of("mmmu", 150)) == (900,), "of validation, as the ids say"
    assert part_of("mmmu", golds_of("mmmu", 150, id="dev_Music_1")) == ()
    assert part_of("mmmu", golds_of("mmmu", 149, id="dev_Music_1")) == (900, 150)
    assert part_of("mmmu", golds_of("mmmu", 900)) == ()
    assert part_of("scienceqa", golds_of("scienceqa", 2017)) == ()
    plain = golds_of("scienceqa", 1, image=None)
    assert part_of("scienceqa", [*golds_of("scienceqa", 2016), *plain]) == (4241,)
    assert part_of("hallusionbench", golds_of("hallusionbench", 951)) == ()
    assert part_of("hallusionbench", golds_of("hallusionbench", 951, image=None)) == (1129,)
    assert part_of("mmbench", golds_of("mmbench", 2040)) == (4329, 4377, 6666)
    assert part_of("mmbench", golds_of("mmbench", 4377)) == ()


def test_what_is_known_of_the_rows_decides_before_their_number() -> None:
    assert part_of("mmmu", golds_of("mmmu", 900), part=True) == (900,)
    assert part_of("mmmu", golds_of("mmmu", 901), declared=True) == (), "the data set has grown"
    assert part_of("mmbench", golds_of("mmbench", 50), part=True, declared=True) == (4329,)
    assert part_of("toy-choice", [], part=True) == (), "generated, of any size"


# --- which items are taken


ROTATED = 1_000_000


def write_rotations(folder: Path) -> Path:
    """Three questions, their rotations after all of them, whose pictures are that of the last."""
    first, again = ({**row, "image": ""} for row in ROWS["mmbench"])
    picture = base64.b64encode(BLUE).decode()
    rows = [{**first, "index": str(index), "image": picture} for index in (7, 8, 9)]
    rows += [{**again, "index": str(index + ROTATED), "image": "9"} for index in (7, 8, 9)]
    with (folder / "rows.tsv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, SCHEMAS["mmbench"].names, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return folder / "rows.tsv"


def questions_of(name: str, path: Path, limit: int | None) -> Questions:
    declared = find_benchmark(name)
    place = locate(declared, Wanted(path=path))
    return load_questions(declared, place, limit=limit, style=LLAVA, store=AsFound())


@pytest.mark.parametrize(
    ("limit", "ids", "part"),
    [
        (1, ["7", "1000007"], True),
        (2, ["7", "8", "1000007", "1000008"], True),
        (3, ["7", "8", "9", "1000007", "1000008", "1000009"], False),
        (4, ["7", "8", "9", "1000007", "1000008", "1000009"], False),
        (None, ["7", "8", "9", "1000007", "1000008", "1000009"], False),
    ],
)
def test_a_question_is_taken_with_all_its_rotations(
    tmp_path: Path, limit: int | None, ids: list[str], part: bool
) -> None:
    found = questions_of("mmbench", write_rotations(tmp_path), limit)
    assert [item.id for item in found.items] == ids
    assert found.part is part
    for item in found.items:  # also that of a row that is passed over
        assert item.question.pictures[0].encoded() == BLUE


def test_where_items_are_questions_the_first_are_taken(tmp_path: Path) -> None:
    """The row of a video between them belongs to another benchmark and is not left out."""
    folder = write_jsonl("seedbench", tmp_path / "data")
    for limit, count, part in ((1, 1, True), (2, 2, False), (None, 2, False)):
        found = questions_of("seedbench", folder, limit)
        assert (len(found.items), found.part) == (count, part)


# --- real answers


def first_of(folder: Path, name: str, count: int) -> BenchmarkScore:
    benchmark = find_benchmark(name)
    items = read_items(benchmark, folder / "items.jsonl")
    golds = items.golds[:count]
    ids = {gold.id for gold in golds}
    said = [each for each in read_responses(folder / "responses.jsonl") if each.item_id in ids]
    return score(benchmark, golds, said)


@pytest.mark.parametrize(
    ("name", "count", "percent"),
    [("mmbench", 1000, 76.1), ("mmbench", 2040, 73.0), ("mmmu", 150, 44.7)],
)
def test_the_first_rows_of_real_answers_are_no_benchmark(
    shared_data: Path, name: str, count: int, percent: float
) -> None:
    """They score 5 to 9 points above the whole: 67.7 and 36.6."""
    found = first_of(shared_data / "golden" / f"{name}-llava-1.5-13b", name, count)
    assert found.accuracy == pytest.approx(percent, abs=0.05)
    assert found.part_of


def test_whole_questions_of_real_answers_are_scored_like_all(shared_data: Path) -> None:
    folder = shared_data / "golden" / "mmbench-llava-1.5-13b"
    benchmark = find_benchmark("mmbench")
    items = read_items(benchmark, folder / "items.jsonl")
    first = list(dict.fromkeys(gold.fields["question"] for gold in items.golds))[:1000]
    golds = [gold for gold in items.golds if gold.fields["question"] in set(first)]
    ids = {gold.id for gold in golds}
    said = [each for each in read_responses(folder / "responses.jsonl") if each.item_id in ids]
    found = score(benchmark, golds, said, part=True)
    assert found.accuracy == pytest.approx(67.7, abs=2.0), "76.1 without the rotations"


# --- what is made of it


def test_report_gate_and_card_say_that_it_is_a_part(tmp_path: Path) -> None:
    source = {"repository": "Lin-Chen/MMStar", "revision": "c" * 40, "config": "val"}
    more = {
        "part_of": [1500],
        "source": source | {"split": "val", "prompt": "grace", "declared": True},
    }
    answers = {"mmstar": [True] * 40 + [False] * 10}
    models = find_recorded(
        [write_recorded(tmp_path / label, label, answers, scores=more) for label in ("bf16", "w4")]
    )
    comparison = compare(models, seed=0)
    verdict = judge(Gate(floors={"mmstar": 70}), models, comparison)
    assert [check.problem for check in verdict.shortfalls] == [
        f"GRACE {form}, mmstar: 50 of 1,500 items, which is not the whole benchmark; leave out "
        "evaluation.items, and name its whole data"
        for form in ("BF16", "W4G128")
    ]
    assert verdict.shortfalls[0].found == pytest.approx(100 * 50 / 1500)
    assert judge(Gate(complete=False), models, comparison).passed

    report = make_report(models, title="t", gate=verdict)
    files = report_files(report)
    assert "mmstar (50 of 1,500 items)" in files["table.md"].splitlines()[0]
    assert '<th scope="col">mmstar (50 of 1,500 items)</th>' in files["index.html"]
    assert "a part: 50 of 1,500 items" in files["index.html"]
    assert report.table().to_dict()["parts"] == {"mmstar": "50 of 1,500 items"}

    found = results_of(models[1], report.table(), "2026-11-24")
    facts = found.facts("mmstar")
    assert (facts.part, facts.prompt, facts.declared) == ("50 of 1,500 items", "grace", True)
    assert found.scores == {"mmstar": 80.0} and found.whole == {}


def test_published_figures_stand_beside_no_part(tmp_path: Path) -> None:
    for part, beside in (([], {"mmstar": 65.8}), ([1500], None)):
        folder = tmp_path / str(len(part))
        write_recorded(folder, "w4", {"mmstar": [True]}, scores={"part_of": part})
        (model,) = find_recorded([folder])
        config = {"publish": {"base_model": "Qwen/Qwen3-VL-2B-Instruct"}}
        model = replace(model, manifest=cast(Any, SimpleNamespace(run_config=config)))
        found = published_beside([model])
        assert (None if found is None else found.scores["w4"]) == beside


@pytest.mark.slow
def test_a_model_s_evaluation_records_what_it_was_asked(tmp_path: Path) -> None:
    """The toy student on one of two questions about a picture, which it cannot answer."""
    folder = write_jsonl("mmstar", tmp_path / "data")
    entry = f"{{name: mmstar, path: {folder}, items: 1, prompt: grace}}"
    config = toy_config(
        tmp_path / "run", f"evaluation.benchmarks=[{entry}]", "evaluation.max_new_tokens=1"
    )
    (model,) = find_recorded([evaluate(config, "baseline", None, StageContext()).path])
    found = model.scores["mmstar"]
    assert found.part == "1 of 1,500 items"
    assert found.source is not None and found.source.prompt == "grace"
    (item,) = model.items["mmstar"]
    assert item.cluster == hashlib.sha256(RED).hexdigest()
    assert found.cut_off == found.parse_failures == 1
