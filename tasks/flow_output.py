"""What a flow's process prints, kept where no other process's death can reach it.

A worker reads its runs' output from a pipe. When the worker is killed, the next line that such a
run prints ends it: rich, which Prefect logs with, leaves the program on a broken pipe. So the
output goes to a file as soon as the flow knows where; Prefect's own logs have the lines too.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from prefect import runtime

FOLDER = "flow-runs"  # below run_dir


def keep_output(run_dir: Path) -> None:
    """From here on, standard output and error go to a file where they went to a pipe."""
    piped = [number for number in (1, 2) if stat.S_ISFIFO(os.fstat(number).st_mode)]
    if not piped or runtime.flow_run.id is None:
        return
    file = run_dir / FOLDER / f"{runtime.flow_run.id}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"the output of this run goes to {file.absolute()}", flush=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with file.open("ab", buffering=0) as log:
        for number in piped:
            os.dup2(log.fileno(), number)
