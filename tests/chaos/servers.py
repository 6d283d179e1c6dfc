"""Prefect, MLflow and a worker that can be killed, stopped for a while and started again.

Addresses and databases stay the same over restarts, as with a service manager on a real machine.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from demo.prefect_api import PrefectApi
from demo.services import HOST, environment, free_port, mlflow_server, prefect_server, wait_for
from grace_core.launch.process_group import end_process_group, start_process_group
from tests.deployed import Deployed

ROOT = Path(__file__).resolve().parents[2]
POOL = "grace-gpu"


class Service:
    """One long-running program, with its log appended to one file over all restarts."""

    def __init__(
        self, name: str, arguments: Sequence[str], env: dict[str, str], logs: Path, address: str
    ) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        self._arguments, self._env, self._address = arguments, env, address
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was never started"
        return self._process

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it unless it runs: two faults may each have wanted it back."""
        if self.alive:
            return
        with self.log.open("ab") as log:
            self._process = start_process_group(
                [sys.executable, *self._arguments],
                env=self._env,
                stdout=log,
                stderr=log,
                folder=ROOT,
            )

    def wait(self) -> None:
        """Wait until it answers; returns at once for a program without an address."""
        if self._address:
            wait_for(self._address, self.process, self.log)

    def kill(self) -> None:
        """SIGKILL it with its own children, as the kernel does when memory runs out."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def kill_alone(self) -> None:
        """SIGKILL it and leave its children, as they are, behind."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """It takes connections and never answers, until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        if self._process is not None:
            self.resume()
            end_process_group(self._process, set(), grace_seconds=5.0)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for one in (*process.children(recursive=True), process):
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)


@dataclass(frozen=True)
class Servers:
    """Everything a flow run needs around it."""

    prefect: Service
    mlflow: Service
    worker: Service
    api: PrefectApi
    deployed: Deployed
    mlflow_address: str


@contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    """Start all three, with the deployments registered and the zombie automation set up."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    prefect, mlflow = f"http://{HOST}:{free_port(0)}", f"http://{HOST}:{free_port(0)}"
    env = environment(folder, prefect, mlflow)
    (folder / "mlflow").mkdir()
    worker = ["-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    made = Servers(
        Service("prefect-server", prefect_server(prefect), env, logs, f"{prefect}/api/health"),
        Service(
            "mlflow-server", mlflow_server(mlflow, folder / "mlflow"), env, logs, f"{mlflow}/health"
        ),
        Service("worker", worker, env, logs, ""),
        PrefectApi(f"{prefect}/api"),
        Deployed(f"{prefect}/api"),
        mlflow,
    )
    with ExitStack() as stack:
        for service in (made.prefect, made.mlflow):
            stack.callback(service.end)
            service.start()
        for service in (made.prefect, made.mlflow):
            service.wait()
        subprocess.run([sys.executable, "-m", "operations", "setup"], cwd=ROOT, env=env, check=True)
        stack.callback(made.worker.end)
        made.worker.start()
        yield made
