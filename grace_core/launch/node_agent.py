"""One node's part of a SLURM job: starts its ranks with torchrun and says how they ended.

    srun ... python -m grace_core.launch.node_agent --processes 8 --logs LOGS --attempt 1 -- \\
        grace_core.training.worker JOB.json

torchrun runs within this process, so that the end of each rank is known and not read from a log.
SIGUSR1 and SIGTERM both mean: save and leave. This process hands that to its ranks once, with
SIGTERM, and gives them all the time that SLURM gives. torchrun itself would wait 30 s, and would
abandon its ranks at the second SIGTERM, which SLURM does send.

SIGUSR1 stays blocked here, and therefore in everything below: where SLURM signals every process of
a step, ranks and their data workers do not notice.

Exit codes: 0; 143 the ranks saved and left; else that of the rank that failed first.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from grace_core.errors import GraceError
from grace_core.launch.node_failure import NodeFailure, node_folder, record_failure
from grace_core.orphans import be_parent
from grace_core.training.stopping import STOPPED

logger = logging.getLogger(__name__)

_TERMINATED = (STOPPED, -signal.SIGTERM)  # the latter before a rank could listen
_PORTS = (20000, 10000)
"""First port of the rendezvous, and how many jobs on one node have ports of their own."""

_MEET_SECONDS = 900  # nodes start at different times: setup lines, cold file systems
_ASK_SECONDS = 300.0
_LOOK_SECONDS = 0.2


def main(arguments: Sequence[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    told = threading.Event()
    threading.Thread(target=_forward_stop, args=(told,), daemon=True).start()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    parser = argparse.ArgumentParser(prog="python -m grace_core.launch.node_agent")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("program", nargs="+", help="module and its arguments")
    given = parser.parse_args(arguments)

    node, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    ranks = node_folder(given.logs, given.attempt, node)
    command = _torchrun_arguments(node, nodes, given.processes, ranks)
    return _run([*command, "-m", *given.program], node, ranks, told)


def _torchrun_arguments(node: int, nodes: int, processes: int, ranks: Path) -> list[str]:
    """Options of torchrun; nodes meet at the job's first one.

    Addresses are those that SLURM itself uses: a node's name need not resolve, and a machine may
    have several addresses.
    """
    job = int(os.environ["SLURM_JOB_ID"])
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    first = _first_node(os.environ["SLURM_JOB_NODELIST"])
    port = _PORTS[0] + job % _PORTS[1]
    meeting = f"is_host={int(node == 0)},join_timeout={_MEET_SECONDS},read_timeout={_MEET_SECONDS}"
    return [
        f"--nnodes={nodes}",
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={job}-{restarts}",
        f"--rdzv-endpoint={_address(first)}:{port}",
        f"--rdzv-conf={meeting}",
        f"--local-addr={_address(os.environ['SLURMD_NODENAME'])}",
        "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT",
        f"--log-dir={ranks}",
        "--redirects=3",
        "--tee=3",
    ]


def _run(arguments: list[str], node: int, ranks: Path, told: threading.Event) -> int:
    """Run torchrun; returns this process's exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # In front of each line stands the rank of the whole training, not of this node.
    os.environ["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[${role_name}${rank}]:"
    be_parent()
    seen = _FailureSeen()
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addHandler(seen)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if told.is_set() or all(code in _TERMINATED for code in codes):
            return STOPPED
        rank, failure = error.get_first_failure()
        when = seen.time or time.time()
        found = NodeFailure(when, node, rank, failure.local_rank, failure.exitcode)
        record_failure(ranks, found)
        logger.error("%s", error.format_msg())
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


class _FailureSeen(logging.Handler):
    """Notes when torchrun saw the first rank fail; it keeps whole seconds only, and nodes race."""

    def __init__(self) -> None:
        super().__init__()
        self.time: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.time is None and "failed (exitcode" in record.getMessage():
            self.time = record.created


def _forward_stop(told: threading.Event) -> None:
    """Wait for the first SIGUSR1, then tell every rank to stop, also those that start later."""
    signal.sigwait({signal.SIGUSR1})
    told.set()
    asked: set[psutil.Process] = set()
    while True:
        ranks = set(psutil.Process().children())
        if not ranks and not asked:
            os._exit(STOPPED)  # still waiting for the other nodes: nothing is lost
        for rank in ranks - asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()
        asked |= ranks
        time.sleep(_LOOK_SECONDS)


def _first_node(nodes: str) -> str:
    """First of a list as SLURM writes it, such as gpu[07-09]."""
    return _scontrol("hostnames", nodes).split()[0]


def _address(node: str) -> str:
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("node", node))
    assert found is not None, "scontrol shows every node's address"
    return found[1]


def _scontrol(what: str, which: str) -> str:
    """Ask for `_ASK_SECONDS`: slurmctld may be away for a moment."""
    deadline = time.monotonic() + _ASK_SECONDS
    while True:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", what, which],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return done.stdout
        if time.monotonic() > deadline:
            raise GraceError(
                f"scontrol show {what} {which} fails on {os.environ['SLURMD_NODENAME']}: "
                f"{done.stderr.strip()}; check slurm.conf there, and that slurmctld runs"
            )
        time.sleep(2)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except GraceError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
