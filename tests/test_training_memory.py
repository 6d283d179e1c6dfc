"""The estimate of a training's memory against what trainings allocate, and by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_core.config.models import CheckpointSource
from grace_core.config.training import Training
from grace_core.doctor.checkpoints import read_checkpoint
from grace_core.doctor.memory import trained_model
from grace_core.launch.local import torchrun_command
from grace_core.models.activations import LayerActivations
from grace_core.models.families import set_trainable
from grace_core.training.memory import (
    BACKWARD,
    FORWARD,
    STEP,
    TEACHER_PASS,
    Decoder,
    FrozenTeacher,
    Trained,
    later_bytes,
    recording_memory,
    training_memory,
)
from grace_core.training.recompute import trained_sizes
from tests.conftest import ROOT
from tests.packed_models import packed_model
from tests.tiny_models import FAMILIES

SECONDS = 400
CASES: list[dict[str, Any]] = [
    {"zero_stage": 0, "recompute": "none", "precision": None},
    {"zero_stage": 1, "recompute": "none", "precision": None},
    {"zero_stage": 2, "recompute": "all", "precision": None},
    {"zero_stage": 2, "recompute": "none", "precision": "w4"},
]
GB = 10**9

REAL = Trained(
    weights=2_127_532_032,
    trained=1_745_748_992,
    largest=151_936 * 2048,
    decoder=Decoder(
        layers=28,
        width=2048,
        mlp_width=6144,
        vocabulary=151_936,
        layer=LayerActivations(kept=71_848, recomputed=4096),
    ),
)
"""Qwen3-VL-2B, its vision tower frozen."""


@pytest.mark.slow
def test_the_estimate_is_what_a_training_allocates(tmp_path: Path) -> None:
    """Peaks on a CPU, where every allocation is told; all within the issue's 10 %."""
    cases, out = tmp_path / "cases.json", tmp_path / "out.json"
    cases.write_text(json.dumps(CASES), encoding="utf-8")
    done = subprocess.run(
        torchrun_command(
            "tests.memory_process", [str(cases), str(out)], processes=1, ranks=tmp_path / "logs"
        ),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    logs = "".join(log.read_text(errors="replace") for log in tmp_path.rglob("std*.log"))
    assert done.returncode == 0, (done.stdout + done.stderr + logs)[-4000:]
    for case, found in zip(CASES, json.loads(out.read_text("utf-8")), strict=True):
        text = json.dumps({**case, **found}, indent=1)
        moments = {STEP: "step", FORWARD: "forward", BACKWARD: "backward"}
        estimated = {name: found["held"] + found[f"estimated {name}"] for name in moments}
        assert estimated[STEP] == pytest.approx(found["step"], rel=0.05), text
        measured = {name: found[phase] for name, phase in moments.items()}
        assert max(estimated.values()) == pytest.approx(max(measured.values()), rel=0.1), text
        passes = max(measured[FORWARD], measured[BACKWARD])
        assert max(estimated[FORWARD], estimated[BACKWARD]) == pytest.approx(passes, rel=0.1), text


@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes",
    [
        "toy",
        pytest.param(
            "real",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
        ),
    ],
)
def test_estimates_stand_beside_measurements(shapes: str, tmp_path: Path) -> None:
    """At real size on a GPU they agree within the issue's 10 %; on a CPU nothing is measured."""
    device = "cuda" if shapes == "real" else "cpu"
    where = ["--shapes", shapes, "--device", device, "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "grace_core.cli", "bench", "memory", *where],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    text = (tmp_path / "memory.md").read_text("utf-8")
    found = json.loads((tmp_path / "memory.json").read_text("utf-8"))["measurements"]
    assert len(found) == 8
    for one in found:
        assert one["estimated"] > 0
        if shapes == "real":
            assert one["estimated"] == pytest.approx(one["measured"], rel=0.1), text
        else:
            assert one["measured"] is None


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("what", ["language", "all"])
def test_headers_tell_what_is_trained(name: str, what: Any, tmp_path: Path) -> None:
    packed = packed_model(name, tmp_path)
    set_trainable(packed.model, packed.family, what)
    expected = trained_sizes(packed.model)
    (folder,) = {file.parent for file in tmp_path.rglob("config.json")}
    checkpoint, wrong = read_checkpoint(CheckpointSource(path=str(folder)), "models.student.path")
    assert not wrong
    found = trained_model(checkpoint, Training(steps=1, trainable=what), group_size=None)
    assert found is not None
    assert found.weights == expected.weights
    assert (found.trained, found.largest) == (expected.trained, expected.largest)
    assert found.decoder is not None
    assert found.decoder.layers == len(packed.model.get_submodule(packed.family.decoder).layers)


def memory_of(zero: Any, processes: int, recompute: Any = "none") -> Any:
    training = Training(
        steps=1, row_tokens=8192, rows_per_step=8, zero_stage=zero, recompute=recompute
    )
    teacher = FrozenTeacher(weights=8 * GB)
    return training_memory(REAL, training, processes=processes, teacher=teacher)


def test_the_real_student_worked_by_hand() -> None:
    memory = memory_of(2, 1)
    # 16 of teacher, 2 and 4 + 12 a weight; AdamW's temporary is 4 of the trained weights.
    state = 16 * GB + 2 * 2_127_532_032 + 16 * 1_745_748_992
    assert memory.state == state
    assert memory.moments[STEP] == 4 * 1_745_748_992
    # 28 layers and 12 states more; half of the head's gradient is rounded from its fp32 sum.
    kept = 8192 * (28 * 71_848 + 12 * 4096)
    assert memory.moments[FORWARD] == kept + 4 * REAL.largest + 896 * 2**20
    # Two buckets of 10^9 bytes, the head's gradient, and gradients of an MLP's inner states.
    begins = kept + 2 * GB + 2 * REAL.largest + 8192 * 4 * (6144 + 2048)
    assert memory.moments[BACKWARD] == begins
    assert memory.peak == state + begins


def test_a_sharded_teacher_is_divided_and_gathered() -> None:
    training = Training(steps=1, row_tokens=8192, rows_per_step=8)
    sizes: dict[str, Any] = {"weights": 8 * GB, "head": 151_936 * 4096}
    whole, sharded = (
        training_memory(REAL, training, processes=8, teacher=FrozenTeacher(**sizes, shards=shards))
        for shards in (1, 8)
    )
    assert whole.state - sharded.state == 16 * GB * 7 / 8
    # The head is whole while the student's losses are made, 10^9 weights while the teacher works.
    assert sharded.moments[FORWARD] - whole.moments[FORWARD] == 2 * 151_936 * 4096
    assert sharded.moments[TEACHER_PASS] == 2 * GB and TEACHER_PASS not in whole.moments
    recording = recording_memory(FrozenTeacher(**sizes, shards=8))
    assert recording.peak == 2 * GB + 2 * GB
    assert recording_memory(FrozenTeacher(**sizes)).peak == 16 * GB


def test_ranks_and_recomputation_take_their_share_off() -> None:
    for zero, divided in ((0, 0), (1, 12), (2, 16), (3, 16)):
        one, eight = memory_of(zero, 1), memory_of(zero, 8)
        weights = 2 * REAL.weights if zero == 3 else 0
        assert one.state - eight.state == (divided * REAL.trained + weights) * 7 / 8
    none, every = memory_of(2, 8), memory_of(2, 8, "all")
    saved = 28 * 8192 * (71_848 - 4096)
    assert none.moments[FORWARD] - every.moments[FORWARD] == saved
    assert memory_of(2, 8, 28) == every and memory_of(2, 8, "auto") == every


def test_what_comes_later_is_a_part_of_the_peak() -> None:
    for zero in (0, 1, 2, 3):
        training = Training(steps=1, zero_stage=zero)
        memory = training_memory(REAL, training, processes=2)
        assert later_bytes(REAL, training, processes=2) < memory.peak
