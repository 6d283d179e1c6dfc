"""Doing a stage once: what is found is whole, what was left behind is cleared away."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from grace_core.artifacts import Artifact, ArtifactDamaged, ArtifactWriter, Parent
from grace_core.config import GraceConfig, load_config
from grace_core.stages.once import StageContext, once

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def config(tmp_path: Path) -> GraceConfig:
    return load_config(ROOT / "configs" / "toy.yaml", [f"run_dir={tmp_path}/run"])


class Stage:
    """A stage that writes one file and counts how often it had to."""

    def __init__(self, config: GraceConfig, name: str) -> None:
        self.config, self.name, self.made = config, name, 0

    def __call__(self, **parents: Parent) -> Artifact:
        def make(writer: ArtifactWriter) -> None:
            self.made += 1
            (writer.path / "weights").write_bytes(self.name.encode() * 100)

        return once(self.config, StageContext(), self.name, {}, parents, make)


@pytest.fixture
def bf16(config: GraceConfig) -> Stage:
    return Stage(config, "bf16")


@pytest.fixture
def w4(config: GraceConfig) -> Stage:
    return Stage(config, "w4")


def test_what_is_there_is_not_made_again(bf16: Stage) -> None:
    assert bf16().path == bf16().path
    assert bf16.made == 1


def test_leftovers_of_killed_attempts_go_when_the_stage_runs_again(bf16: Stage) -> None:
    artifact = bf16()
    leftover = artifact.path.parent / f".{artifact.path.name}.partial-01234567"
    other = artifact.path.parent / ".w4-0123.partial-01234567"
    for folder in (leftover, other):
        folder.mkdir()
        (folder / "weights").write_bytes(b"half")
    shutil.rmtree(artifact.path)
    bf16()
    assert not leftover.exists()
    assert other.exists(), "it may belong to a stage at work"


def test_a_parent_with_a_flipped_bit_is_not_used_and_made_anew(bf16: Stage, w4: Stage) -> None:
    parent = bf16()
    content = bytearray((parent.path / "weights").read_bytes())
    content[17] ^= 1
    (parent.path / "weights").write_bytes(content)
    with pytest.raises(ArtifactDamaged, match=r"changed: weights(.|\n)*run again"):
        w4(student=parent.as_parent())
    assert w4.made == 0
    (aside,) = parent.path.parent.glob(".bf16-*.damaged-*")
    assert (aside / "weights").read_bytes() == content, "kept to be looked at"
    again = bf16()
    assert (bf16.made, again.digest) == (2, parent.digest)
    w4(student=again.as_parent())
    assert w4.made == 1


@pytest.mark.parametrize("change", [lambda text: text[:-7], lambda text: text.replace("2", "3", 1)])
def test_a_damaged_manifest_is_told_and_the_stage_made_anew(
    bf16: Stage, change: Callable[[str], str]
) -> None:
    manifest = bf16().path / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(ArtifactDamaged, match=r"manifest\.json(.|\n)*run again"):
        bf16()
    assert bf16().path == manifest.parent
    assert bf16.made == 2


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_finished_stage_with_a_damaged_file_is_told_then_made_anew(
    bf16: Stage, damage: str
) -> None:
    file = bf16().path / "weights"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactDamaged, match="missing: weights" if damage == "gone" else "399 b"):
        bf16()
    assert bf16().path == file.parent
    assert bf16.made == 2
