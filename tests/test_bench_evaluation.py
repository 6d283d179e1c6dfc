"""grace bench evaluation, on toy shapes: both ways do the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from grace_core.bench.evaluation import EvaluationTable, Rate
from grace_core.bench.questions import WORKLOADS, random_questions
from grace_core.bench.shapes import TOY
from grace_core.cli.app import app


@pytest.mark.slow
def test_both_ways_give_the_same_answers(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    arguments = ["--shapes", "toy", "--device", "cpu", "--dtype", "float32"]
    arguments += ["--questions", "12", "--one-at-a-time", "4", "--output", str(tmp_path)]
    try:
        torch.set_num_threads(1)
        done = CliRunner().invoke(app, ["bench", "evaluation", *arguments])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [rate["workload"] for rate in found["rates"]] == ["letters", "rotations", "sentences"]
    assert all(rate["same"] == rate["plain_questions"] > 0 for rate in found["rates"])
    assert all(rate["speed_up"] > 0 for rate in found["rates"])
    assert "| sentences |" in (tmp_path / "evaluation.md").read_text()


def test_rates() -> None:
    rate = Rate("letters", "as said", 60, 3.0, 4, 2.0, 4, 20.0, 2)
    assert (rate.a_second, rate.plain_a_second, rate.speed_up) == (20.0, 2.0, 10.0)
    versions = {"torch": "2", "transformers": "5"}
    text = EvaluationTable("toy", "a CPU", versions, [rate]).to_markdown()
    assert "| letters | as said | 20 | 2 | 10.0 | 20 | no | 4 of 4 |" in text


@pytest.mark.parametrize("workload", WORKLOADS)
def test_pictures_are_shared_as_said(workload) -> None:  # type: ignore[no-untyped-def]
    asked = random_questions(workload, TOY, 8)
    keys = [question.pictures[0].key for question in asked]
    assert len(set(keys)) == 8 // workload.a_picture
    assert asked == random_questions(workload, TOY, 8)
