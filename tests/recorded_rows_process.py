"""Rows with recorded outputs through the loader's processes, as a rank reads them.

    python -m tests.recorded_rows_process JOB.json OUTPUTS OUT.json PLAN WORKERS

A process of its own: the loader forks, and the tests' process holds servers and threads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from grace_core.training import teacher_outputs
from grace_core.training.job import TeacherJob
from grace_core.training.planned_rows import PlannedRows, RecordedRow, row_loader
from grace_core.training.teacher_pass import TeacherPass

CPU = torch.device("cpu")


def main(file: str, folder: str, out: str, plan: str, workers: str) -> None:
    teacher_pass = TeacherPass(TeacherJob.model_validate_json(Path(file).read_text()), CPU)
    outputs = teacher_outputs.TeacherOutputs(
        Path(folder), samples=len(teacher_pass.data), temperature=2.0
    )
    rows = PlannedRows(teacher_pass.data, teacher_pass.visual, json.loads(plan), outputs)
    found = []
    for row in row_loader(rows, int(workers), CPU):
        assert isinstance(row, RecordedRow)
        moved = row.to(CPU)
        assert isinstance(moved, RecordedRow)
        relations = [relation.centred.tolist() for relation in moved.outputs.relations]
        ids = moved.outputs.rows.ids.tolist()
        found.append({"records": row.record_indexes, "ids": ids, "relations": relations})
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
