"""What SLURM is asked for, and the environment a job gets; no cluster is needed."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from grace_core.config.launch import Launch
from grace_core.config.load import load_config
from grace_core.config.tree import GraceConfig
from grace_core.errors import ConfigError
from grace_core.launch.backend import Program, backend_of
from grace_core.launch.local import LocalBackend
from grace_core.launch.node_failure import (
    NodeFailure,
    first_node_failure,
    node_folder,
    record_failure,
)
from grace_core.launch.slurm import SlurmBackend, job_environment
from grace_core.launch.slurm_commands import JobInfo, without_slurm
from grace_core.launch.slurm_files import JobEnd, SlurmFiles
from grace_core.launch.slurm_script import batch_script, node_script
from tests.conftest import ROOT

FULL = {
    "partition": "gpu",
    "account": "vision",
    "qos": "long",
    "constraint": "[a|b]&h100",
    "memory_gb": 900,
    "time_limit_minutes": 1440,
    "warning_seconds": 600,
    "max_restarts": 7,
    "setup": ["module load cuda/12", "ulimit -n 65536"],
    "options": ["--exclusive", "--exclude=gpu07"],
}


def launch(nodes: int = 4, processes: int = 8, device: str = "cuda", **backend: Any) -> Launch:
    return Launch.model_validate(
        {
            "nodes": nodes,
            "processes": processes,
            "threads_per_process": 6,
            "device": device,
            "backend": {"kind": "slurm", **backend},
        }
    )


def program(work: Path) -> Program:
    return Program("w4", "grace_core.training.worker", [f"{work}/job.json"], work)


def options(given: Launch, work: Path) -> list[str]:
    text = batch_script(given, SlurmFiles(program(work), given.nodes), 1)
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert text.splitlines()[1 : 1 + len(lines)] == lines, "options stand before any command"
    return [line.removeprefix("#SBATCH ") for line in lines]


def test_every_setting_becomes_an_option(tmp_path: Path) -> None:
    found = options(launch(**FULL), tmp_path)
    assert set(found) >= {
        *("--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=48", "--gpus-per-node=8"),
        *("--mem=900G", "--partition=gpu", "--account=vision", "--qos=long", "--time=1440"),
        *("--signal=B:USR1@600", "--requeue", "--open-mode=append", "--exclusive"),
        *("--exclude=gpu07", "--constraint='[a|b]&h100'"),
    }
    assert [o for o in found if o.startswith("--job-name=grace-w4-")]


def test_what_is_not_set_is_left_to_the_cluster(tmp_path: Path) -> None:
    names = {option.split("=")[0] for option in options(launch(), tmp_path)}
    assert not names & {"--partition", "--account", "--qos", "--constraint", "--mem", "--time"}


@pytest.mark.parametrize(
    ("device", "given", "gpus"),
    [("cpu", None, None), ("auto", None, "8"), ("cuda", 4, "4"), ("cuda", 0, None)],
)
def test_gpus(tmp_path: Path, device: str, given: int | None, gpus: str | None) -> None:
    found = options(launch(device=device, gpus_per_node=given), tmp_path)
    expected = [] if gpus is None else [f"--gpus-per-node={gpus}"]
    assert [option for option in found if "gpu" in option.split("=")[0]] == expected


@pytest.mark.parametrize("name", ["plain", "a b", "50% done's", '"$HOME"'])
def test_scripts_are_shell_whatever_the_folder_is_called(tmp_path: Path, name: str) -> None:
    work = tmp_path / name
    given = launch(**FULL)
    node = node_script(given, program(work))
    for script in (batch_script(given, SlurmFiles(program(work), 4), 3), node):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "\nmodule load cuda/12\nulimit -n 65536\nexec " in node
    command = shlex.split(node[node.index("exec ") :])
    assert command[-2:] == ["grace_core.training.worker", f"{work}/job.json"]
    assert f"--logs={work}/logs" in command


def test_one_name_for_one_training(tmp_path: Path) -> None:
    names = [SlurmFiles(program(tmp_path / folder), 2).job_name for folder in ("a", "a", "b")]
    assert names[0] == names[1] != names[2]


def test_a_job_gets_no_secret_and_nothing_of_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_TOKEN", "SLURM_JOB_ID", "SBATCH_ACCOUNT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "7")
    for name in ("SLURM_CONF", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "kept")
    found = job_environment(launch())
    assert not {"HF_TOKEN", "SLURM_JOB_ID", "SBATCH_ACCOUNT", "CUDA_VISIBLE_DEVICES"} & set(found)
    assert found["SLURM_CONF"] == found["NCCL_SOCKET_IFNAME"] == "kept"
    assert found["OMP_NUM_THREADS"] == "6"
    assert without_slurm({"SLURM_NTASKS": "1", "A": "2"}) == {"A": "2"}


def test_the_end_is_read_as_the_job_wrote_it(tmp_path: Path) -> None:
    files = SlurmFiles(program(tmp_path), 1)
    files.write_scripts("", "")
    assert files.end_of(5) is None
    (tmp_path / "slurm" / "end-5.json").write_text('{"exit_code": 3, "restarts": 2}\n')
    assert files.end_of(5) == JobEnd(3, 2)
    files.mark_cancelled(5)
    files.record_job(5)
    assert not (tmp_path / "slurm" / "cancelled-5").exists(), "it is watched: it may be requeued"


@pytest.mark.parametrize(
    ("state", "ended"),
    [("PENDING", False), ("COMPLETING", False), ("REQUEUE_HOLD", False), ("TIMEOUT", True)],
)
def test_states(state: str, ended: bool) -> None:
    assert JobInfo(1, state, "None", 0, 0).ended is ended


def test_the_earliest_failure_of_all_nodes_counts(tmp_path: Path) -> None:
    assert first_node_failure(tmp_path) is None
    failures = [NodeFailure(20.5, 0, 1, 1, 1), NodeFailure(20.1, 1, 2, 0, -9)]
    for failure in failures:
        ranks = node_folder(tmp_path, 2, failure.node)
        output = ranks / "17-0_x" / "attempt_0" / str(failure.local_rank)
        output.mkdir(parents=True)
        (output / "stderr.log").write_text(f"rank {failure.rank} says why\n")
        record_failure(ranks, failure)
    record_failure(node_folder(tmp_path, 1, 0), NodeFailure(1.0, 0, 0, 0, 1))
    assert first_node_failure(tmp_path) == (failures[1], ["rank 2 says why"])


def test_the_configuration_chooses() -> None:
    assert isinstance(backend_of(Launch()), LocalBackend)
    assert isinstance(backend_of(launch()), SlurmBackend)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["launch.nodes=2"], "launch.nodes (2): the local back-end"),
        (['launch.backend={"kind": "slurm", "options": ["--nodes=2"]}'], "set launch.nodes"),
        (['launch.backend={"kind": "slurm", "options": ["-J x"]}'], "leave it out"),
        (['launch.backend={"kind": "slurm", "options": ["-x a\\nreboot"]}'], "options.0"),
        (['launch.backend={"kind": "slurm", "partition": "a b"}'], "launch.backend.partition"),
        (
            ['launch.backend={"kind": "slurm", "time_limit_minutes": 3}'],
            "warning_seconds (180) is not below time_limit_minutes (3)",
        ),
        (
            ["launch.nodes=3", 'launch.backend={"kind": "slurm"}'],
            "launch.nodes * launch.processes (3 * 2); use 6",
        ),
    ],
)
def test_a_launch_that_cannot_be_is_refused(settings: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / "toy.yaml", settings)
    assert problem in str(caught.value)


def test_ranks_are_counted_over_nodes() -> None:
    settings = ["launch.nodes=2", 'launch.backend={"kind": "slurm", "warning_seconds": 90}']
    config: GraceConfig = load_config(ROOT / "configs" / "toy.yaml", settings)
    assert config.launch.world_size == 4
    assert config.launch.seconds_to_save == 90
