"""The checks of the machine that trains: GPUs, memory, limits, disk, and a SLURM cluster."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from grace_core.config import GraceConfig
from grace_core.config.launch import Launch, SlurmLaunch
from grace_core.doctor import disk, gpus, machine
from grace_core.doctor.benchmarks import Size
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.doctor.disk import check_disk
from grace_core.doctor.examination import examine
from grace_core.doctor.findings import Finding, Severity, require_no_problem
from grace_core.doctor.machine import check_machine
from grace_core.doctor.memory import needs
from grace_core.doctor.slurm import check_slurm
from grace_core.training.zero import BUCKET_ELEMENTS
from tests.findings import ROOT, models, one, severities, toy

# As printed by a machine with one GPU; what the second one says is made up.
GPUS = (
    "0, GPU-ba0ad354-2384-908b-061e-4661c28587d9, NVIDIA H100 80GB HBM3, 81559, 76365, 9.0\n"
    "1, GPU-11111111-2384-908b-061e-4661c28587d9, Tesla T4, 15360, 15000, 7.5\n"
)
CLUSTER = "launch={nodes: 2, processes: 4, device: cuda, backend: {kind: slurm, partition: gpu}}"
ROWS = ("distill.training.rows_per_step=8", "quantize.training.rows_per_step=8")
PROGRAMS = "GPU-ba0ad354-2384-908b-061e-4661c28587d9, 439, python3\n"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# Machine


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program of the given shell text on the PATH, in front of everything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    return add


@pytest.fixture
def two_gpus(tools: Callable[[str, str], None]) -> None:
    answers = f"case $1 in --query-gpu*) printf '{GPUS}';; *) printf '{PROGRAMS}';; esac"
    tools("nvidia-smi", answers.replace("\n", "\\n"))


def about_machine(*overrides: str, weights: int | None = None) -> list[Finding]:
    config = toy(*overrides)
    teacher, student = models(config)
    if weights is not None:
        # Only the Hub tells their number.
        teacher = Checkpoint(teacher.source, None, listed_parameters=4 * weights)
        student = Checkpoint(student.source, None, listed_parameters=weights)
    return list(check_machine(config, teacher, student))


def test_gpus_are_those_that_are_visible(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = gpus.visible_gpus()
    assert first.compute_capability == (9, 0) and first.processes == {439: "python3"}
    assert second.free == 15000 * 2**20 and not second.processes
    for chosen, expected in (("1", [1]), ("GPU-ba0ad354", [0]), ("1,0", [0, 1]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert [gpu.index for gpu in gpus.visible_gpus()] == expected


def test_gpus_in_use_or_without_bf16_are_warned_of(two_gpus: None) -> None:
    found = about_machine("launch.device=cuda")
    one(found, Severity.WARNING, "GPU 0 is in use, 5.4 GB of its memory: python3 (439)")
    one(found, Severity.WARNING, "Tesla T4, compute capability 7.5) has no bf16")
    one(found, Severity.OK, "2 x NVIDIA H100 80GB HBM3")


def test_gpus_too_few_or_too_small_are_problems(two_gpus: None) -> None:
    rows = ("distill.training.rows_per_step=6", "quantize.training.rows_per_step=6")
    found = about_machine("launch={processes: 3, device: cuda}", *rows)
    one(found, Severity.PROBLEM, "3 processes, but 2 GPUs")
    # 2 B weights under ZeRO-2 on two GPUs: 2 + 16 / 2 = 10 bytes each, 8 B of teacher at 2, and
    # the root of the second moment of half of them, 4 bytes each, in the optimizer's step.
    found = about_machine("launch={processes: 2, device: cuda}", weights=2_000_000_000)
    finding = one(found, Severity.PROBLEM, "GPU 1 (Tesla T4) has 15.7 GB free of 16.1 GB")
    assert "needs at least 40.0 GB on each (20.0 GB of weights" in finding.text
    assert "activations come on top" in finding.text
    assert "models.teacher_weights: sharded" in str(finding.remedy)
    sharded = ("launch={processes: 2, device: cuda}", "models.teacher_weights=sharded")
    finding = one(about_machine(*sharded, weights=2_000_000_000), Severity.PROBLEM, "GPU 1")
    assert "needs at least 32.0 GB on each" in finding.text and "8.0 GB of teacher" in finding.text
    assert "teacher_weights" not in str(finding.remedy)


@pytest.mark.parametrize(
    ("zero_stage", "bytes_a_weight"),
    [(0, 16.0), (1, 4 + 4 + 12 / 8), (2, 2 + 16 / 8), (3, 18 / 8)],
)
def test_the_memory_of_the_state_is_that_of_the_zero_paper_with_fp32_gradients(
    zero_stage: int, bytes_a_weight: float
) -> None:
    """Beside the bf16 gradients under ZeRO-1, in their place under ZeRO-2 and -3."""
    config = toy(f"distill.training.zero_stage={zero_stage}", CLUSTER, *ROWS)
    source = config.models.student
    teacher = Checkpoint(source, None, listed_parameters=1000)
    student = Checkpoint(source, None, listed_parameters=100)
    found = needs(config, teacher, student)
    assert found is not None
    buckets = 2 * BUCKET_ELEMENTS if zero_stage == 3 else 0  # there from the start
    assert found[0].state == pytest.approx(100 * bytes_a_weight + buckets, rel=1e-12)
    assert found[0].teacher == 2000


def test_students_of_recorded_outputs_need_no_room_for_the_teacher() -> None:
    config = toy("teacher_outputs={}")
    teacher = Checkpoint(config.models.student, None, listed_parameters=1000)
    student = Checkpoint(config.models.student, None, listed_parameters=100)
    found = needs(config, teacher, student)
    assert found is not None
    assert [(need.stage, need.teacher) for need in found] == [
        *(("teacher-outputs", 2000), ("bf16", 0), ("w8", 0), ("w4", 0)),
    ]
    assert found[0].state == 0


@pytest.mark.parametrize(("zero_stage", "kept"), [(0, 0), (1, 1), (2, 1), (3, 0)])
def test_quantized_weights_are_counted_where_they_are_kept(zero_stage: int, kept: int) -> None:
    config = toy(*(f"{part}.training.zero_stage={zero_stage}" for part in ("distill", "quantize")))
    name = "model.language_model.layers.0.{}.weight"
    shapes = {
        name.format("mlp.up_proj"): (30, 10),
        name.format("self_attn.q_proj"): (10, 10),
        "model.visual.blocks.0.attn.qkv.weight": (30, 10),
    }
    student = Checkpoint(config.models.student, None, shapes=shapes)
    teacher = Checkpoint(config.models.student, None, listed_parameters=1000)
    found = needs(config, teacher, student)
    assert found is not None
    state = {need.stage: need.state for need in found}
    # 26 bytes for each scale of 128 weights besides.
    expected = state["bf16"] + kept * 2 * 400 + 26 * 400 / 128
    assert state["w4"] == state["w8"] == pytest.approx(expected)


def test_without_a_gpu_cuda_is_a_problem(
    tools: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools("nvidia-smi", "exit 0")
    one(about_machine("launch.device=cuda"), Severity.PROBLEM, "no NVIDIA GPU on this machine")
    one(about_machine("launch.device=cpu"), Severity.OK, "of memory available")


def test_a_driver_that_does_not_answer_is_reported(tools: Callable[[str, str], None]) -> None:
    tools(
        "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
    )
    one(about_machine("launch.device=cuda"), Severity.UNCHECKED, "version mismatch")


def test_a_gpu_that_tells_no_memory_is_reported(tools: Callable[[str, str], None]) -> None:
    tools("nvidia-smi", "echo '0, GPU-1, NVIDIA GB10, [N/A], [N/A], 12.1'")
    one(about_machine("launch.device=cuda"), Severity.UNCHECKED, "NVIDIA GB10, [N/A]")


def test_a_driver_without_its_tool_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gpus" / "0000:00:06.0").mkdir(parents=True)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "gpus")
    monkeypatch.setattr(gpus.driver_gpus, "__defaults__", (tmp_path / "gpus",))
    monkeypatch.setenv("PATH", str(tmp_path))
    one(about_machine(), Severity.UNCHECKED, "nvidia-smi is not on the PATH")


def test_more_memory_than_there_is_is_a_problem() -> None:
    one(about_machine(weights=10**12), Severity.PROBLEM, "of memory available")
    assert about_machine(weights=None)[0].severity is Severity.OK


def test_data_workers_need_shared_memory_and_open_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers = "distill.training.data_workers=4"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        one(about_machine(workers), Severity.WARNING, "may open 512 files")
        assert not [f for f in about_machine() if "open" in f.text]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    # 1024 tokens of 16 x 16 pixels, 12 bytes each, 4 rows ahead in 2 x 4 workers: 101 MB.
    monkeypatch.setattr(machine, "_SHARED_MEMORY", tmp_path / "none")
    one(about_machine(workers), Severity.UNCHECKED, "No such file")
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    found = [f for f in about_machine(workers) if "/dev/shm" in f.text]
    assert "100.7 MB" in found[0].text


def test_what_is_done_needs_no_gpu(tmp_path: Path, tools: Callable[[str, str], None]) -> None:
    tools("nvidia-smi", "exit 0")
    config = toy(f"run_dir={tmp_path}", "launch.device=cuda")
    one(examine(config), Severity.PROBLEM, "no NVIDIA GPU")
    one(examine(config, "data"), Severity.INFORMATION, "nothing is left to compute up to `data`")
    labels = ("bf16", "w8", "w4")
    rows = [f"evaluate-{label}" for label in ("teacher", "baseline", *labels)]
    for stage in (*labels, *(f"release-{label}" for label in labels), *rows):
        (tmp_path / "artifacts" / f"{stage}-0123456789ab").mkdir(parents=True)
    require_no_problem(examine(config))


# SLURM


def slurm(tools: Callable[[str, str], None], sinfo: str) -> None:
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        tools(name, "exit 0")
    tools("sinfo", sinfo)


PARTITIONS = (
    "printf 'gpu up 4 1-12:00:00 1-infinite\\ncpu* up 10 infinite 2-4\\nold down 2 30:00 2\\n'"
)


def about_slurm(nodes: int = 2, **backend: object) -> list[Finding]:
    launch = Launch.model_validate({"nodes": nodes, "backend": {"kind": "slurm", **backend}})
    assert isinstance(launch.backend, SlurmLaunch)
    return list(check_slurm(launch, launch.backend))


def test_the_partition_must_exist_and_be_up(tools: Callable[[str, str], None]) -> None:
    slurm(tools, PARTITIONS)
    one(about_slurm(partition="gpu"), Severity.OK, "partition gpu is up, 4 nodes")
    one(about_slurm(), Severity.OK, "partition cpu is up, 10 nodes")
    one(about_slurm(partition="old"), Severity.WARNING, "partition old is down")
    one(about_slurm(partition="big"), Severity.PROBLEM, "does not exist; there are cpu, gpu, old")


@pytest.mark.parametrize(
    ("nodes", "partition", "minutes", "said"),
    [
        (5, "gpu", None, "partition gpu has 4 nodes, launch.nodes is 5"),
        (5, "cpu", None, "partition cpu takes jobs of 2-4 nodes, launch.nodes is 5"),
        (1, "cpu", None, "partition cpu takes jobs of 2-4 nodes, launch.nodes is 1"),
        (1, "old", None, "partition old takes jobs of 2 nodes, launch.nodes is 1"),
        (4, "gpu", 36 * 60 + 1, "at most 1-12:00:00, launch.backend.time_limit_minutes is 2161"),
        (2, "old", 31, "at most 30:00, launch.backend.time_limit_minutes is 31"),
    ],
)
def test_a_job_that_its_partition_never_starts_is_a_problem(
    tools: Callable[[str, str], None], nodes: int, partition: str, minutes: int | None, said: str
) -> None:
    slurm(tools, PARTITIONS)
    asked = {"partition": partition, "time_limit_minutes": minutes}
    one(about_slurm(nodes, **asked), Severity.PROBLEM, said)
    # A QOS may lift a partition's limits; it brings no nodes.
    lifted = Severity.PROBLEM if "has 4 nodes" in said else Severity.WARNING
    one(about_slurm(nodes, qos="long", **asked), lifted, said)


def test_a_job_at_the_limits_of_its_partition_is_fine(tools: Callable[[str, str], None]) -> None:
    slurm(tools, PARTITIONS)
    fits = [
        about_slurm(4, partition="gpu", time_limit_minutes=36 * 60),
        about_slurm(4, partition="cpu", time_limit_minutes=10**6),
    ]
    assert [severities(found) for found in fits] == [{Severity.OK}] * 2


def test_a_cluster_that_cannot_be_asked_is_a_problem(
    tools: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm(tools, "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    one(about_slurm(), Severity.PROBLEM, "Unable to contact slurm controller")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    one(about_slurm(), Severity.PROBLEM, "sbatch, squeue, scontrol, scancel is not on the")


def test_on_a_cluster_this_machine_needs_no_gpu(
    tools: Callable[[str, str], None], tmp_path: Path
) -> None:
    slurm(tools, PARTITIONS)
    tools("nvidia-smi", "exit 0")
    found = examine(toy(f"run_dir={tmp_path}/run", CLUSTER, *ROWS))
    require_no_problem(found)
    one(found, Severity.OK, "partition gpu is up")
    # The quantized stages keep W_hat besides.
    one(found, Severity.INFORMATION, "8 processes: stage w8 needs at least")


# Disk


def about_disk(config: GraceConfig) -> list[Finding]:
    return list(check_disk(config, *models(config)))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of the given tmpfs options, where this user may."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "grace-test", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_the_run_would_fill_is_a_problem(tiny_disk: Callable[[str], Path]) -> None:
    folder = tiny_disk("size=20m")
    finding = one(about_disk(toy(f"run_dir={folder}/run")), Severity.PROBLEM, "21.0 MB free")
    for part in ("checkpoints 47.1 MB", "trained bf16 2.2 MB", "release w4", "data 24.0 MB"):
        assert part in finding.text
    assert not list(folder.iterdir()), "the check leaves nothing behind"


def test_what_is_written_already_is_not_needed_again(tmp_path: Path) -> None:
    config = toy(f"run_dir={tmp_path}")
    assert "0 kB of it is there" in about_disk(config)[0].text
    trained = tmp_path / "artifacts" / "bf16-0123456789ab" / "model"
    trained.mkdir(parents=True)
    (trained / "model.safetensors").write_bytes(bytes(1_000_000))
    (trained / "more").write_bytes(bytes(9_000_000))  # never more than the part's own size
    assert "2.2 MB of it is there" in about_disk(config)[0].text


def test_the_checkpoints_of_a_run_are_as_large_as_the_formula(tmp_path: Path) -> None:
    """A checkpoint is 2 bytes of weights and 12 of optimizer; keep_checkpoints + 1 of them."""
    config = toy("distill.training.keep_checkpoints=3", "distill.training.zero_stage=0")
    teacher, student = models(config)
    found = disk.parts(config, teacher, student)
    assert found is not None and found[0].name == "checkpoints"
    assert student.parameters is not None
    # Without ZeRO both processes write the optimizer.
    assert found[0].size == 4 * student.parameters * (2 + 2 * 12)


def test_recorded_outputs_take_the_bytes_of_their_numbers(tmp_path: Path) -> None:
    config = toy("teacher_outputs={top_k: 100, shard_samples: 600}", "data.max_pixels=25600")
    teacher, student = models(config)
    assert student.pixels_per_token == 16**2
    found = {part.name: part for part in disk.parts(config, teacher, student) or []}
    # 2400 records: 7 supervised tokens of 100 logits, a Gram of 100 visual tokens.
    assert found["teacher outputs"].size == 2400 * (7 * (100 * 6 + 10) + 100 * 101)
    assert found["teacher outputs"].files >= 5
    outputs = tmp_path / "artifacts" / "teacher-outputs-0123456789ab"
    outputs.mkdir(parents=True)
    fit = "teacher_fit={training: {steps: 2, row_tokens: 1024, rows_per_step: 4}}"
    (outputs / "shard").write_bytes(bytes(5_000_000))
    assert (
        "5.0 MB of it is there"
        in about_disk(toy(f"run_dir={tmp_path}", "teacher_outputs={}", fit))[0].text
    )


def test_benchmarks_that_are_still_to_be_read_need_room(
    tmp_path: Path, tiny_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy(f"run_dir={tmp_path}/run")
    sizes = [Size("mmstar", 3e6, 4e6), Size("ai2d")]

    def found() -> list[Finding]:
        return list(check_disk(config, *models(config), sizes))

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    text = " ".join(finding.text for finding in found())
    assert "benchmarks 3.0 MB, downloaded benchmarks 4.0 MB" in text
    one(found(), Severity.UNCHECKED, "how large the benchmarks ai2d are")
    other = tiny_disk("size=2m")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(other / "cache"))
    one(found(), Severity.PROBLEM, "the benchmarks download 4.0 MB")
    assert "downloaded benchmarks" not in " ".join(finding.text for finding in found())


def test_a_disk_without_room_for_more_files_is_a_problem(
    tiny_disk: Callable[[str], Path],
) -> None:
    folder = tiny_disk("size=1g,nr_inodes=100")
    one(about_disk(toy(f"run_dir={folder}/run")), Severity.PROBLEM, "more files")


def test_a_disk_that_nothing_can_be_written_to_is_a_problem(
    tiny_disk: Callable[[str], Path],
) -> None:
    folder = tiny_disk("size=1g,ro")
    one(about_disk(toy(f"run_dir={folder}/run")), Severity.PROBLEM, "Read-only file system")


def test_several_nodes_need_one_file_system(tiny_disk: Callable[[str], Path]) -> None:
    folder = tiny_disk("size=1g")
    place = f"run_dir={folder}/run"
    config = toy(place, CLUSTER, *ROWS)
    finding = one(about_disk(config), Severity.WARNING, "is on a tmpfs file system")
    assert "share" in finding.remedy
    assert severities(about_disk(toy(place))) == {Severity.OK}


def test_unknown_sizes_are_said_to_be_unknown() -> None:
    config = toy()
    nowhere = Checkpoint(config.models.student, None)
    one(check_disk(config, nowhere, nowhere), Severity.UNCHECKED, "how many weights")
