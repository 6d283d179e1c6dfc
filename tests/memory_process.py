"""What trainings on one rank allocate on the CPU, as JSON.

    torchrun --standalone --nproc-per-node 1 -m tests.memory_process CASES.json OUT.json

Each case is {"zero_stage", "recompute", "precision"}. Torch's profiler tells every allocation, so
that peaks are exact on a CPU too; it sees this thread alone, so nothing may be freed by another.
The teacher and the rows are made before.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from grace_core.bench.memory import estimate, trainer_of
from grace_core.bench.shapes import TOY
from grace_core.bench.training_step import process_group
from grace_core.bench.workbench import Workbench
from grace_core.training import zero
from grace_core.training.memory import TEACHER

BUCKET_ELEMENTS = 300_000
"""Small enough that the toy student's gradients need several."""

GROUP_SIZE = 32
_MARK = "memory: "


def peaks(bench: Workbench, folder: Path, case: dict[str, Any]) -> dict[str, float]:
    """Bytes that a case's second optimizer step has at its start, in its passes, and in its end."""
    rows = bench.rows(TOY.samples, TOY.step_rows)
    gc.collect()  # what an earlier trainer left would be freed within the profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = trainer_of(bench, folder, group_size=GROUP_SIZE, **case)
        trainer.optimizer_step(rows)
        for name in ("forward", "backward", "step"):
            _marked(trainer.engine, name)
        with record_function(_MARK + "start"):
            pass
        trainer.optimizer_step(rows)
        trainer.engine.destroy()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    totals = list(zip((at for at, _ in changes), accumulate(by for _, by in changes), strict=True))
    memory = estimate(bench, trainer)
    held = memory.state - memory.held[TEACHER]
    found = {"held": held, **{f"estimated {name}": by for name, by in memory.moments.items()}}
    for event in events:
        if event.name().startswith(_MARK):
            begin, end = event.start_ns(), event.start_ns() + event.duration_ns()
            inside = [total for at, total in totals if begin <= at <= end]
            before = [total for at, total in totals if at < begin]
            name = event.name().removeprefix(_MARK)
            found[name] = max(found.get(name, 0), *inside, before[-1])
    return found


def _sum_of_one_rank(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
    assert dist.get_world_size() == 1


def _marked(engine: Any, name: str) -> None:
    plain = getattr(engine, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + name):
            return plain(*args, **kwargs)

    setattr(engine, name, marked)


@contextmanager
def workbench() -> Iterator[tuple[Workbench, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(TOY, torch.device("cpu"), Path(folder) / "bench")
        assert bench.teacher is not None
        yield bench, Path(folder)


def main(cases: Path, out: Path) -> None:
    zero.BUCKET_ELEMENTS = BUCKET_ELEMENTS
    # On one rank the sum is there already; Gloo's threads would free what they are given.
    dist.all_reduce = _sum_of_one_rank
    torch.set_num_threads(1)
    found = []
    with process_group(torch.device("cpu")), workbench() as (bench, folder):
        for number, case in enumerate(json.loads(cases.read_text(encoding="utf-8"))):
            found.append(peaks(bench, folder / str(number), case))
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
