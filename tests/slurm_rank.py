"""A rank without torch, for what SLURM and the launcher do around a training.

    python -m tests.slurm_rank NOTES PLAN

It writes NOTES/started-<start>-<rank> and runs until the file NOTES/go is there. SIGTERM makes it
"save" (NOTES/saved-<start>-<rank>) and leave with 143, as a training rank does. PLAN:

wait: no more than that; once: a second start ends at once; fail, killed: rank 1 raises or kills
itself, and rank 0 fails after it, as one that lost its peer; stop: each start ends with 143.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

STOPPED = 143


def main(notes: Path, plan: str) -> int:
    rank, start = os.environ["RANK"], os.environ.get("SLURM_RESTART_COUNT", "0")
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}, start {start}", flush=True)
    secrets = [name for name in os.environ if "TOKEN" in name and "TOKENIZERS" not in name]
    (notes / f"started-{start}-{rank}").write_text(f"{os.getpid()} {' '.join(secrets)}")
    if plan == "stop":
        return STOPPED
    while not (notes / "go").exists():
        if plan == "once" and start != "0":
            break
        if told:
            (notes / f"saved-{start}-{rank}").write_text("")
            return STOPPED
        if plan in ("fail", "killed"):
            if rank == "1":
                (notes / "failed").touch()
                if plan == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("bad row in shard-7")
            if (notes / "failed").exists():
                time.sleep(1)
                raise ConnectionError("peer 1 is gone")
        time.sleep(0.05)
    print(f"rank {rank} is done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
