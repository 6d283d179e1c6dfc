"""Where a SLURM job keeps what it is known by, below the work folder of its training.

`job.json` tells the job's id and name; `end-<id>.json` is written by the job itself as the last
thing it does; `cancelled-<id>` keeps it from being requeued.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from grace_core.launch.backend import Program
from grace_core.whole_files import write_whole


@dataclass(frozen=True)
class JobEnd:
    """What a job wrote of its own end."""

    exit_code: int
    restarts: int


class SlurmFiles:
    """The files of one training's jobs; paths are absolute."""

    def __init__(self, program: Program, nodes: int) -> None:
        work, logs = program.work.absolute(), program.logs.absolute()
        digest = hashlib.sha256(str(work).encode()).hexdigest()
        self.nodes = nodes
        self.logs = logs
        self.job_name = f"grace-{program.stage}-{digest[:12]}"
        """The same in every process that runs this training, and in no other training."""
        self.ends = work / "slurm"
        self.batch_script = self.ends / "batch.sh"
        self.node_script = self.ends / "node.sh"
        self.job_log = logs / "job.log"

    def node_log(self, node: int | str, stream: str) -> Path:
        """Output of a node's agent and its ranks; stream: stdout or stderr."""
        return self.logs / f"node-{node}.{stream}.log"

    def output(self) -> list[Path]:
        """Every file that is followed."""
        nodes = [self.node_log(n, s) for n in range(self.nodes) for s in ("stdout", "stderr")]
        return [self.job_log, *nodes]

    def write_scripts(self, batch: str, node: str) -> None:
        self.ends.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        for file, text in ((self.batch_script, batch), (self.node_script, node)):
            write_whole(file, text)

    def record_job(self, job: int) -> None:
        """Note the job that is watched from now on, which may therefore be requeued."""
        write_whole(self.ends / "job.json", json.dumps({"id": job, "name": self.job_name}))
        self._cancelled(job).unlink(missing_ok=True)

    def mark_cancelled(self, job: int) -> None:
        """Keep the job from being requeued."""
        self._cancelled(job).touch()

    def end_of(self, job: int) -> JobEnd | None:
        """What the job wrote of its end; None while it has not ended by itself."""
        os.scandir(self.ends).close()  # NFS keeps for a while that a file was not there
        file = self.ends / f"end-{job}.json"
        if not file.exists():
            return None
        return JobEnd(**json.loads(file.read_text(encoding="utf-8")))

    def _cancelled(self, job: int) -> Path:
        return self.ends / f"cancelled-{job}"
