"""The SLURM back-end on a real cluster, with ranks that do not train: starts and ends of jobs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from grace_core.config.launch import Launch, SlurmLaunch
from grace_core.doctor.findings import Severity
from grace_core.doctor.slurm import check_slurm
from grace_core.errors import GraceError
from grace_core.launch.backend import Program, backend_of
from grace_core.launch.process_group import ProcessesFailed
from tests.conftest import ROOT
from tests.findings import one
from tests.slurm_cluster import SlurmCluster, missing
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
slurm = pytest.mark.slurm

RANKS = 2
PATIENCE = 120.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _here(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield
    cluster.run("scancel", "--user=root")


def make_launch(**given: Any) -> Launch:
    backend = {"kind": "slurm", "poll_seconds": 1, **given.pop("backend", {})}
    values = {"nodes": 2, "device": "cpu", "grace_seconds": 29.0, "backend": backend, **given}
    return Launch.model_validate(values)


@dataclass
class Run:
    """One watch of a job of two nodes; `on_poll` is called with this as it goes on."""

    folder: Path
    plan: str
    launch: Launch = field(default_factory=make_launch)
    on_poll: Callable[[Run], None] = lambda run: None
    lines: list[str] = field(default_factory=list)

    @property
    def program(self) -> Program:
        arguments = [str(self.folder), self.plan]
        return Program("bf16", "tests.slurm_rank", arguments, self.folder / "work")

    def watch(self) -> None:
        until = time.monotonic() + PATIENCE

        def poll() -> None:
            assert time.monotonic() < until, self.state()
            self.on_poll(self)

        backend_of(self.launch).run(self.program, on_poll=poll, on_line=self.lines.append)

    def started(self, start: int = 0) -> bool:
        """Whether all ranks of that start run."""
        return len(list(self.folder.glob(f"started-{start}-*"))) == RANKS

    def saved(self, start: int = 0) -> bool:
        return len(list(self.folder.glob(f"saved-{start}-*"))) == RANKS

    def go(self) -> None:
        (self.folder / "go").touch()

    @property
    def job(self) -> int:
        return int(self.record["id"])

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.folder / "work" / "slurm" / "job.json").read_text()
        )
        return found

    def state(self) -> str:
        log = self.program.logs / "job.log"
        return log.read_text() if log.exists() else "(nothing ran)"


def once(act: Callable[[Run], None], when: Callable[[Run], bool]) -> Callable[[Run], None]:
    """An `on_poll` that acts once, as soon as `when` holds."""
    done: list[bool] = []

    def poll(run: Run) -> None:
        if not done and when(run):
            done.append(True)
            act(run)

    return poll


def nothing_left(cluster: SlurmCluster) -> bool:
    return not cluster.processes() and not cluster.output("squeue", "--noheader")


# --- in every run of the tests ------------------------------------------------------------------


def test_a_failing_rank_is_named_with_what_it_wrote(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not-for-ranks")
    monkeypatch.setenv("SBATCH_PARTITION", "absent")
    folder = tmp_path / "50% done's"
    folder.mkdir()
    run = Run(folder, "fail", make_launch(backend={"setup": ["echo prepared: $SLURM_NODEID"]}))
    with pytest.raises(ProcessesFailed) as caught:
        run.watch()
    said = str(caught.value)
    assert f"stage bf16: its SLURM job {run.job} " in said
    assert "ended as FAILED (rank 1 on node " in said and "failed first, with exit code 1)" in said
    assert said.rstrip().endswith("ValueError: bad row in shard-7")
    assert str(run.program.logs) in said
    assert caught.value.exit_code == 1
    assert (folder / "started-0-0").read_text().split()[1:] == []
    assert any(line.startswith("[default0]:rank 0 of 2, start 0") for line in run.lines)
    assert {"prepared: 0", "prepared: 1"} <= set(run.lines)
    assert any(line.startswith("[default1]:ValueError: bad row") for line in run.lines)
    assert not any("rank 1 of 2" in line for line in run.lines)
    kept = sorted((run.program.logs / "ranks" / "attempt-001").rglob("stdout.log"))
    assert {file.read_text().splitlines()[0] for file in kept} == {
        "rank 0 of 2, start 0",
        "rank 1 of 2, start 0",
    }


def test_cancelling_leaves_nothing_behind(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A watch that is interrupted cancels its job, which saves and is not requeued."""

    def interrupt(run: Run) -> None:
        raise KeyboardInterrupt

    run = Run(tmp_path, "wait", on_poll=once(interrupt, Run.started))
    with pytest.raises(KeyboardInterrupt):
        run.watch()
    assert "JobState=CANCELLED" in cluster.output("scontrol", "show", "job", str(run.job))
    assert wait_until(lambda: nothing_left(cluster), PATIENCE)
    assert run.saved()
    time.sleep(3)  # a requeued job would be there again
    assert nothing_left(cluster)


