"""Training in process groups: gradients, precision, exact resume, stopping and divergence.

Two groups run one after the other, of two ranks and of one; each goes through many small trainings
(`tests.training_process`), since starting a process costs more than training there. The real entry
point is started for what only a real process can show.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
from torch import Tensor

from grace_core.config.objective import Distillation
from grace_core.data.packing import rows_of_steps
from grace_core.events import Event, read_events
from grace_core.failure import Failure, Kind, failure_of
from grace_core.launch.local import torchrun_command
from grace_core.launch.process_group import ProcessesFailed
from grace_core.models.families import set_trainable
from grace_core.models.loading import load_model, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from grace_core.training.job import TrainingJob
from grace_core.training.saved import Layout, latest_checkpoint
from tests.conftest import ROOT
from tests.objective_oracle import StepTerms, opinionated, step_terms
from tests.prepared_rows import prepared_row, write_prepared
from tests.tiny_models import DECODER, FAMILIES, save_tiny

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
PRECISIONS = ("bf16", "w4")
ROW_TOKENS = 60
STEPS = 5
LONG_STEPS = 24
SHORT = {"checkpoint_every": 2}
CE_ONLY = {"distillation": {"kind": "none"}, "relational": {"enabled": False}}
TIMES = ("seconds", "tokens_per_second", "data_seconds", "memory_resident_gib")
GROUP_SECONDS = 500


@dataclass
class World:
    """Checkpoints and data of all trainings, and what the groups found out."""

    root: Path
    one_sided_seed: int
    found: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)

    def job(
        self,
        name: str,
        *,
        zero: int,
        precision: str = "bf16",
        data: str = "data",
        seed: int = 1,
        objective: dict[str, Any] | None = None,
        grace_seconds: float = 20.0,
        teacher_weights: str = "whole",
        **training: Any,
    ) -> dict[str, Any]:
        objective = objective if objective is not None else {"relational": {"warmup_steps": 2}}
        return {
            "stage": precision,
            "seed": seed,
            "training": {
                "steps": STEPS,
                "row_tokens": ROW_TOKENS,
                "rows_per_step": 4,
                "learning_rate": 1e-3,
                "scale_learning_rate": 1e-3,
                "zero_stage": zero,
                "zero3_persistence_elements": 0,
                "recompute": "none",
                "warmup_share": 0.0,
                **training,
            },
            "objective": objective,
            "student": str(self.root / "student"),
            "teacher": None if objective == CE_ONLY else str(self.root / "teacher"),
            "teacher_weights": teacher_weights,
            "data": str(self.root / data),
            "min_pixels": 1024,
            "max_pixels": 16384,
            "precision": None if precision == "bf16" else precision,
            "device": "cpu",
            "grace_seconds": grace_seconds,
            "work": str(self.root / "work" / name),
        }

    def outcome(self, ranks: int, name: str) -> dict[str, Any]:
        found = self.found[ranks, name]
        assert "error" not in found, found["error"]
        return found

    def tensors(self, ranks: int, name: str) -> dict[str, Tensor]:
        self.outcome(ranks, name)
        return load_file(self.root / f"group-{ranks}" / f"{name}.safetensors")

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The steps of a run without what depends on the clock and the machine."""
        return [
            {
                "stage": event.stage,
                "step": event.step,
                "kind": event.kind,
                "values": {n: v for n, v in event.values.items() if n not in TIMES},
            }
            for event in self.events(name)
            if event.kind == "train"
        ]

    def events(self, name: str) -> list[Event]:
        return read_events(self.root / "work" / name / "metrics.jsonl")

    def trained(self, name: str) -> dict[str, bytes]:
        """Content of the weights that a run left."""
        folder = self.root / "work" / name / "trained"
        return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def make_world(root: Path) -> World:
    teacher = opinionated(FAMILIES["qwen3_vl"](seed=21, hidden=256))
    student = opinionated(FAMILIES["qwen3_vl"](seed=22))
    save_tiny(teacher, root / "teacher")
    save_tiny(student, root / "student")
    for name, tiny in FAMILIES.items():
        save_tiny(tiny(seed=23), root / name)
    write_prepared(root / "data", [prepared_row(student, i, pictures=i % 3) for i in range(20)])
    # Four samples of which no two share a row of 27 tokens: with the right seed all pictures go
    # to the first of two ranks and the second has text alone.
    candidates = [prepared_row(student, 100 + i, pictures=i % 2) for i in range(80)]
    fitting = [row for row in candidates if 14 <= row["num_tokens"] <= 27]
    with_picture = [row for row in fitting if row["images"]][:2]
    text = [row for row in fitting if not row["images"]][:2]
    rows = [*with_picture, *text]
    write_prepared(root / "one-sided", rows)
    lengths = [row["num_tokens"] for row in rows]
    plan = dict(row_tokens=27, rows_per_step=4)
    seed = next(
        seed
        for seed in range(1000)
        if {tuple(row) for row in next(rows_of_steps(lengths, seed=seed, **plan))[1::2]}
        == {(2,), (3,)}
    )
    return World(root, seed)


