"""Real trainings as SLURM jobs: two nodes, one job, the same weights as on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm_cluster import SlurmCluster, missing
from tests.slurm_training import (
    LOCAL,
    STEPS,
    Watched,
    job_id,
    make_inputs,
    make_job,
    measured,
    slurm_launch,
    trained,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _here(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Two ranks on one machine, not disturbed."""
    root = tmp_path_factory.mktemp("training")
    make_inputs(root)
    watched = Watched(make_job(root, "local"), LOCAL)
    watched.run()
    assert trained(watched.job)
    return watched


def assert_same(found: Watched, expected: Watched) -> None:
    assert trained(found.job) == trained(expected.job)
    assert measured(found.job) == measured(expected.job)
    assert found.steps == expected.steps == list(range(1, STEPS + 1))


def test_two_nodes_train_as_one_machine_does(local: Watched) -> None:
    """ZeRO-2 over two nodes of one process each; output is streamed meanwhile."""
    watched = Watched(make_job(local.job.work.parent.parent, "two-nodes"), slurm_launch())
    watched.run()
    assert_same(watched, local)
    found = json.loads(watched.job.environment.read_text(encoding="utf-8"))
    assert found["world_size"] == "2"
    kept = list((watched.job.work / "logs" / "ranks" / "attempt-001").glob("node-*"))
    assert sorted(folder.name for folder in kept) == ["node-0", "node-1"]
    assert any(line.startswith("[default0]:") for line in watched.lines)


def test_a_preempted_training_goes_on_exactly(local: Watched, cluster: SlurmCluster) -> None:
    """A job of higher priority takes all nodes; the training saves, waits and goes on."""

    def preempt(step: int) -> None:
        if step == 2:
            command = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null")
            cluster.output("sbatch", *command, "--wrap=sleep 1")

    watched = Watched(make_job(local.job.work.parent.parent, "preempted"), slurm_launch())
    watched.run(on_step=preempt)
    assert "Restarts=1" in cluster.output("scontrol", "show", "job", str(job_id(watched.job)))
    logs = watched.job.work / "logs"
    said = "".join(file.read_text() for file in logs.glob("node-*.stderr.log"))
    assert "saved, nothing is lost" in said and "continuing after step" in said
    assert_same(watched, local)


def test_the_whole_pipeline_runs_with_slurm(cluster: SlurmCluster, tmp_path: Path) -> None:
    """`grace run` on a machine that does not train: data, both trainings, release and the rest."""
    settings = {
        "run_dir": tmp_path / "run",
        "data.source.records": 60,
        "distill.training.steps": 2,
        "quantize.training.steps": 2,
        "quantize.variants": "[w4]",
        "evaluation.items": 4,
        "launch": json.dumps(
            {
                "nodes": 2,
                "processes": 1,
                "device": "cpu",
                "backend": {"kind": "slurm", "partition": "low", "poll_seconds": 1},
            }
        ),
    }
    given = [f"--set={name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "operations", "run", "configs/toy.yaml", *given]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "releases").is_dir()
    states = cluster.output("squeue", "--noheader", "--states=all", "--format=%T %j")
    ours = [line for line in states.splitlines() if "grace-" in line]
    assert len([line for line in ours if line.startswith("COMPLETED grace-w4-")]) == 1
