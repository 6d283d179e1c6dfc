"""What tells a scheduled run, and the stage `data`, that there is something new to learn from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from grace_core import stages
from grace_core.config import GraceConfig, load_config
from grace_core.data.listing import listing_digest
from grace_core.errors import GraceError
from grace_core.stages import StageContext
from grace_core.stages.inputs import RECORD, compare_inputs, record_inputs
from grace_core.toy.world import write_training_set

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "deep" / "er").mkdir(parents=True)
    for name in ("one.png", "deep/two.png", "deep/er/three.png"):
        (root / name).write_bytes(name.encode())
    return root


def digest(root: Path) -> str:
    return listing_digest(root, root.parent / "run")


def test_a_listing_does_not_change_by_itself(pictures: Path) -> None:
    before = digest(pictures)
    for file in pictures.rglob("*.png"):
        file.read_bytes()
    assert digest(pictures) == before
    (pictures.parent / "link").symlink_to(pictures)
    assert digest(pictures.parent / "link") == before, "another name of the same folder"


@pytest.mark.parametrize("name", ["one.png", "deep/er/three.png"])
def test_a_listing_sees_every_way_in_which_a_picture_changes(pictures: Path, name: str) -> None:
    file, seen = pictures / name, {digest(pictures)}
    times = file.stat()
    for change in (
        lambda: file.write_bytes(b"longer than before"),
        lambda: os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1)),  # equal size
        lambda: file.rename(file.with_name("renamed.png")),
        lambda: (file.parent / "more.png").write_bytes(b""),
        lambda: (file.parent / "linked.png").symlink_to("more.png"),
        lambda: file.with_name("renamed.png").unlink(),
    ):
        change()
        seen.add(digest(pictures))
    assert len(seen) == 7


def test_a_run_folder_among_the_pictures_is_passed_over(pictures: Path) -> None:
    run = pictures / "runs" / "first"
    run.mkdir(parents=True)
    before = listing_digest(pictures, run)
    (run / "artifact").write_text("new")
    assert listing_digest(pictures, run) == before


def test_names_do_not_run_into_each_other(tmp_path: Path) -> None:
    """Two folders whose lines would be alike if a name could hold a line."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "a").write_text("x")
    (one / "b").write_text("x")
    (other / "a\nb").write_text("x")
    for file in (*one.iterdir(), *other.iterdir()):
        os.utime(file, ns=(0, 0))
    assert digest(one) != digest(other)


@pytest.fixture
def config(tmp_path: Path) -> GraceConfig:
    """Toy records as if they were annotations from outside, and a teacher of its own."""
    write_training_set(tmp_path / "data", count=8, seed=0, wrong_answer_share=0.0)
    shutil.copytree(ROOT / "assets/toy/teacher", tmp_path / "teacher")
    source = {"kind": "sharegpt4v", "root": str(tmp_path / "data"), "annotations": ["train.json"]}
    return load_config(
        ROOT / "configs/toy.yaml",
        [
            f"run_dir={tmp_path}/run",
            f"models.teacher.path={tmp_path}/teacher",
            f"models.student.path={ROOT}/assets/toy/student",
            f"data.source={json.dumps(source)}",
        ],
    )


def test_inputs_are_new_until_a_run_that_used_them_is_recorded(
    config: GraceConfig, tmp_path: Path
) -> None:
    first = compare_inputs(config)
    assert first.is_new
    record_inputs(config, first.now)
    assert not compare_inputs(config).is_new
    assert [file.name for file in config.run_dir.iterdir()] == [RECORD], "nothing half-written"

    (tmp_path / "data" / "another.png").write_bytes(b"picture")
    grown = compare_inputs(config)
    assert grown.is_new
    assert grown.now.teacher == first.now.teacher
    assert "data" in grown.describe() and "(was " in grown.describe()
    record_inputs(config, grown.now)

    weights = next((tmp_path / "teacher").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    taught = compare_inputs(config)
    assert taught.is_new
    assert taught.now.data == grown.now.data


def test_a_damaged_record_is_told(config: GraceConfig) -> None:
    config.run_dir.mkdir()
    (config.run_dir / RECORD).write_text('{"data": 3')
    with pytest.raises(GraceError, match="delete it"):
        compare_inputs(config)


def test_a_replaced_picture_makes_other_data_of_equal_annotations(
    config: GraceConfig, tmp_path: Path
) -> None:
    """And a picture that only looks new makes the data again, with the same content."""
    first = stages.prepare_data(config, StageContext())
    assert stages.prepare_data(config, StageContext()).path == first.path
    picture, other = sorted((tmp_path / "data").rglob("*.png"))[:2]
    os.utime(picture)
    touched = stages.prepare_data(config, StageContext())
    assert touched.path != first.path
    assert touched.digest == first.digest
    picture.write_bytes(other.read_bytes())
    replaced = stages.prepare_data(config, StageContext())
    assert replaced.digest != first.digest


def test_a_stage_that_is_not_done_names_the_command_where_none_may_run(
    config: GraceConfig,
) -> None:
    context = StageContext(finished_only=True)
    with pytest.raises(GraceError, match=r"run `grace data CONFIG`.*deployment grace-data/data"):
        stages.prepare_data(config, context)
    assert not list(config.run_dir.glob("artifacts/data-*"))
    made = stages.prepare_data(config, StageContext())
    assert stages.prepare_data(config, context).path == made.path