def cases_of_two(world: World) -> list[dict[str, Any]]:
    job = world.job
    cases = [
        {"name": f"{p}-zero{z}", "do": "first_step", "job": job("x", zero=z, precision=p, **FREE)}
        for p in PRECISIONS
        for z in STAGES
    ]
    cases += [
        {"name": f"one-sided-zero{z}", "do": "first_step", "job": one_sided(world, z)}
        for z in (2, 3)
    ]
    cases += [
        {
            "name": f"recomputed-zero{z}",
            "do": "first_step",
            "job": job("x", zero=z, precision="w4", **FREE, recompute="all"),
        }
        for z in (2, 3)
    ]
    w4 = dict(zero=3, precision="w4", **SHORT)
    cases += [
        {"name": "w4-whole", "do": "train", "job": job("w4-whole", **w4)},
        # No write fits into the grace, so step 3 is lost and repeated.
        {
            "name": "w4-stopped",
            "do": "train",
            "job": job("w4-stopped", **w4, grace_seconds=1e-6),
            "sigterm_after": 3,
        },
        {"name": "w4-resumed", "do": "train", "job": job("w4-stopped", **w4)},
        *sharded_teacher_cases(world),
        {"name": "bf16-whole", "do": "train", "job": job("bf16-whole", zero=2, **SHORT)},
        {
            "name": "bf16-poisoned",
            "do": "train",
            "job": job("bf16-poisoned", zero=2, **SHORT),
            "poison_after": 3,
        },
        {"name": "bf16-mended", "do": "train", "job": job("bf16-poisoned", zero=2, **SHORT)},
        {"name": "long-whole", "do": "train", "job": long_job(world, "long-whole")},
    ]
    return cases


def sharded_teacher_cases(world: World) -> list[dict[str, Any]]:
    def job(name: str, **how: Any) -> dict[str, Any]:
        return world.job(name, precision="w4", teacher_weights="sharded", **how)

    stopped = job("sharded-stopped", zero=3, **SHORT)
    return [
        *(
            {"name": f"sharded-zero{z}", "do": "first_step", "job": job("x", zero=z, **FREE)}
            for z in (1, 2, 3)
        ),
        {"name": "sharded-stopped", "do": "train", "job": stopped, "sigterm_after": 3},
        {"name": "sharded-resumed", "do": "train", "job": stopped},
        {
            "name": "sharded-families",
            "do": "sharded_teachers",
            "job": job("x", zero=2),
            "folders": {name: str(world.root / name) for name in FAMILIES},
        },
    ]


def cases_of_one(world: World) -> list[dict[str, Any]]:
    job = world.job
    cases = [
        {"name": f"{p}-zero{z}", "do": "first_step", "job": job("x", zero=z, precision=p, **FREE)}
        for p in PRECISIONS
        for z in (2, 3)
    ]
    cases += [
        {"name": "one-sided-zero2", "do": "first_step", "job": one_sided(world, 2)},
        {
            "name": "ce-only",
            "do": "first_step",
            "job": job("x", zero=2, objective=CE_ONLY, **FREE),
        },
        {
            "name": "clipped",
            "do": "first_step",
            "job": job("x", zero=2, precision="w4", max_grad_norm=1e-3),
        },
    ]
    for zero, precision in ((0, "bf16"), (1, "w4")):
        name = f"one-{precision}"
        how = dict(zero=zero, precision=precision)
        cases += [
            {"name": f"{name}-whole", "do": "train", "job": job(f"{name}-whole", **how)},
            {
                "name": f"{name}-stopped",
                "do": "train",
                "job": job(f"{name}-stopped", **how, data_workers=2),
                "sigterm_after": 3,
            },
            {
                "name": f"{name}-resumed",
                "do": "train",
                "job": job(f"{name}-stopped", **how, data_workers=2),
            },
        ]
    damaged = job("damaged", zero=0, checkpoint_every=1, keep_checkpoints=1)
    cases += [
        {"name": "damaged-first", "do": "train", "job": damaged, "sigterm_after": 3},
        {"name": "damaged-anew", "do": "train", "job": damaged, "sigterm_after": 2, "damage": True},
        {"name": "damaged-resumed", "do": "train", "job": damaged},
    ]
    return cases