def test_a_refused_job_says_why(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = Run(tmp_path, "wait", make_launch(backend={"partition": "absent"}))
    with pytest.raises(GraceError, match=r"(?s)SLURM refused the job.*invalid partition"):
        run.watch()


def test_an_error_of_the_watch_leaves_the_job_alone(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A handle that NFS lost says nothing about the ranks: they go on, and are watched again."""

    def lose(run: Run) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "metrics.jsonl")

    run = Run(tmp_path, "wait", on_poll=once(lose, Run.started))
    with pytest.raises(GraceError, match=r"Stale file handle.*left alone.*run again") as caught:
        run.watch()
    assert isinstance(caught.value.__cause__, OSError)
    submitted = run.job
    assert "JobState=RUNNING" in cluster.output("scontrol", "show", "job", str(submitted))
    again = Run(tmp_path, "wait", on_poll=once(Run.go, Run.started))
    again.watch()
    assert again.job == submitted and not run.saved()
    assert len(list(tmp_path.glob("started-*"))) == RANKS


def test_a_job_that_can_never_start_is_refused(cluster: SlurmCluster, tmp_path: Path) -> None:
    """slurmctld takes it and lets it wait for ever; the doctor sees it before."""
    launch = make_launch(nodes=4)
    assert isinstance(launch.backend, SlurmLaunch)
    one(check_slurm(launch, launch.backend), Severity.PROBLEM, "has 3 nodes, launch.nodes is 4")
    run = Run(tmp_path, "wait", launch)
    with pytest.raises(GraceError, match=r"could never start \(PartitionNodeLimit\).*launch.nodes"):
        run.watch()
    assert wait_until(lambda: nothing_left(cluster), PATIENCE)


# --- make slurm-test ----------------------------------------------------------------------------


@slurm
@pytest.mark.parametrize("partition", ["low", "abrupt"])
def test_preemption_requeues(cluster: SlurmCluster, tmp_path: Path, partition: str) -> None:
    """After a grace (SIGTERM to the steps) and at once (SIGTERM to everything)."""
    run = Run(
        tmp_path,
        "once",
        make_launch(backend={"partition": partition}),
        once(lambda run: preempt(cluster), Run.started),
    )
    run.watch()
    assert run.saved() and run.started(1)
    assert "Restarts=1" in cluster.output("scontrol", "show", "job", str(run.job))
    kept = {file.parent.name for file in run.program.logs.glob("ranks/*/node-0")}
    assert kept == {"attempt-001", "attempt-002"}


def preempt(cluster: SlurmCluster) -> None:
    """A job of higher priority wants all nodes, and is soon done."""
    command = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null")
    cluster.output("sbatch", *command, "--wrap=sleep 1")


@slurm
def test_the_time_limit_is_foreseen(cluster: SlurmCluster, tmp_path: Path) -> None:
    """SLURM's own --signal, as early as its clock of 30 seconds makes it."""
    backend = {"time_limit_minutes": 1, "warning_seconds": 40}
    run = Run(tmp_path, "once", make_launch(backend=backend))
    run.watch()
    assert run.saved() and run.started(1)
    assert "the time limit is near" in run.state()


@slurm
def test_a_job_outlives_its_watcher_and_is_adopted(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = Run(tmp_path, "wait", on_poll=once(Run.go, Run.started))
    program = f"""
from pathlib import Path
from tests.test_slurm_launch import Run
Run(Path({str(tmp_path)!r}), "wait").watch()
"""
    first = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        assert wait_until(run.started, PATIENCE)
    finally:
        first.kill()
        first.wait()
    submitted, name = run.job, run.record["name"]
    # As if it had died before it wrote the number.
    (tmp_path / "work" / "slurm" / "job.json").unlink()
    run.watch()
    assert run.job == submitted
    known = ("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%A")
    assert cluster.output(*known).split() == [str(submitted)]
    assert len(list(tmp_path.glob("started-*"))) == RANKS
    assert "agents ended with 0" in run.state()


@slurm
def test_slurmctld_may_be_away_and_may_forget(
    cluster: SlurmCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Away while the job runs; back, and asked again; then it forgets the job, which has ended."""
    moments: dict[str, float] = {}

    def poll(run: Run) -> None:
        now = time.monotonic()
        if run.started() and "away" not in moments:
            cluster.stop_controller()
            moments["away"] = now
        if "away" in moments and "back" not in moments and now - moments["away"] > 6:
            cluster.start_controller()
            moments["back"] = now
        if "back" in moments and "end" not in moments and now - moments["back"] > 4:
            cluster.stop_controller()
            run.go()
            assert wait_until(lambda: "agents ended with 0" in run.state(), PATIENCE)
            cluster.start_controller("-c")
            moments["end"] = now

    run = Run(tmp_path, "wait", on_poll=poll)
    run.watch()
    assert "end" in moments
    assert "Invalid job id" in cluster.run("scontrol", "show", "job", str(run.job)).stderr
    assert caplog.text.count("slurmctld does not answer") == 1
    assert len(list(tmp_path.glob("started-*"))) == RANKS
    assert wait_until(lambda: not cluster.processes(), PATIENCE)


@slurm
def test_a_lost_node_requeues(cluster: SlurmCluster, tmp_path: Path) -> None:
    def lose(run: Run) -> None:
        nodes = cluster.output("squeue", "--noheader", "--format=%N")
        lost.append(cluster.output("scontrol", "show", "hostnames", nodes).split()[1])
        cluster.end_node(lost[0])

    lost: list[str] = []
    run = Run(tmp_path, "once", on_poll=once(lose, Run.started))
    try:
        run.watch()
    finally:
        cluster.start_node(lost[0])
    assert run.started(1)


@slurm
def test_restarts_are_counted(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = Run(tmp_path, "stop", make_launch(backend={"max_restarts": 1}))
    with pytest.raises(ProcessesFailed, match=r"max_restarts") as caught:
        run.watch()
    assert caught.value.exit_code == 143
    assert run.started(1) and not run.started(2)


@slurm
def test_a_killed_rank_is_named(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = Run(tmp_path, "killed")
    with pytest.raises(ProcessesFailed, match=r"rank 1 on node \d failed first, with signal SIGK"):
        run.watch()


@slurm
def test_time_runs_out(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = Run(tmp_path, "wait", make_launch(timeout_hours=4 / 3600))
    with pytest.raises(ProcessesFailed, match=r"did not end within .* was cancelled") as caught:
        run.watch()
    assert caught.value.exit_code is None
    assert wait_until(lambda: nothing_left(cluster), PATIENCE)


@slurm
def test_someone_cancels_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    """With scancel, from elsewhere: it is not requeued, and the watch says so."""
    run = Run(tmp_path, "wait", on_poll=once(lambda r: cancel(cluster, r), Run.started))
    with pytest.raises(ProcessesFailed, match=r"ended as CANCELLED.*someone cancelled it"):
        run.watch()
    assert run.saved() and not run.started(1)


def cancel(cluster: SlurmCluster, run: Run) -> None:
    cluster.output("scancel", str(run.job))


@slurm
def test_sigterm_of_the_watching_process_cancels(cluster: SlurmCluster, tmp_path: Path) -> None:
    """What Prefect and systemd send; the command line turns it into an interruption."""
    program = f"""
import signal
from pathlib import Path
from tests.test_slurm_launch import Run
signal.signal(signal.SIGTERM, signal.default_int_handler)
Run(Path({str(tmp_path)!r}), "wait").watch()
"""
    run = Run(tmp_path, "wait")
    watcher = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    assert wait_until(run.started, PATIENCE)
    ranks = [psutil.Process(int(f.read_text().split()[0])) for f in tmp_path.glob("started-*")]
    os.kill(watcher.pid, signal.SIGTERM)
    assert watcher.wait(60) != 0
    assert wait_until(lambda: nothing_left(cluster), PATIENCE)
    assert not any(rank.is_running() for rank in ranks)
    assert run.saved()
