"""What is said of benchmarks before a run: where they are, and whether they fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from grace_core.doctor.benchmarks import Size, check_benchmarks, missing_benchmarks
from grace_core.doctor.findings import Severity
from tests.benchmark_rows import ROWS, SCHEMAS, write_jsonl
from tests.findings import one, toy
from tests.hub_server import Blob, Hub, Repository, running_hub

TOKEN = "hf_NeverToBeSeenAnywhere"
CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: test, path: data/test-*}
  - {split: train, path: data/train-*}
---
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub(TOKEN) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        yield running


def test_generated_benchmarks_need_nothing() -> None:
    assert check_benchmarks(toy()) == ([], [])


def test_rows_on_this_machine_are_tried(tmp_path: Path) -> None:
    folder = write_jsonl("ai2d", tmp_path / "ai2d")
    config = toy(f"evaluation.benchmarks=[{{name: ai2d, path: {folder}}}]")
    one(check_benchmarks(config)[0], Severity.OK, "ai2d: the first 1 items of")
    (folder / "images" / "0-image.png").write_bytes(b"no picture")
    one(check_benchmarks(config)[0], Severity.PROBLEM, "none of the formats")
    (folder / "rows.jsonl").write_text(json.dumps({"question": "Which?"}) + "\n")
    one(check_benchmarks(config)[0], Severity.PROBLEM, "column 'options', which should hold a list")


def test_a_path_that_is_not_here_is_a_problem(tmp_path: Path) -> None:
    config = toy(f"evaluation.benchmarks=[{{name: ai2d, path: {tmp_path / 'none'}}}]")
    for found in (missing_benchmarks(config), check_benchmarks(config)[0]):
        one([*found], Severity.PROBLEM, "ai2d: not on this machine")


def test_a_part_that_is_to_be_published_is_told_of(tmp_path: Path) -> None:
    folder = write_jsonl("ai2d", tmp_path / "ai2d")
    part = f"evaluation.benchmarks=[{{name: ai2d, path: {folder}, items: 1}}, toy-choice]"
    one([*missing_benchmarks(toy(part))], Severity.WARNING, "items: a part is asked of ai2d, and")
    for aside in ("publish.enabled=false", "evaluation.gate.complete=false"):
        assert not [*missing_benchmarks(toy(part, aside))]
    assert not [*missing_benchmarks(toy("evaluation.items=5"))], "generated"


def test_the_hub_is_asked_and_nothing_is_downloaded(hub: Hub) -> None:
    repository = hub.repositories["lmms-lab/ai2d"] = Repository(private=False)
    commit = repository.add_commit(
        {
            "README.md": Blob(CARD, large=False),
            "data/test-1.parquet": Blob(bytes(6176), large=True),
            "data/train-1.parquet": Blob(bytes(99_999), large=True),
        }
    )
    found, sizes = check_benchmarks(toy("evaluation.benchmarks=[{name: ai2d, items: 772}, mmstar]"))
    one(found, Severity.WARNING, "ai2d, mmstar come from the Hub as they are that day")
    one(found, Severity.OK, f"ai2d: lmms-lab/ai2d at {commit[:12]} can be had")
    one(found, Severity.PROBLEM, "mmstar: Lin-Chen/MMStar is no data set of the Hub")
    # A quarter of the 3088 items is packed; files are downloaded whole, those of the split alone.
    assert sizes == [Size("ai2d", 6176 / 4, 6176), Size("mmstar")]
    assert not [request for request in hub.requests if "/resolve/" in request]
    pinned = toy(f"evaluation.benchmarks=[{{name: ai2d, revision: {commit}}}]")
    assert [each.severity for each in check_benchmarks(pinned)[0]] == [Severity.OK]


def test_a_split_that_the_hub_does_not_have_is_a_problem(hub: Hub) -> None:
    repository = hub.repositories["lmms-lab/ai2d"] = Repository(private=False)
    files = {"README.md": Blob(CARD, large=False), "data/test-1.parquet": Blob(b"x", large=True)}
    repository.add_commit(files)
    found, _ = check_benchmarks(toy("evaluation.benchmarks=[{name: ai2d, split: val}]"))
    one(found, Severity.PROBLEM, "no split 'val'; there are test, train: set `split`")


def test_made_up_rows_have_every_column_of_their_schema() -> None:
    for name, rows in ROWS.items():
        assert all(set(row) == set(SCHEMAS[name].names) for row in rows), name