FREE = {"max_grad_norm": 1e9}
"""Nothing is clipped: gradients are compared as they are."""


def one_sided(world: World, zero: int) -> dict[str, Any]:
    where = {"data": "one-sided", "row_tokens": 27, "seed": world.one_sided_seed}
    return world.job("x", zero=zero, precision="w4", **where, **FREE)


def long_job(world: World, name: str) -> dict[str, Any]:
    """Long enough to be met in the middle from outside."""
    return world.job(name, zero=2, objective=CE_ONLY, steps=LONG_STEPS, checkpoint_every=1000)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("training"))
    cases = {2: cases_of_two(world), 1: cases_of_one(world)}
    # One after the other: ranks that wait for one another spin, which starves whoever else runs.
    for ranks, of_group in cases.items():
        folder = world.root / f"group-{ranks}"
        folder.mkdir()
        (folder / "cases.json").write_text(json.dumps(of_group), encoding="utf-8")
        arguments = [str(folder / "cases.json"), str(folder)]
        process = start("tests.training_process", arguments, ranks, folder / "logs")
        try:
            code = process.wait(GROUP_SECONDS)
        finally:
            end(process)
        assert code == 0, output_of(folder / "logs")
    for ranks, of_group in cases.items():
        for case in of_group:
            file = world.root / f"group-{ranks}" / f"{case['name']}.json"
            world.found[ranks, case["name"]] = json.loads(file.read_text(encoding="utf-8"))
    return world


def start(module: str, arguments: list[str], ranks: int, logs: Path) -> subprocess.Popen[bytes]:
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "output").open("wb") as output:
        return subprocess.Popen(
            torchrun_command(module, arguments, processes=ranks, ranks=logs / "ranks"),
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )


def output_of(logs: Path) -> str:
    """The end of what a group wrote, to be shown when it failed."""
    return (logs / "output").read_text(encoding="utf-8", errors="replace")[-4000:]


