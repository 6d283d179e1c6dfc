"""One pass of the frozen teacher over a data set, whose outputs students then learn from.

Samples are cut into shards, and rank r of R makes shards r, r + R, ... . Rows are packed from one
shard's samples alone, in their order, so that a shard's content does not depend on how many ranks
there are or which of them makes it. A shard has its name when it is whole; after a stop those that
are missing are made.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import load_from_disk
from torch import Tensor
from torch import distributed as dist

from grace_core.errors import GraceError
from grace_core.events import Event, EventWriter, truncate_after
from grace_core.losses.fused_head import truncated_rows
from grace_core.losses.relational import teacher_relations
from grace_core.losses.stored_relation import stored_relation
from grace_core.models.loading import check_pair, read_checkpoint
from grace_core.models.rows import PackedRow
from grace_core.models.visual_inputs import VisualInputs, check_same_tokens
from grace_core.training.job import TeacherJob
from grace_core.training.planned_rows import PlannedRows, row_loader
from grace_core.training.stopping import StopSignal
from grace_core.training.teacher import load_teacher
from grace_core.training.teacher_outputs import (
    OutputsIndex,
    SampleOutputs,
    rows_of_shard,
    shard_file,
    write_index,
    write_shard,
)

log = logging.getLogger(__name__)


def record_outputs(job: TeacherJob, device: torch.device, stop: StopSignal) -> bool:
    """Make all shards that are missing; called by every rank of the group.

    Returns, on all ranks alike, True when the result is there, False when one was told to stop.
    """
    teacher_pass = TeacherPass(job, device)
    # With a whole teacher each rank hears of its own signal alone.
    finished = torch.tensor(int(teacher_pass.run(stop)), device=device)
    dist.all_reduce(finished, op=dist.ReduceOp.MIN)
    if not finished:
        log.warning(
            "stopped by signal after step %d; whole shards stay, the next run makes the others",
            teacher_pass.done,
        )
        return False
    if dist.get_rank() == 0:
        teacher_pass.finish()
    return True


class TeacherPass:
    """The teacher, the data and this rank's shards."""

    def __init__(self, job: TeacherJob, device: torch.device) -> None:
        self.job, self.device = job, device
        teacher, student = read_checkpoint(job.teacher), read_checkpoint(job.student)
        check_pair(teacher, student)
        pixels = {"min_pixels": job.min_pixels, "max_pixels": job.max_pixels}
        self.visual = VisualInputs(teacher, **pixels)
        check_same_tokens(self.visual, VisualInputs(student, **pixels))
        self.data = load_from_disk(str(job.data))
        self.lengths: list[int] = list(self.data["num_tokens"])
        self.supervised: list[int] = list(self.data["num_supervised"])
        self.pictures = [len(grids) for grids in self.data["image_grids"]]
        if not self.lengths:
            raise GraceError(
                f"{job.data} holds no samples; see quarantine.jsonl beside it for the reasons"
            )
        self.teacher = load_teacher(teacher, job.teacher_weights, job.training, device)
        job.shards.mkdir(parents=True, exist_ok=True)

    @property
    def shards(self) -> int:
        return -(-len(self.lengths) // self.job.outputs.shard_samples)

    @property
    def _files(self) -> list[Path]:
        return [shard_file(self.job.shards, number) for number in range(self.shards)]

    def run(self, stop: StopSignal) -> bool:
        """Make this rank's missing shards; False when told to stop before the last one is whole."""
        own = range(dist.get_rank(), self.shards, dist.get_world_size())
        missing = [number for number in own if not shard_file(self.job.shards, number).exists()]
        events = self._events() if dist.get_rank() == 0 else None
        rows_of = {number: self._rows_of(number) for number in missing}
        plan = [samples for of_shard in rows_of.values() for samples in of_shard]
        beyond = self._passes_beyond(len(plan))
        plan += [self._rows_of(0)[0]] * beyond
        planned = PlannedRows(self.data, self.visual, plan)
        rows = iter(row_loader(planned, self.job.training.data_workers, self.device))
        try:
            for number, of_shard in rows_of.items():
                made: list[SampleOutputs] = []
                for samples in of_shard:
                    if self._told(stop):
                        return False
                    made += self._of_row(samples, next(rows))
                write_shard(shard_file(self.job.shards, number), made)
                if events is not None:
                    self._report(events, "progress")
            for _ in range(beyond):
                if self._told(stop):
                    return False
                self._of_row(plan[-1], next(rows))
        finally:
            if events is not None:
                events.close()
        return True

    def finish(self) -> None:
        """Give the folder of all shards the name of the result.

        Raises GraceError where a shard is missing.
        """
        outputs = self.job.outputs
        missing = [file.name for file in self._files if not file.exists()]
        if missing:
            raise GraceError(
                f"{len(missing)} of {self.shards} shards are not in {self.job.shards} "
                f"({missing[0]} is the first); all nodes must see one run_dir: put it on a shared "
                "disk, then run again, which makes those that are missing"
            )
        _, log_q = rows_of_shard(shard_file(self.job.shards, 0)).log_q(self.job.temperature)
        write_index(
            self.job.shards,
            OutputsIndex(
                samples=len(self.lengths),
                shard_samples=outputs.shard_samples,
                temperature=self.job.temperature,
                top_k=outputs.top_k,
                tokens=sum(self.lengths),
                supervised=sum(self.supervised),
                pictures=sum(self.pictures),
                tail_mass=float(log_q[:, -1].exp().double().mean()),
            ),
        )
        shutil.rmtree(self.job.result, ignore_errors=True)
        os.replace(self.job.shards, self.job.result)

    def _passes_beyond(self, own: int) -> int:
        """Passes whose outputs nobody needs: of a sharded teacher all ranks make as many."""
        if not self._sharded:
            return 0
        most = torch.tensor(own, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most) - own

    def _told(self, stop: StopSignal) -> bool:
        """Whether to stop; where the teacher is sharded, as soon as one rank is told to."""
        if not self._sharded:
            return stop.requested
        told = torch.tensor(int(stop.requested), device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)

    @property
    def _sharded(self) -> bool:
        return self.job.teacher_weights == "sharded"

    @torch.no_grad()
    def _of_row(self, samples: Sequence[int], row: PackedRow) -> list[SampleOutputs]:
        """The outputs of a row's samples, on the CPU."""
        row = row.to(self.device)
        states = self.teacher.states(row)
        rows = truncated_rows(
            self.teacher.head,
            states.predicting,
            row.labels,
            top_k=self.job.outputs.top_k,
            temperature=self.job.temperature,
            logits_bytes=self.job.training.logits_mib * 2**20,
        ).moved(Tensor.cpu)
        pictures = iter(teacher_relations(states.visual))
        found, first = [], 0
        for sample in samples:
            last = first + self.supervised[sample]
            relations = [stored_relation(next(pictures)) for _ in range(self.pictures[sample])]
            found.append(SampleOutputs(rows.part(slice(first, last)), relations))
            first = last
        assert first == len(rows), "a row's supervised tokens are its samples'"
        return found

    def _rows_of(self, shard: int) -> list[list[int]]:
        """Samples of each row of a shard: in order, as many as fit."""
        first = shard * self.job.outputs.shard_samples
        last = min(first + self.job.outputs.shard_samples, len(self.lengths))
        rows: list[list[int]] = [[]]
        room = self.job.training.row_tokens
        for sample in range(first, last):
            if self.lengths[sample] > room:
                rows.append([])
                room = self.job.training.row_tokens
            rows[-1].append(sample)
            room -= self.lengths[sample]
        return rows

    def _events(self) -> EventWriter:
        truncate_after(self.job.metrics, self.done)
        events = EventWriter(self.job.metrics)
        if self.done:
            self._report(events, "resume")
        return events

    def _report(self, events: EventWriter, kind: str) -> None:
        """The steps of these events are samples."""
        total = float(len(self.lengths))
        values = {"steps": total} if kind == "resume" else {"done": self.done, "total": total}
        events.write(Event(time.time(), self.job.stage, self.done, kind, values))

    @property
    def done(self) -> int:
        """Samples of all ranks whose shards are whole."""
        whole = sum(file.exists() for file in self._files)
        return min(whole * self.job.outputs.shard_samples, len(self.lengths))
