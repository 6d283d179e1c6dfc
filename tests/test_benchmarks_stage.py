"""Stage `benchmarks`: what it packs is what was found, and its place counts by content."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from grace_core.artifacts import Artifact, verify_artifact
from grace_core.config import load_config
from grace_core.errors import GraceError
from grace_core.evaluation.items import FileSlice
from grace_core.evaluation.loading.prepared import read_items
from grace_core.stages import StageContext
from grace_core.stages.benchmarks import prepare_benchmarks
from grace_core.toy.world import write_benchmark
from tests.benchmark_rows import write_parquet

ROOT = Path(__file__).resolve().parent.parent

Prepare = Callable[..., Artifact]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    def run(*overrides: str) -> Artifact:
        config = load_config(
            ROOT / "configs" / "toy.yaml", [f"run_dir={tmp_path / 'run'}", *overrides]
        )
        return prepare_benchmarks(config, StageContext())

    return run


def chosen(folder: Path, more: str = "") -> str:
    return f"evaluation.benchmarks=[{{name: toy-choice, path: {folder}{more}}}]"


def test_the_toy_benchmarks_are_packed_and_read_back(prepare: Prepare, tmp_path: Path) -> None:
    write_benchmark(tmp_path, seed=1)  # the same ones, as an oracle
    made = prepare()
    for name, count in (("toy-choice", 400), ("toy-yesno", 200)):
        lines = (tmp_path / name / "items.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        items = read_items(made.path / name)
        assert [item.id for item in items] == [row["id"] for row in rows]
        assert [item.gold.answers for item in items] == [(row["answer"],) for row in rows]
        for item, row in zip(items, rows, strict=True):
            picture, text = item.question.content
            assert not isinstance(picture, str) and isinstance(picture.source, FileSlice)
            assert picture.encoded() == (tmp_path / name / row["image"]).read_bytes()
            assert row["question"] in str(text)
        assert made.manifest.metrics[f"{name}/items"] == count
    assert prepare().path == made.path, "found, not made again"


def test_the_pack_is_a_plain_tar_that_holds_each_picture_once(
    prepare: Prepare, tmp_path: Path
) -> None:
    folder, _ = write_benchmark(tmp_path, seed=1, choice_count=6, yesno_count=1)
    lines = (folder / "items.jsonl").read_text().splitlines()
    again = [json.dumps({**json.loads(line), "id": f"again-{line[-20:-12]}"}) for line in lines]
    (folder / "items.jsonl").write_text("\n".join([*lines, *again]) + "\n")
    made = prepare(chosen(folder))
    assert (made.manifest.metrics["toy-choice/items"]) == 12
    pack = made.path / "toy-choice" / "pictures.tar"
    listed = subprocess.run(["tar", "tf", pack], capture_output=True, text=True, check=True)
    keys = {item.question.pictures[0].key for item in read_items(pack.parent)}
    assert sorted(listed.stdout.split()) == sorted(keys)


def test_items_and_prompts_are_limited_by_the_benchmark_before_all(
    prepare: Prepare, tmp_path: Path
) -> None:
    folder, _ = write_benchmark(tmp_path, seed=1, choice_count=6, yesno_count=1)
    made = prepare(chosen(folder, ", items: 2, prompt: grace"), "evaluation.items=4")
    assert len(read_items(made.path / "toy-choice")) == 2
    assert made.manifest.facts["toy-choice"]["prompt"] == "grace"


def test_another_place_of_the_same_rows_is_the_same_content(
    prepare: Prepare, tmp_path: Path
) -> None:
    one, _ = write_benchmark(tmp_path / "one", seed=1, choice_count=6, yesno_count=1)
    two, _ = write_benchmark(tmp_path / "two", seed=1, choice_count=6, yesno_count=1)
    first, second = prepare(chosen(one)), prepare(chosen(two))
    assert first.digest == second.digest
    (source,) = second.manifest.parents.values()
    assert (source.kind, source.path) == ("benchmark", str(two))


def test_changed_rows_are_read_again(prepare: Prepare, tmp_path: Path) -> None:
    folder, _ = write_benchmark(tmp_path, seed=1, choice_count=6, yesno_count=1)
    first = prepare(chosen(folder))
    file = folder / "items.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    os.utime(file, ns=(1, 1))
    second = prepare(chosen(folder))
    assert len(read_items(second.path / "toy-choice")) == 5
    assert second.digest != first.digest


def test_a_damaged_pack_is_noticed(prepare: Prepare, tmp_path: Path) -> None:
    folder, _ = write_benchmark(tmp_path, seed=1, choice_count=6, yesno_count=1)
    made = prepare(chosen(folder))
    picture = read_items(made.path / "toy-choice")[5].question.pictures[0]
    pack = made.path / "toy-choice" / "pictures.tar"
    os.truncate(pack, 100)
    with pytest.raises(OSError, match="ends within"):
        picture.encoded()
    with pytest.raises(GraceError, match=r"pictures\.tar"):
        verify_artifact(made)


def test_a_picture_that_nobody_can_decode_is_said_before_a_model_is_asked(
    prepare: Prepare, tmp_path: Path
) -> None:
    folder, _ = write_benchmark(tmp_path, seed=1, choice_count=6, yesno_count=1)
    row = json.loads((folder / "items.jsonl").read_text().splitlines()[4])
    picture = folder / row["image"]
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])  # its header is sound
    with pytest.raises(GraceError, match="1 of 6 pictures") as caught:
        prepare(chosen(folder))
    assert f"toy-choice, item {row['id']!r}: " in str(caught.value)
    picture.write_bytes(whole)
    assert prepare(chosen(folder)).manifest.metrics["toy-choice/pictures"] == 6


def test_what_is_not_there_is_said_before_anything_is_made(
    prepare: Prepare, tmp_path: Path
) -> None:
    with pytest.raises(GraceError, match=r"toy-choice: .*nowhere does not exist"):
        prepare(chosen(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_a_part_and_a_file_of_ones_own_are_told(prepare: Prepare, tmp_path: Path) -> None:
    folder = write_parquet("mmbench", tmp_path / "data")
    for items in (1, 2):
        entry = f"{{name: mmbench, path: {folder}, items: {items}, prompt: grace}}"
        made = prepare(f"evaluation.benchmarks=[{entry}]")
        assert made.manifest.facts["mmbench"] == {
            **dict.fromkeys(("repository", "revision", "config", "split")),
            "prompt": "grace",
            "part": False,
            "declared": False,
        }
        assert made.manifest.metrics["mmbench/items"] == 2, "one question, asked twice"
    two = write_parquet("mmstar", tmp_path / "mmstar")
    cut = prepare(f"evaluation.benchmarks=[{{name: mmstar, path: {two}, items: 1}}]")
    assert cut.manifest.facts["mmstar"]["part"] is True
    toy = prepare("evaluation.items=3").manifest.facts["toy-choice"]
    assert toy["prompt"] is None, "worded as the toy models were taught"
