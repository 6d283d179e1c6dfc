"""Training on GPUs: every ZeRO stage takes the same step, a recorded teacher teaches the same.

Needs a GPU; two where there are two, over NCCL. The kernels' own tests are in
`test_quantization_kernels.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
import torch

from grace_core.config.training import TeacherOutputs
from grace_core.events import read_events
from grace_core.launch.local import torchrun_command
from grace_core.training.job import RankJob, TeacherJob, TrainingJob
from tests.conftest import ROOT
from tests.test_training_groups import World, make_world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

STEPS = 3
SECONDS = 240


def steps_of(world: World, zero: int, ranks: int) -> list[dict[str, Any]]:
    name = f"zero{zero}-ranks{ranks}"
    job = world.job(name, zero=zero, precision="w4", steps=STEPS, max_grad_norm=1e9)
    return train(job, ranks)


def train(job: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """What the training's steps measured."""
    whole = TrainingJob.model_validate(job | {"device": "cuda"})
    run("grace_core.training.worker", whole, ranks)
    return [e.values for e in read_events(whole.metrics) if e.kind == "train"]


def run(module: str, job: RankJob, ranks: int) -> None:
    work = job.work
    work.mkdir(parents=True)
    file = work / "job.json"
    file.write_text(job.model_dump_json(), encoding="utf-8")
    done = subprocess.run(
        torchrun_command(module, [str(file)], processes=ranks, ranks=work / "ranks"),
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cuda", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    logs = "".join(log.read_text(errors="replace") for log in work.rglob("std*.log"))
    assert done.returncode == 0, (done.stdout + done.stderr + logs)[-4000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def every_pass(world: World) -> list[dict[str, Any]]:
    """ZeRO-0 on one GPU quantizes in every pass and lets autograd make theta's gradient."""
    return steps_of(world, 0, 1)


@pytest.mark.parametrize("ranks", range(1, min(2, max(1, torch.cuda.device_count())) + 1))
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_stage_takes_the_same_steps(
    world: World, every_pass: list[dict[str, Any]], zero: int, ranks: int
) -> None:
    found = steps_of(world, zero, ranks)
    assert len(found) == len(every_pass) == STEPS
    text = json.dumps({"found": found, "expected": every_pass}, indent=1)
    first, expected = found[0], every_pass[0]
    assert first["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-5), text
    assert first["scale_grad_norm"] == pytest.approx(expected["scale_grad_norm"], rel=1e-3), text
    # ZeRO-0 sums rows in bf16.
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2), text
    for values, others in zip(found[1:], every_pass[1:], strict=True):
        assert values["cross_entropy"] == pytest.approx(others["cross_entropy"], rel=1e-2), text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_sharded_teacher_teaches_the_same(world: World, zero: int) -> None:
    both = []
    for weights in ("whole", "sharded"):
        job = world.job(
            f"{weights}-{zero}", zero=zero, precision="w4", steps=STEPS, teacher_weights=weights
        )
        both.append(
            [
                {name: step[name] for name in ("cross_entropy", "distillation", "relational")}
                for step in train(job, 2)
            ]
        )
    whole, sharded = both
    text = json.dumps(both, indent=1)
    assert len(whole) == len(sharded) == STEPS
    # The same passes with the same weights. Later steps may differ by roundings of gradients.
    assert sharded[0] == pytest.approx(whole[0], rel=1e-6), text
    for found, expected in zip(sharded[1:], whole[1:], strict=True):
        assert found == pytest.approx(expected, rel=1e-2), text


def test_recorded_outputs_teach_what_the_teacher_does(world: World) -> None:
    """With all logits kept; of a sharded teacher where there are two GPUs."""
    ranks = min(2, torch.cuda.device_count())
    online = world.job("online", zero=1, steps=STEPS)
    job = TeacherJob.model_validate(
        {name: online[name] for name in ("teacher", "student", "data", "min_pixels", "max_pixels")}
        | {
            "stage": "teacher-outputs",
            "outputs": TeacherOutputs(top_k=10**6, shard_samples=7),
            "temperature": 2.0,
            "teacher_weights": "sharded" if ranks > 1 else "whole",
            "training": online["training"] | {"data_workers": 1},
            "device": "cuda",
            "work": world.root / "work" / "outputs",
        }
    )
    run("grace_core.training.teacher_worker", job, ranks)
    recorded = world.job("recorded", zero=1, steps=STEPS, data_workers=1)
    recorded |= {"teacher": None, "teacher_outputs": str(job.result)}
    found, expected = train(recorded, ranks), train(online, ranks)
    text = json.dumps({"found": found, "expected": expected}, indent=1)
    assert len(found) == len(expected) == STEPS
    of_found, of_expected = found[0]["cross_entropy"], expected[0]["cross_entropy"]
    assert of_found == pytest.approx(of_expected, rel=1e-5), text
    for name in ("distillation", "relational"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=2e-2), text
