"""Finding the checkpoint to continue from: whole ones only, and of the same layout."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest

from grace_core.errors import GraceError
from grace_core.training.saved import Layout, Saved, latest_checkpoint

LAYOUT = Layout(processes=2, zero_stage=2)
FILES = ("model.safetensors", "optimizer-00000.safetensors", "optimizer-00001.safetensors")


def write_checkpoint(folder: Path, step: int, layout: Layout = LAYOUT) -> Path:
    """A checkpoint of the documented form, with any bytes for tensors."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    digests = {}
    for name in FILES:
        content = f"{step} {name} ".encode() * 50
        (path / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    state = {
        "step": step,
        "controller": {"beta": 0.25, "ema": step / 7},
        "layout": {"processes": layout.processes, "zero_stage": layout.zero_stage},
        "sha256": digests,
    }
    content = json.dumps(state, sort_keys=True).encode()
    state["checksum"] = hashlib.sha256(content).hexdigest()
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return path


def found(folder: Path) -> Saved:
    saved = latest_checkpoint(folder, LAYOUT)
    assert saved is not None
    return saved


def test_the_newest_is_continued(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent", LAYOUT) is None
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    assert found(tmp_path) == Saved(tmp_path / "step-00000100", 100, {"beta": 0.25, "ema": 100 / 7})


def truncate(path: Path) -> None:
    file = path / FILES[1]
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    file = path / FILES[0]
    content = bytearray(file.read_bytes())
    content[17] ^= 1
    file.write_bytes(content)


def lose_a_file(path: Path) -> None:
    (path / FILES[2]).unlink()


def lose_the_state(path: Path) -> None:
    (path / "state.json").unlink()


def cut_the_state(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text[: len(text) // 2])


def state_without_digests(path: Path) -> None:
    (path / "state.json").write_text('{"step": 2}')


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, lose_a_file, lose_the_state, cut_the_state, state_without_digests],
)
def test_a_damaged_one_is_passed_over(
    damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, 1)
    newest = write_checkpoint(tmp_path, 2)
    assert found(tmp_path).step == 2
    assert callable(damage)
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path).step == 1
    assert "step-00000002 is damaged" in caplog.text


@pytest.mark.parametrize("bit", range(8))
def test_no_bit_of_the_state_may_flip(bit: int, tmp_path: Path) -> None:
    """Of any byte: a name, a digit of the step or of beta, a digest."""
    write_checkpoint(tmp_path, 1)
    file = write_checkpoint(tmp_path, 2) / "state.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        assert found(tmp_path).step == 1, damaged[max(0, place - 20) : place + 20]
    file.write_bytes(whole)
    assert found(tmp_path).step == 2


def test_nothing_is_continued_when_all_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(write_checkpoint(tmp_path, step))
    assert latest_checkpoint(tmp_path, LAYOUT) is None


def test_a_partial_write_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2).rename(tmp_path / ".step-00000002.partial")
    assert found(tmp_path).step == 1


@pytest.mark.parametrize("other", [Layout(processes=1, zero_stage=2), Layout(2, 3)])
def test_another_layout_is_refused_with_what_to_do(other: Layout, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, other)
    with pytest.raises(GraceError) as caught:
        latest_checkpoint(tmp_path, LAYOUT)
    text = str(caught.value)
    assert f"{other.processes} processes under ZeRO-{other.zero_stage}" in text
    assert "2 processes" in text or "2 under ZeRO-2" in text
    assert "continue with the former, or delete" in text and str(tmp_path) in text
