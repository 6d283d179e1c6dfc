"""A real SLURM on this machine: munged, slurmctld and several slurmd, in a folder of their own.

    python -m tests.slurm_cluster       # prints what to export, and runs until Ctrl-C

As a context manager it is what the tests of the SLURM back-end run on. It needs root (slurmd starts
processes of other users) and Debian's `slurm-wlm` and `munge`; no accounting database.

Partitions: `low` (default) is preempted by `high` after a grace, `abrupt` at once. Every node is
this machine, with more CPUs than it has.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2", "n3")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
_START_SECONDS = 30.0
_END_SECONDS = 40.0


def missing() -> str | None:
    """Why no cluster can be started here; None where it can."""
    absent = [command for command in COMMANDS if shutil.which(command, path=_PATH) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} missing): make system-deps"
    if os.getuid() != 0:
        return "slurmd needs root"
    return None


class SlurmCluster:
    """Servers in `folder`; `environment` is what its users need besides their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf)}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        ports = _free_ports(len(NODES) + 1)
        self.conf.write_text(_configuration(self.folder, ports), encoding="utf-8")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o400)
        try:
            self._start_munge(key)
            self.start_controller()
            for node in NODES:
                self._start(node, ["slurmd", "-D", "-N", node, "-f", str(self.conf)])
            self._wait(self._all_idle, "nodes to be idle")
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def start_controller(self, *options: str) -> None:
        """Start slurmctld, which goes on with the jobs it knew (`-c`: forgets them)."""
        self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.conf), *options])
        self._wait(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld to answer")

    def stop_controller(self) -> None:
        _stop(self._servers.pop("slurmctld"))

    def end_node(self, node: str) -> None:
        """As a crash of the machine: slurmd and all it started are killed."""
        server = self._servers.pop(node)
        mine = [p for p in self.processes() if f"-N {node}" in _command(p) or _of_node(p, node)]
        for process in (psutil.Process(server.pid), *mine):
            process.kill()
        server.wait()

    def start_node(self, node: str) -> None:
        self._start(node, ["slurmd", "-D", "-N", node, "-f", str(self.conf)])

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """One of SLURM's commands, with what it said."""
        return subprocess.run(
            command,
            env=os.environ | self.environment | {"PATH": _PATH},
            capture_output=True,
            text=True,
            check=False,
        )

    def output(self, *command: str) -> str:
        """What a command that must succeed printed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def processes(self) -> list[psutil.Process]:
        """What slurmd started for jobs of this cluster and is still alive."""
        return [
            process
            for process in psutil.process_iter()
            if process.pid not in {server.pid for server in self._servers.values()}
            and process.pid != os.getpid()
            and self._is_of_a_job(process)
        ]

    def end(self) -> None:
        """End every job and every server; whoever resists is killed."""
        if "slurmctld" in self._servers:
            self.run("scancel", "--user=root")
            deadline = time.monotonic() + _END_SECONDS
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.2)
        for server in reversed(list(self._servers.values())):
            _stop(server)
        self._servers.clear()
        for process in self.processes():
            process.kill()

    def _is_of_a_job(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            found, name = process.environ(), process.name()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False
        ours = found.get("SLURM_CONF") == str(self.conf)
        return ours and ("SLURM_JOB_ID" in found or name == "slurmstepd")

    def _start_munge(self, key: Path) -> None:
        folder = self.folder
        socket_file = folder / "munge.socket"
        self._start(
            "munged",
            [
                *("munged", "--foreground", "--force", f"--key-file={key}"),
                *(f"--socket={socket_file}", f"--pid-file={folder / 'munged.pid'}"),
                *(f"--log-file={folder / 'munged.log'}", f"--seed-file={folder / 'munge.seed'}"),
            ],
        )
        self._wait(socket_file.exists, "munge's socket")

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._servers[name] = subprocess.Popen(
                command,
                env=os.environ | self.environment | {"PATH": _PATH},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _all_idle(self) -> bool:
        done = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T")
        return done.stdout.split() == ["idle"] * len(NODES)

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not holds():
            for name, server in self._servers.items():
                if server.poll() is not None:
                    raise RuntimeError(f"{name} ended: {self._log_of(name)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} within {_START_SECONDS:g} s; see {self.folder}")
            time.sleep(0.1)

    def _log_of(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(encoding="utf-8", errors="replace")[-2000:]


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _configuration(folder: Path, ports: list[int]) -> str:
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Boards=1 "
        "SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000"
        for node, port in zip(NODES, ports[1:], strict=True)
    )
    return f"""ClusterName=grace-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits while its old credential holds: by default two minutes, at least 5 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=verbose
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# More CPUs than there are.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,batch_sched_delay=0,bf_interval=5
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=86400
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP
PartitionName=abrupt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _of_node(process: psutil.Process, node: str) -> bool:
    try:
        return process.environ().get("SLURMD_NODENAME") == node
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def main() -> int:
    if (reason := missing()) is not None:
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="grace-slurm-") as folder:
        with SlurmCluster(Path(folder)) as cluster:
            print(f"export SLURM_CONF={cluster.conf}", flush=True)
            print(f"{len(NODES)} nodes are up; logs in {folder}; Ctrl-C ends them", file=sys.stderr)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                signal.pause()
            except KeyboardInterrupt:
                print("ending", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
