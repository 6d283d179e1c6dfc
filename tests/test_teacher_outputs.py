"""The teacher's recorded outputs: made by any number of ranks, after any death, and read back."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from grace_core.config.objective import Objective
from grace_core.config.training import TeacherOutputs, Training
from grace_core.errors import GraceError
from grace_core.events import read_events
from grace_core.losses.objective import (
    GlobalCounts,
    StudentObjective,
    Teacher,
    TermWeights,
    recorded_teacher_row,
)
from grace_core.models.loading import load_model, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from grace_core.training import teacher_outputs as storage
from grace_core.training.job import TeacherJob
from grace_core.training.planned_rows import PlannedRows, RankPlan, RecordedRow, row_loader
from grace_core.training.stopping import STOPPED, StopSignal
from grace_core.training.teacher_outputs import INDEX, shard_file
from grace_core.training.teacher_pass import TeacherPass, record_outputs
from tests.objective_oracle import opinionated, step_terms
from tests.prepared_rows import prepared_row, write_prepared
from tests.tiny_models import FAMILIES, save_tiny

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SAMPLES, SHARD = 11, 3
SHARDS = 4
ALL = 10**6
"""Keep all logits: then distillation is the exact one."""


@dataclass
class World:
    root: Path
    rows: list[dict[str, Any]]
    whole: Path
    """Outputs made in one go by one rank."""

    def job(
        self,
        name: str,
        *,
        top_k: int = 16,
        data_workers: int = 0,
        teacher_weights: Literal["whole", "sharded"] = "whole",
    ) -> TeacherJob:
        return TeacherJob(
            stage="teacher-outputs",
            teacher=self.root / "teacher",
            teacher_weights=teacher_weights,
            student=self.root / "student",
            data=self.root / "data",
            min_pixels=512,
            max_pixels=16384,
            outputs=TeacherOutputs(top_k=top_k, shard_samples=SHARD),
            temperature=2.0,
            training=Training(steps=1, row_tokens=40, data_workers=data_workers),
            device="cpu",
            work=self.root / "work" / name,
        )


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, alone: None) -> World:
    root = tmp_path_factory.mktemp("outputs")
    teacher = opinionated(FAMILIES["qwen3_vl"](seed=21, hidden=256))
    student = opinionated(FAMILIES["qwen3_vl"](seed=22))
    save_tiny(teacher, root / "teacher")
    save_tiny(student, root / "student")
    rows = [prepared_row(student, i, pictures=i % 3) for i in range(SAMPLES)]
    write_prepared(root / "data", rows)
    made = World(root, rows, root / "work" / "whole" / "outputs")
    assert record_outputs(made.job("whole"), CPU, StopSignal())
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def start(world: World, job: TeacherJob, rank: int, ranks: int, *more: str) -> Any:
    job.work.mkdir(parents=True, exist_ok=True)
    file = job.work / f"job-{rank}.json"
    file.write_text(job.model_dump_json(), encoding="utf-8")
    arguments = [str(file), str(job.work / f"store-{ranks}"), str(rank), str(ranks), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.teacher_pass_process", *arguments], cwd=ROOT
    )


def reader(folder: Path, **changed: Any) -> storage.TeacherOutputs:
    return storage.TeacherOutputs(folder, **({"samples": SAMPLES, "temperature": 2.0} | changed))


def test_everything_is_there(world: World) -> None:
    assert sorted(content(world.whole)) == [
        INDEX,
        *(shard_file(world.whole, number).name for number in range(SHARDS)),
    ]
    index = storage.read_index(world.whole)
    assert index.samples == SAMPLES
    assert index.tokens == sum(row["num_tokens"] for row in world.rows)
    assert index.supervised == sum(row["num_supervised"] for row in world.rows)
    assert index.pictures == sum(len(row["images"]) for row in world.rows)
    rows, _ = reader(world.whole).of_samples(range(SHARD))
    kept = torch.exp(rows.logits.double() / 2)
    tail = torch.exp(rows.tails.double() + rows.logits[:, 0].double() / 2)
    assert index.tail_mass == pytest.approx(float((tail / (tail + kept.sum(-1))).mean()), rel=1e-5)
    events = read_events(world.root / "work" / "whole" / "metrics.jsonl")
    assert [event.values["done"] for event in events] == [3, 6, 9, 11]
    assert {event.values["total"] for event in events} == {SAMPLES}


@pytest.mark.slow
def test_two_ranks_make_the_same_files(world: World) -> None:
    job = world.job("two", data_workers=1)
    ranks = [start(world, job, rank, 2) for rank in range(2)]
    assert [rank.wait(240) for rank in ranks] == [0, 0]
    assert content(job.result) == content(world.whole)


@pytest.mark.slow
def test_three_ranks_with_a_sharded_teacher_make_the_same_files(world: World) -> None:
    """Of four shards the first rank makes two: the others go along with its passes."""
    job = world.job("sharded", teacher_weights="sharded")
    ranks = [start(world, job, rank, 3) for rank in range(3)]
    assert [rank.wait(240) for rank in ranks] == [0, 0, 0]
    assert content(job.result) == content(world.whole)


@pytest.mark.slow
def test_a_killed_pass_goes_on_with_what_is_missing(world: World) -> None:
    job = world.job("killed")
    assert start(world, job, 0, 1, "die", "2").wait(240) == -signal.SIGKILL
    assert not job.result.exists()
    left = {file.name for file in job.shards.glob("shard-*")}
    assert left == {shard_file(job.shards, number).name for number in range(2)}
    assert list(job.shards.glob(".shard-*")), "it died while it was writing"
    written = {file.name: file.stat().st_mtime_ns for file in job.shards.glob("shard-*")}

    assert record_outputs(job, CPU, StopSignal())
    for name, moment in written.items():
        assert (job.result / name).stat().st_mtime_ns == moment, "made again"
    assert content(job.result) == content(world.whole)
    kinds = [(event.kind, event.step) for event in read_events(job.metrics)]
    assert kinds == [("progress", 3), ("progress", 6), ("resume", 6), *progress(9, 11)]


def progress(*steps: int) -> list[tuple[str, int]]:
    return [("progress", step) for step in steps]


def test_a_stop_leaves_whole_shards_and_no_result(world: World) -> None:
    job = world.job("stopped")
    stop = StopSignal()
    stop._receive(signal.SIGTERM, None)
    assert not record_outputs(job, CPU, stop)
    assert not job.result.exists() and not list(job.shards.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_stop_of_one_rank_is_that_of_all(world: World, told: int) -> None:
    """The other one has made its shards and waits: nothing passes for the result."""
    job = world.job(f"one-of-two-{told}")
    more = {told: ["stop"]}
    ranks = [start(world, job, rank, 2, *more.get(rank, [])) for rank in range(2)]
    assert [rank.wait(240) for rank in ranks] == [STOPPED, STOPPED]
    assert not job.result.exists()
    left = {shard_file(job.shards, number) for number in (1 - told, 3 - told)}
    assert set(job.shards.glob("*.safetensors")) == left
    assert record_outputs(job, CPU, StopSignal())
    assert content(job.result) == content(world.whole)


def test_a_missing_shard_is_no_result(world: World) -> None:
    job = world.job("missing")
    teacher_pass = TeacherPass(job, CPU)
    assert teacher_pass.run(StopSignal())
    shard_file(job.shards, 2).unlink()
    with pytest.raises(GraceError, match=r"1 of 4 shards are not in .*shard-00002.*shared disk"):
        teacher_pass.finish()
    assert not job.result.exists()


@pytest.mark.slow
def test_loader_processes_change_nothing(world: World) -> None:
    job = world.job("workers", data_workers=2)
    assert start(world, job, 0, 1).wait(240) == 0
    assert content(job.result) == content(world.whole)


def test_samples_come_in_the_order_asked_for(world: World) -> None:
    outputs = reader(world.whole)
    order = [7, 0, 10, 3]
    rows, relations = outputs.of_samples(order)
    assert len(rows) == sum(world.rows[i]["num_supervised"] for i in order)
    assert len(relations) == sum(len(world.rows[i]["images"]) for i in order)
    first = 0
    for sample in order:
        alone, _ = outputs.of_samples([sample])
        part = rows.part(slice(first, first + len(alone)))
        for name, value in vars(alone).items():
            assert torch.equal(getattr(part, name), value), name
        first += len(alone)


def test_other_data_or_another_temperature_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="outputs of 11 samples, the data have 12"):
        reader(world.whole, samples=12)
    with pytest.raises(GraceError, match="temperature 2, the objective has 3"):
        reader(world.whole, temperature=3.0)
    reader(world.whole, temperature=None)
    with pytest.raises(GraceError, match="no teacher outputs of this version"):
        reader(tmp_path)
    shutil.copy(world.whole / INDEX, tmp_path)
    (tmp_path / INDEX).write_text("{}", encoding="utf-8")
    with pytest.raises(GraceError, match="run the stage teacher-outputs again"):
        reader(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_bring_the_outputs_of_their_samples(
    world: World, workers: int, tmp_path: Path
) -> None:
    plan = [[4, 1], [0, 5, 2]]
    job, out = tmp_path / "job.json", tmp_path / "rows.json"
    job.write_text(world.job("rows").model_dump_json(), encoding="utf-8")
    arguments = [str(job), str(world.whole), str(out), json.dumps(plan), str(workers)]
    subprocess.run(
        [sys.executable, "-m", "tests.recorded_rows_process", *arguments], cwd=ROOT, check=True
    )
    outputs = reader(world.whole)
    for samples, row in zip(plan, json.loads(out.read_text(encoding="utf-8")), strict=True):
        expected, relations = outputs.of_samples(samples)
        assert row["records"] == samples
        assert row["ids"] == expected.ids.tolist()
        assert row["relations"] == [relation.centred.tolist() for relation in relations]


def test_ranks_share_the_rows_of_each_step() -> None:
    def first(rank: int, processes: int, count: int, first_step: int = 0) -> list[list[int]]:
        plan = RankPlan([5] * 40, 10, 4, 3, first_step, rank, processes)
        return [samples for _, samples in zip(range(count), plan, strict=False)]

    everything = first(0, 1, 16)
    assert first(0, 2, 8) == everything[0::2] and first(1, 2, 8) == everything[1::2]
    assert first(0, 1, 8, first_step=2) == everything[8:]


def test_with_all_logits_kept_the_step_is_that_of_the_equations(world: World) -> None:
    """Outputs recorded in rows of another packing, against float64 sample by sample."""
    job = world.job("exact", top_k=ALL)
    teacher_pass = TeacherPass(job, CPU)
    folder = read_checkpoint(job.teacher)
    model = load_model(folder, device=CPU, dtype=torch.float32, attention="packed")
    teacher_pass.teacher = Teacher.of(model, folder.family)
    assert teacher_pass.run(StopSignal())
    teacher_pass.finish()
    outputs = reader(job.result)
    assert storage.read_index(job.result).tail_mass == 0

    student_folder = read_checkpoint(job.student)
    visual = VisualInputs(student_folder, min_pixels=512, max_pixels=16384)
    objective = Objective()
    exact = step_terms(
        load_model(student_folder, device=CPU, dtype=torch.float64),
        load_model(folder, device=CPU, dtype=torch.float64),
        world.rows,
        visual,
        objective.distillation,
    )
    student = load_model(student_folder, device=CPU, dtype=torch.float32, attention="packed")
    module = StudentObjective(student, student_folder.family, objective, logits_bytes=2**20)
    plan = [[9, 2, 4, 0], [1, 3, 10, 5, 6], [8, 7]]
    sums: Tensor = torch.zeros(3, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.float64)
    weights = TermWeights.of(
        objective, GlobalCounts(*torch.ones(3, dtype=torch.float64)), beta=1.0, omega=1.0
    )
    for row in PlannedRows(teacher_pass.data, visual, plan, outputs):
        assert isinstance(row, RecordedRow)
        taught = recorded_teacher_row(objective, row.outputs.rows, row.outputs.relations)
        sums += module(row, taught, weights)[1]
        counts += torch.tensor(
            [
                len(row.labels),
                float(taught.gates.double().sum()),
                sum(int(relation.counts) for relation in taught.relations),
            ]
        )
    assert counts.tolist() == pytest.approx([exact.tokens, exact.gates, exact.pictures], rel=1e-5)
    exact = exact.detached()
    found = (sums / counts).tolist()
    expected = [float(exact.cross_entropy), float(exact.distillation)]
    assert found[:2] == pytest.approx(expected, rel=2e-5)
    # Pictures of few tokens feel the rounding of their relations most.
    assert found[2] == pytest.approx(float(exact.relational), abs=1e-4)


def test_ablations_leave_out_what_they_do_not_use(world: World) -> None:
    rows, relations = reader(world.whole).of_samples([1, 2])
    assert not torch.equal(rows.gates, torch.ones_like(rows.gates)) and relations
    plain = Objective.model_validate(
        {"distillation": {"kind": "plain"}, "relational": {"enabled": False}}
    )
    taught = recorded_teacher_row(plain, rows, relations)
    assert torch.equal(taught.gates, torch.ones_like(rows.gates)) and not taught.relations


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_records_and_learns_the_same_to_rounding(world: World) -> None:
    device = torch.device("cuda")
    job = world.job("gpu", data_workers=1)
    assert record_outputs(job, device, StopSignal())
    here, there = (reader(made).of_samples(range(SAMPLES)) for made in (job.result, world.whole))
    torch.testing.assert_close(here[0].gates, there[0].gates, rtol=2e-2, atol=0)
    both = zip(here[0].ids.tolist(), there[0].ids.tolist(), strict=True)
    shared = [len(set(of_gpu) & set(of_cpu)) for of_gpu, of_cpu in both]
    assert sum(shared) > 0.9 * 16 * len(shared)

    folder = read_checkpoint(job.student)
    visual = VisualInputs(folder, min_pixels=512, max_pixels=16384)
    data = TeacherPass(world.job("gpu-rows"), CPU).data
    objective = Objective()
    found = {}
    for where in (CPU, device):
        counts = GlobalCounts(*torch.tensor([50.0, 40.0, 4.0], dtype=torch.float64, device=where))
        weights = TermWeights.of(objective, counts, beta=0.5, omega=3.0)
        student = load_model(folder, device=where, attention="packed")
        module = StudentObjective(student, folder.family, objective, logits_bytes=2**20)
        rows = PlannedRows(data, visual, [[1, 4, 2, 0]], reader(world.whole))
        (row,) = row_loader(rows, 1, where)
        row = row.to(where)
        assert isinstance(row, RecordedRow)
        taught = recorded_teacher_row(objective, row.outputs.rows, row.outputs.relations)
        loss, sums = module(row, taught, weights)
        loss.backward()
        found[where.type] = sums.cpu(), student.lm_head.weight.grad.float().cpu()
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=2e-2, atol=1e-3)
    gradients = [found[name][1] for name in ("cuda", "cpu")]
    difference = torch.linalg.vector_norm(gradients[0] - gradients[1])
    assert difference < 0.05 * torch.linalg.vector_norm(gradients[1])
