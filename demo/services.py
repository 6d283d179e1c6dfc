"""The servers of a local run: Prefect's and MLflow's on SQLite, and process workers.

They bind 127.0.0.1 only, keep everything in one folder, and end with the program that started
them, whatever ends it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo.prefect_api import PrefectApi
from grace_core.errors import GraceError
from grace_core.launch.process_group import end_process_group, start_process_group

HOST = "127.0.0.1"
POOLS = ("grace-gpu", "grace-cpu")
_START_SECONDS = 300.0  # a first start on a busy machine creates two databases
_SHOWN_LINES = 15


@dataclass(frozen=True)
class Services:
    """Addresses of the running servers, and the environment that makes programs use them."""

    prefect: str
    mlflow: str
    environment: Mapping[str, str]
    logs: Path
    root: Path

    @property
    def api(self) -> PrefectApi:
        return PrefectApi(f"{self.prefect}/api")


@contextmanager
def servers(folder: Path, root: Path, ports: tuple[int, int] = (4200, 5000)) -> Iterator[Services]:
    """Prefect and MLflow, their state in `folder`; both answer when this yields.

    root: the checkout, working directory of everything that is started; ports: of Prefect and
    MLflow where they are free, any others where not, or where 0 is given.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    prefect, mlflow = f"http://{HOST}:{free_port(ports[0])}", f"http://{HOST}:{free_port(ports[1])}"
    services = Services(prefect, mlflow, environment(folder, prefect, mlflow), logs, root)
    artifacts = (folder / "mlflow").absolute()
    with ExitStack() as stack:
        stack.enter_context(_only_one(folder))
        # Both take seconds to start: they start side by side.
        prefect_process = stack.enter_context(
            _service(
                services,
                "prefect-server",
                *prefect_server(prefect),
            )
        )
        mlflow_process = stack.enter_context(
            _service(
                services,
                "mlflow-server",
                *mlflow_server(mlflow, artifacts),
            )
        )
        artifacts.mkdir(exist_ok=True)
        wait_for(f"{prefect}/api/health", prefect_process, logs / "prefect-server.log")
        wait_for(f"{mlflow}/health", mlflow_process, logs / "mlflow-server.log")
        yield services


@contextmanager
def workers(services: Services, pools: Sequence[str] = POOLS) -> Iterator[None]:
    """What `grace setup` makes on the server, and a process worker for each of these pools."""
    with ExitStack() as stack:
        for pool in POOLS:  # before anything takes runs from them
            file = services.root / "configs" / "work-pools" / f"{pool}.json"
            services.api.ensure_work_pool(pool, json.loads(file.read_text(encoding="utf-8")))
        for pool in pools:
            stack.enter_context(
                _service(
                    services,
                    f"worker-{pool}",
                    *("-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"),
                )
            )
        _run(services, "setup", "-m", "operations", "setup")
        yield


def run_prefect(services: Services, *arguments: str) -> str:
    """Run Prefect's command line in the project root and return what it printed.

    Raises GraceError with its output when it fails.
    """
    name = next(word for word in arguments if not word.startswith("-"))
    return _run(services, name, "-m", "prefect", *arguments)


def _run(services: Services, name: str, *arguments: str) -> str:
    """Run one of Python's programs to its end, and return what it printed."""
    with _service(services, name, *arguments) as process:
        exit_code = process.wait()
    printed = (services.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    if exit_code:
        raise GraceError(
            f"`python {' '.join(arguments)}` failed with exit code {exit_code}:\n"
            + "\n".join(printed.splitlines()[-_SHOWN_LINES:])
        )
    return printed


@contextmanager
def _service(services: Services, name: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with (services.logs / f"{name}.log").open("wb") as log:
        process = start_process_group(
            [sys.executable, *arguments],
            env=services.environment,
            stdout=log,
            stderr=log,
            folder=services.root,
        )
    try:
        yield process
    finally:
        end_process_group(process, set(), grace_seconds=5.0)


def prefect_server(address: str) -> list[str]:
    """Python's arguments for a Prefect server at `address`."""
    return ["-m", "prefect", "server", "start", "--host", HOST, "--port", _of(address)]


def mlflow_server(address: str, folder: Path) -> list[str]:
    """Python's arguments for an MLflow server at `address` that keeps everything in `folder`."""
    return [
        *("-m", "mlflow", "server", "--host", HOST, "--port", _of(address)),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", str(folder / "artifacts"), "--workers", "1"),
    ]


def environment(folder: Path, prefect: str, mlflow: str) -> dict[str, str]:
    """This process's environment without its own Prefect and MLflow settings, and ours instead."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "_MLFLOW_"))
    }
    return kept | {
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven idle processes otherwise
        "MLFLOW_TRACKING_URI": mlflow,
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_HOME": str((folder / "prefect").absolute()),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "grace_core,tasks,operations",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # A run waits 40 s for its worker to cancel it (tasks/guard.py), and 20 s for its ranks.
        "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "90",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two servers must not share one SQLite file."""
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GraceError(
                f"servers are running on {folder} already (`make demo` or `make ui` elsewhere); "
                "end them first"
            ) from None
        yield


def free_port(preferred: int) -> int:
    """`preferred` where it is free, any free port otherwise."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise GraceError(f"no port of {HOST} is free; close other servers and try again")


def _of(address: str) -> str:
    return address.rsplit(":", 1)[1]


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers; raises GraceError with its log when it does not."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            problem = f"ended with exit code {process.returncode}"
            break
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    else:
        problem = f"did not answer at {address} within {_START_SECONDS:g} s"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
    raise GraceError(f"{log.stem} {problem}; its log {log} ends with:\n" + "\n".join(lines))