def end(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of a group when its test has failed."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for one in (*family, process):
            one.kill()
        process.wait()


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    names = [name for name in expected if name.startswith(prefix)]
    assert names and {name for name in found if name.startswith(prefix)} == set(names)
    difference = sum(
        float((found[n].double() - expected[n].double()).square().sum()) for n in names
    )
    whole = sum(float(expected[n].double().square().sum()) for n in names)
    return (difference / whole) ** 0.5


# --- one optimizer step -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(world: World) -> tuple[StepTerms, dict[str, Tensor], float]:
    """Terms of the first step in float64 from unpacked samples, gradients, mean of means."""
    folder = read_checkpoint(world.root / "student")
    visual = VisualInputs(folder, min_pixels=1024, max_pixels=16384)
    data = load_from_disk(str(world.root / "data"))
    plan = rows_of_steps(list(data["num_tokens"]), row_tokens=ROW_TOKENS, rows_per_step=4, seed=1)
    rows = [[data[index] for index in row] for row in next(plan)]
    student = load_model(folder, device="cpu", dtype=torch.float64)
    set_trainable(student, folder.family, "language")
    teacher = load_model(read_checkpoint(world.root / "teacher"), device="cpu", dtype=torch.float64)
    of_rows = [step_terms(student, teacher, row, visual, Distillation()) for row in rows]
    terms = step_terms(student, teacher, [s for row in rows for s in row], visual, Distillation())
    # The first step: beta starts at 0.5, omega at 3 / 2 of its two warm-up steps.
    (terms.cross_entropy + 0.5 * terms.distillation + 1.5 * terms.relational).backward()
    gradients = {f"weight.{n}": p.grad for n, p in student.named_parameters() if p.requires_grad}
    mean_of_means = sum(float(row.distillation.detach()) for row in of_rows) / len(of_rows)
    return terms.detached(), gradients, mean_of_means


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_is_the_equations_over_the_global_batch(
    world: World, oracle: tuple[StepTerms, dict[str, Tensor], float], ranks: int
) -> None:
    terms, gradients, mean_of_means = oracle
    report = world.outcome(ranks, "bf16-zero2")["reports"][0]
    expected = float(terms.distillation)
    assert report["supervised"] == terms.tokens
    assert report["cross_entropy"] == pytest.approx(float(terms.cross_entropy), rel=1e-3)
    assert report["distillation"] == pytest.approx(expected, rel=2e-3)
    assert abs(mean_of_means / expected - 1) > 5e-3, "the rows are too alike to tell"
    assert report["relational"] == pytest.approx(float(terms.relational), rel=1e-2)
    found = world.tensors(ranks, "bf16-zero2")
    assert distance(found, gradients, "weight.") < 0.03


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("zero", STAGES)
def test_one_rank_of_four_rows_is_two_ranks_of_two(world: World, precision: str, zero: int) -> None:
    name = f"{precision}-zero{zero}"
    alone = f"{precision}-zero{max(zero, 2)}"
    found, expected = world.tensors(2, name), world.tensors(1, alone)
    assert distance(found, expected, "weight.") < 5e-3  # a bf16 step is 4e-3 to 8e-3
    for value, other in zip(reports(world, 2, name), reports(world, 1, alone) * 2, strict=True):
        for term in ("cross_entropy", "distillation", "relational", "supervised", "tokens"):
            assert value[term] == pytest.approx(other[term], rel=1e-6)
        assert value["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    whole = sum(float(v.square().sum()) for n, v in found.items() if n.startswith("weight."))
    assert reports(world, 2, name)[0]["grad_norm"] == pytest.approx(whole**0.5, rel=1e-3)
    if precision == "w4":
        assert distance(found, expected, "theta.gradient") < 1e-5
        assert torch.equal(found["theta.before"], expected["theta.before"])


def reports(world: World, ranks: int, name: str) -> list[dict[str, Any]]:
    return world.outcome(ranks, name)["reports"]


@pytest.mark.parametrize("zero", [2, 3])
def test_a_rank_with_text_alone_takes_part(world: World, zero: int) -> None:
    outcome = world.outcome(2, f"one-sided-zero{zero}")
    assert [rank["pictures"] for rank in outcome["ranks"]] == [[1, 1], [0, 0]]
    found = world.tensors(2, f"one-sided-zero{zero}")
    expected = world.tensors(1, "one-sided-zero2")
    assert distance(found, expected, "weight.") < 5e-3
    assert distance(found, expected, "theta.gradient") < 1e-5
    # A mean over ranks of the picture term would be half of it.
    assert reports(world, 2, f"one-sided-zero{zero}")[0]["relational"] == pytest.approx(
        reports(world, 1, "one-sided-zero2")[0]["relational"], rel=1e-6
    )


def test_zero3_shards_every_parameter(world: World) -> None:
    for precision in PRECISIONS:
        for rank in world.outcome(2, f"{precision}-zero3")["ranks"]:
            assert set(rank["sizes"].values()) == {0}
            assert rank["whole_sizes"].keys() == rank["shard_sizes"].keys()
            for name, whole in rank["whole_sizes"].items():
                assert rank["shard_sizes"][name] == -(-whole // 2) < max(2, whole), name


@pytest.mark.parametrize("zero", STAGES)
def test_theta_stays_fp32_and_outside_of_the_model(world: World, zero: int) -> None:
    for rank in world.outcome(2, f"w4-zero{zero}")["ranks"]:
        theta = rank["theta"]
        assert theta["dtype"] == "torch.float32"
        assert theta["leaf_dtypes"] == theta["module_dtypes"] == ["torch.float32"]
        assert theta["leaves_share_storage"]
        assert not theta["in_parameters"]
        assert len(theta["layers"]) == 4 * 7
        assert not [name for name in rank["state_dict"] if "theta" in name or "scale" in name]
        assert rank["weight_dtypes"] == ["torch.bfloat16"]


@pytest.mark.parametrize("zero", STAGES)
def test_scales_move_by_less_than_a_bf16_step(world: World, zero: int) -> None:
    """Adam's first step is the learning rate for every scale that has a gradient, 1e-3 here."""
    found = world.tensors(2, f"w4-zero{zero}")
    before, after, gradient = (found[f"theta.{n}"] for n in ("before", "after", "gradient"))
    assert before.dtype == after.dtype == torch.float32
    # Adam adds 1e-8 to a gradient's size.
    clear = gradient.abs() > 1e-6
    assert clear.float().mean() > 0.9
    moved = after[clear] - before[clear]
    torch.testing.assert_close(moved, -1e-3 * gradient[clear].sign(), rtol=2e-2, atol=0)
    lost = before[clear].bfloat16() == after[clear].bfloat16()
    assert lost.float().mean() > 0.5, "in bf16 most of these steps would be no step at all"


@pytest.mark.parametrize("zero", STAGES)
def test_rotary_frequencies_stay_fp32(world: World, zero: int) -> None:
    for rank in world.outcome(2, f"bf16-zero{zero}")["ranks"]:
        dtypes = rank["rotary_dtypes"]
        assert any(name.startswith(DECODER) for name in dtypes)
        assert any("visual" in name for name in dtypes)
        assert set(dtypes.values()) == {"torch.float32"}


@pytest.mark.parametrize("zero", STAGES)
def test_the_engine_follows_the_settings(world: World, zero: int) -> None:
    expected = {"train_batch_size": 4, "accumulation": 2, "stage": zero}
    for rank in world.outcome(2, f"bf16-zero{zero}")["ranks"]:
        assert rank["engine"] == expected
        assert rank["optimizer_state"] == 0, "no step was taken while setting up"


@pytest.mark.parametrize("zero", [2, 3])
def test_gradient_checkpointing_changes_nothing(world: World, zero: int) -> None:
    found = world.tensors(2, f"recomputed-zero{zero}")
    expected = world.tensors(2, f"w4-zero{zero}")
    assert reports(world, 2, f"recomputed-zero{zero}") == reports(world, 2, f"w4-zero{zero}")
    assert distance(found, expected, "weight.") < 1e-6
    assert distance(found, expected, "theta.gradient") < 1e-6


def test_cross_entropy_alone_loads_no_teacher(
    world: World, oracle: tuple[StepTerms, dict[str, Tensor], float]
) -> None:
    outcome = world.outcome(1, "ce-only")
    assert [rank["teacher"] for rank in outcome["ranks"]] == [False]
    report = outcome["reports"][0]
    assert report["cross_entropy"] == pytest.approx(float(oracle[0].cross_entropy), rel=5e-3)
    assert report["distillation"] == report["relational"] == 0
    assert outcome["beta"] == 0.5


def test_theta_is_clipped_to_the_same_norm(world: World) -> None:
    free, clipped = world.tensors(1, "w4-zero2"), world.tensors(1, "clipped")
    norm = float(free["theta.gradient"].norm())
    assert norm > 2e-3
    assert reports(world, 1, "clipped")[0]["scale_grad_norm"] == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(
        clipped["theta.gradient"], free["theta.gradient"] * (1e-3 / norm), rtol=1e-3, atol=1e-9
    )


# --- a teacher whose weights are divided over the ranks ------------------------------------------


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_sharded_teacher_teaches_the_same_to_the_bit(world: World, zero: int) -> None:
    """Whatever the student's own ZeRO stage is."""
    assert reports(world, 2, f"sharded-zero{zero}") == reports(world, 2, f"w4-zero{zero}")
    found, expected = world.tensors(2, f"sharded-zero{zero}"), world.tensors(2, f"w4-zero{zero}")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_run_with_a_sharded_teacher_is_that_with_a_whole_one(world: World) -> None:
    """All its steps, stopped after the third and continued."""
    assert not world.outcome(2, "sharded-stopped")["finished"]
    assert "continuing after step 3" in world.outcome(2, "sharded-resumed")["log"]
    assert_same_run(world, "sharded-stopped", "w4-whole")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_is_sharded(world: World, family: str) -> None:
    """Pass after pass, one rank with pictures and one with text alone, the states are the same."""
    for rank in world.outcome(2, "sharded-families")["ranks"]:
        found = rank[family]
        assert found["passes"] == [True] * 4
        assert found["logits"]
        assert found["whole"] == [], "nothing is whole between passes"
        assert found["shares"] == found["halves"]
        assert found["buffers"] == ["torch.float32"]


# --- whole runs: resume, stop, divergence -------------------------------------------------------


def test_quantized_training_learns(world: World) -> None:
    assert world.outcome(2, "w4-whole")["finished"]
    losses = [line["values"]["cross_entropy"] for line in world.metrics("w4-whole")]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3
    assert all("scale_grad_norm" in line["values"] for line in world.metrics("w4-whole"))


def assert_same_run(world: World, name: str, whole: str, steps: int = STEPS) -> None:
    assert [line["step"] for line in world.metrics(name)] == list(range(1, steps + 1))
    assert world.metrics(name) == world.metrics(whole)
    weights = world.trained(name)
    assert weights and weights == world.trained(whole)


def test_resume_repeats_the_lost_steps_exactly(world: World) -> None:
    """ZeRO-3, W4, two ranks; told to stop in step 3, too late to save more than step 2."""
    stopped = world.outcome(2, "w4-stopped")
    assert not stopped["finished"]
    assert "after step 3; no time to save, 1 steps will be repeated" in stopped["log"][-1]
    resumed = world.outcome(2, "w4-resumed")
    assert "continuing after step 2" in resumed["log"]
    assert resumed["finished"]
    assert set(world.trained("w4-stopped")) == {"model.safetensors", "scales.safetensors"}
    assert_same_run(world, "w4-stopped", "w4-whole")


@pytest.mark.parametrize("name", ["one-bf16", "one-w4"])
def test_a_stop_with_time_to_save_loses_nothing(world: World, name: str) -> None:
    """ZeRO-0 and ZeRO-1 on one rank; the interrupted run also decodes pictures in processes."""
    stopped = world.outcome(1, f"{name}-stopped")
    assert not stopped["finished"]
    assert "after step 3; saved" in stopped["log"][-1]
    assert "continuing after step 3" in world.outcome(1, f"{name}-resumed")["log"]
    assert_same_run(world, f"{name}-stopped", f"{name}-whole")


def test_a_damaged_checkpoint_gives_way_to_good_ones(world: World) -> None:
    """One is kept, that of step 3. Damaged, it must not outlive those of the run made anew."""
    assert not world.outcome(1, "damaged-first")["finished"]
    anew = world.outcome(1, "damaged-anew")
    assert not [line for line in anew["log"] if "continuing" in line]
    assert "after step 2; saved" in anew["log"][-1]
    assert "continuing after step 2" in world.outcome(1, "damaged-resumed")["log"]
    assert_same_run(world, "damaged", "one-bf16-whole")


def test_a_training_reports_rates_memory_and_waiting(world: World) -> None:
    steps = [event.values for event in world.events("w4-whole") if event.kind == "train"]
    own = psutil.Process().memory_info().rss / 2**30
    for values in steps:
        assert values["learning_rate"] > 0 and values["scale_learning_rate"] > 0
        assert 0 <= values["data_seconds"] <= values["seconds"]
        # A rank has torch in memory, as this process has, and four tiny models.
        assert own / 10 < values["memory_resident_gib"] < 10 * own
        assert values["steps"] == STEPS
    bf16 = [event.values for event in world.events("bf16-whole") if event.kind == "train"]
    assert not any("scale_learning_rate" in values for values in bf16)


def test_checkpoints_and_resumes_are_events(world: World) -> None:
    def others(name: str) -> list[tuple[str, int]]:
        return [(e.kind, e.step) for e in world.events(name) if e.kind != "train"]

    assert others("bf16-whole") == [("checkpoint", 2), ("checkpoint", 4)]
    assert others("w4-stopped") == [("checkpoint", 2), ("resume", 2), ("checkpoint", 4)]
    assert others("one-bf16-stopped") == [("checkpoint", 3), ("resume", 3)]
    steps = [event.step for event in world.events("w4-stopped")]
    assert steps == sorted(steps), "steps never fall within a file"
    (resume,) = [event for event in world.events("w4-stopped") if event.kind == "resume"]
    assert resume.values == {"steps": STEPS}
    # The last checkpoint of a finished run is still there: the stage removes it, not the training.
    written = [event for event in world.events("bf16-whole") if event.kind == "checkpoint"][-1]
    folder = world.root / "work" / "bf16-whole" / "checkpoints" / "step-00000004"
    assert written.values["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert written.values["seconds"] > 0


def test_divergence_keeps_the_last_good_checkpoint(world: World) -> None:
    """A weight becomes NaN before step 4; ZeRO-2, two ranks, checkpoints every two steps."""
    kind, text = world.found[2, "bf16-poisoned"]["error"]
    assert kind == "TrainingDiverged"
    assert "step 4" in text and "nan" in text and "learning_rate" in text
    assert "continuing after step 2" in world.outcome(2, "bf16-mended")["log"]
    assert_same_run(world, "bf16-poisoned", "bf16-whole")


def run_worker(world: World, name: str, job: dict[str, Any], ranks: int) -> Any:
    work = Path(job["work"])
    work.mkdir(parents=True, exist_ok=True)
    file = work / "job.json"
    file.write_text(TrainingJob.model_validate(job).model_dump_json(), encoding="utf-8")
    return start("grace_core.training.worker", [str(file)], ranks, work / name)


def reported(output: str, world: World) -> Failure:
    """The failure report on a group that wrote this."""
    error = ProcessesFailed("its processes ended with exit code 1", 1, output.splitlines())
    return failure_of(error, world.root, stage="bf16")


def test_sigterm_to_the_agent_saves_and_ends_every_process(world: World) -> None:
    """The real worker, ZeRO-2, two ranks: stopped from outside, continued, and nothing changed."""
    job = long_job(world, "long-stopped")
    work = Path(job["work"])
    agent = run_worker(world, "first", job, 2)
    ranks: set[psutil.Process] = set()
    try:
        deadline = time.monotonic() + 120
        while len(world.metrics("long-stopped")) < 3:
            assert agent.poll() is None, output_of(work / "first")
            assert time.monotonic() < deadline
            ranks |= set(psutil.Process(agent.pid).children(recursive=True))
            time.sleep(0.02)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) != 0
    finally:
        end(agent)
    assert len(ranks) >= 2
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    text = (work / "first" / "output").read_text()
    assert "saved, nothing is lost" in text
    told = reported(text, world)
    assert told.kind == Kind.STOPPED and "saved, nothing is lost" in told.cause
    done = len(world.metrics("long-stopped"))
    assert 3 <= done < LONG_STEPS
    saved = latest_checkpoint(work / "checkpoints", Layout(2, 2))
    assert saved is not None and saved.step == done

    agent = run_worker(world, "second", job, 2)
    try:
        assert agent.wait(120) == 0, output_of(work / "second")
    finally:
        end(agent)
    assert world.outcome(2, "long-whole")["finished"]
    assert_same_run(world, "long-stopped", "long-whole", steps=LONG_STEPS)


def test_a_worker_that_diverges_says_so_and_fails(world: World) -> None:
    spoiled = world.root / "spoiled"
    spoiled.mkdir()
    for file in (world.root / "student").iterdir():
        (spoiled / file.name).write_bytes(file.read_bytes())
    weights = load_file(spoiled / "model.safetensors")
    next(v for n, v in weights.items() if "down_proj" in n)[0, 0] = float("nan")
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    job = world.job("spoiled", zero=2, objective=CE_ONLY) | {"student": str(spoiled)}
    agent = run_worker(world, "log", job, 1)
    try:
        assert agent.wait(120) != 0
    finally:
        end(agent)
    text = (Path(job["work"]) / "log" / "output").read_text()
    assert "error: stage bf16, step 1: cross_entropy is nan; training stopped" in text
    told = reported(text, world)
    assert told.kind == Kind.DIVERGED
    assert told.cause.startswith("error: stage bf16, step 1: cross_entropy is nan")
    assert not (Path(job["work"]) / "trained").exists()
    assert not list(Path(job["work"]).glob("checkpoints/step-*"))
