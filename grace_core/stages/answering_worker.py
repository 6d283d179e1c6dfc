"""Entry point of one of several processes that share an evaluation's questions.

python -m grace_core.stages.answering_worker JOB.json
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from grace_core.orphans import leave_with_parent
from grace_core.stages.answering import answer_as_one_of_several

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    leave_with_parent()
    answer_as_one_of_several(Path(sys.argv[1]))
