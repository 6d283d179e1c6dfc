"""One rank of the teacher's pass, which may be killed while it works.

    python -m tests.teacher_pass_process JOB.json STORE RANK RANKS [DIE_AFTER]

With DIE_AFTER the process gets SIGKILL in the middle of writing a shard, after so many whole ones.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"  # DeepSpeed refuses to start without

import torch
from torch import distributed as dist

from grace_core.training import teacher_outputs, teacher_pass
from grace_core.training.job import TeacherJob
from grace_core.training.stopping import StopSignal


def die_after(count: int) -> None:
    plain, written = teacher_outputs.save_file, 0

    def save_and_die(tensors: Any, file: Path) -> None:
        nonlocal written
        plain(tensors, file)
        if written == count:
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1

    teacher_outputs.save_file = save_and_die


def main(arguments: Sequence[str]) -> None:
    file, store, rank, ranks, *rest = arguments
    if rest:
        die_after(int(rest[0]))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks)
    )
    job = TeacherJob.model_validate_json(Path(file).read_text(encoding="utf-8"))
    assert teacher_pass.record_outputs(job, torch.device("cpu"), StopSignal())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
