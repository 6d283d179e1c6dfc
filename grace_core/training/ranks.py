"""What every rank of a process group does around its work: its job, its device, its exit code."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch import distributed as dist

from grace_core.artifacts import environment
from grace_core.errors import GraceError
from grace_core.locks import join_ranks
from grace_core.orphans import leave_with_parent
from grace_core.training.job import RankJob
from grace_core.training.stopping import STOPPED, StopSignal
from grace_core.whole_files import write_whole

Job = TypeVar("Job", bound=RankJob)


def run_rank(
    arguments: Sequence[str],
    job_type: type[Job],
    work: Callable[[Job, torch.device, StopSignal], bool],
) -> NoReturn:
    """Run this process's part of the job and end the process.

    Exit codes: 0 the result is written; 143 stopped by SIGTERM, run again to continue; 1 for a
    user's mistake, whose message is the last line of the output.

    Args:
        arguments: of the command line: the job's file.
        work: returns True when the result is written, False when it was stopped before.
    """
    try:
        sys.exit(0 if _work(arguments, job_type, work) else STOPPED)
    except GraceError as error:
        # A user's mistake needs its message, not a traceback.
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _work(
    arguments: Sequence[str],
    job_type: type[Job],
    work: Callable[[Job, torch.device, StopSignal], bool],
) -> bool:
    if len(arguments) != 1:
        raise GraceError("usage: torchrun ... -m MODULE JOB.json")
    stop = StopSignal()
    stop.listen()
    leave_with_parent()
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK") == "0" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    job = job_type.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
    device = _device(job.device)
    # DeepSpeed chooses its accelerator on import.
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    with join_ranks(job.work):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() == 0:
            _write_environment(job)
        finished = work(job, device, stop)
        # Ranks that leave while others still talk make those abort.
        dist.barrier()
        dist.destroy_process_group()
    return finished


def _write_environment(job: RankJob) -> None:
    """For the manifest: the ranks may run on another machine than the process that started them."""
    found = environment() | {"world_size": str(dist.get_world_size())} | job.setting
    write_whole(job.environment, json.dumps(found, indent=1))


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise GraceError("launch.device is cuda, but torch sees no GPU; set it to cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device
