"""Entry point of one process of the teacher's pass over a data set, started by torchrun.

    torchrun --standalone --nproc-per-node 2 -m grace_core.training.teacher_worker JOB.json

Exit codes: :func:`grace_core.training.ranks.run_rank`.
"""

from __future__ import annotations

import sys

from grace_core.training.job import TeacherJob
from grace_core.training.ranks import run_rank
from grace_core.training.teacher_pass import record_outputs

if __name__ == "__main__":
    run_rank(sys.argv[1:], TeacherJob, record_outputs)
