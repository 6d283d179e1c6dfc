"""One rank of the teacher's pass, which may be killed while it works.

    python -m tests.teacher_pass_process JOB.json STORE RANK RANKS [die AFTER | stop]

With `die` the process gets SIGKILL in the middle of writing a shard, after so many whole ones; with
`stop` it gets SIGTERM in its first pass.
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

from torch import distributed as dist

from grace_core.training import teacher_outputs
from grace_core.training.job import TeacherJob
from grace_core.training.ranks import run_rank
from grace_core.training.teacher_pass import TeacherPass, record_outputs


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


def stop_in_first_pass() -> None:
    plain = TeacherPass._of_row

    def told(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    TeacherPass._of_row = told  # type: ignore[method-assign]


def main(arguments: Sequence[str]) -> None:
    file, store, rank, ranks, *rest = arguments
    match rest:
        case ["die", after]:
            die_after(int(after))
        case ["stop"]:
            stop_in_first_pass()
    # Ranks meet at a file: a port would have to be free.
    plain = dist.init_process_group
    where = {"init_method": f"file://{store}", "rank": int(rank), "world_size": int(ranks)}
    dist.init_process_group = lambda backend: plain(backend, **where)
    run_rank([file], TeacherJob, record_outputs)


if __name__ == "__main__":
    main(sys.argv[1:])
