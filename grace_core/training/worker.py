"""Entry point of one training process, started by torchrun.

    torchrun --standalone --nproc-per-node 2 -m grace_core.training.worker JOB.json

Exit codes: :func:`grace_core.training.ranks.run_rank`.
"""

from __future__ import annotations

import sys

import torch

from grace_core.training.job import TrainingJob
from grace_core.training.ranks import run_rank
from grace_core.training.stopping import StopSignal


def _train(job: TrainingJob, device: torch.device, stop: StopSignal) -> bool:
    # Imports DeepSpeed, which must not be done before its accelerator is known.
    from grace_core.training.loop import train

    return train(job, device, stop)


if __name__ == "__main__":
    run_rank(sys.argv[1:], TrainingJob, _train)
