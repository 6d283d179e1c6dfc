"""Entry point of one training process, started by torchrun.

    torchrun --standalone --nproc-per-node 2 -m grace_core.training.worker JOB.json

Exit codes: 0 the result is written; 143 stopped by SIGTERM, run again to continue.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from grace_core.artifacts import environment
from grace_core.errors import GraceError
from grace_core.locks import join_ranks
from grace_core.orphans import leave_with_parent
from grace_core.training.job import TrainingJob
from grace_core.training.stopping import STOPPED, StopSignal
from grace_core.whole_files import write_whole


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise GraceError("usage: torchrun ... -m grace_core.training.worker JOB.json")
    stop = StopSignal()
    stop.listen()
    leave_with_parent()
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK") == "0" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    job = TrainingJob.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
    device = _device(job.device)
    # DeepSpeed chooses its accelerator on import.
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    from grace_core.training.loop import train

    with join_ranks(job.work):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() == 0:
            _write_environment(job)
        finished = train(job, device, stop)
        # Ranks that leave while others still talk make those abort.
        dist.barrier()
        dist.destroy_process_group()
    return 0 if finished else STOPPED


def _write_environment(job: TrainingJob) -> None:
    """For the manifest: the ranks may run on another machine than the process that started them."""
    found = environment() | {
        "world_size": str(dist.get_world_size()),
        "zero_stage": str(job.training.zero_stage),
    }
    write_whole(job.environment, json.dumps(found, indent=1))


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise GraceError("launch.device is cuda, but torch sees no GPU; set it to cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except GraceError as error:
        # A user's mistake needs its message, not a traceback.
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
