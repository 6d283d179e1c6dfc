"""Rows of samples in a planned order, decoded ahead by the loader's processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from grace_core.data.packing import rows_of_steps
from grace_core.losses.relational import TeacherRelation
from grace_core.losses.truncated_teacher import TruncatedRows
from grace_core.models.rows import PackedRow, packed_row
from grace_core.models.visual_inputs import VisualInputs
from grace_core.training.teacher_outputs import TeacherOutputs


@dataclass(frozen=True)
class RowOutputs:
    """What the teacher said of a row's samples when its outputs were recorded."""

    rows: TruncatedRows
    relations: list[TeacherRelation]

    def moved(self, move: Callable[[Tensor], Tensor]) -> RowOutputs:
        relations = [
            replace(each, centred=move(each.centred), gram_norm=move(each.gram_norm))
            for each in self.relations
        ]
        return RowOutputs(self.rows.moved(move), relations)


@dataclass(frozen=True)
class RecordedRow(PackedRow):
    """A packed row together with the teacher's recorded outputs."""

    outputs: RowOutputs

    def _moved(self, move: Callable[[Tensor], Tensor]) -> RecordedRow:
        moved = super()._moved(move)
        assert isinstance(moved, RecordedRow)
        return replace(moved, outputs=self.outputs.moved(move))


@dataclass(frozen=True)
class RankPlan:
    """The samples of each row of one rank, for ever, from an optimizer step on."""

    lengths: Sequence[int]
    row_tokens: int
    rows_per_step: int
    seed: int
    first_step: int
    rank: int
    processes: int

    def __iter__(self) -> Iterator[list[int]]:
        steps = rows_of_steps(
            self.lengths,
            row_tokens=self.row_tokens,
            rows_per_step=self.rows_per_step,
            seed=self.seed,
            first_step=self.first_step,
        )
        for step in steps:
            yield from step[self.rank :: self.processes]


class PlannedRows(IterableDataset[PackedRow]):
    """The rows of a plan, in its order whatever the number of the loader's processes."""

    def __init__(
        self,
        data: Any,
        visual: VisualInputs,
        plan: Iterable[Sequence[int]],
        outputs: TeacherOutputs | None = None,
    ) -> None:
        self.data, self.visual, self.plan, self.outputs = data, visual, plan, outputs

    def __iter__(self) -> Iterator[PackedRow]:
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, samples in enumerate(self.plan):
            # The loader asks its processes in turn, so this keeps the order.
            if number % shares == share:
                yield self._row(samples)

    def _row(self, samples: Sequence[int]) -> PackedRow:
        row = packed_row([self.data[sample] for sample in samples], self.visual)
        if self.outputs is None:
            return row
        outputs = RowOutputs(*self.outputs.of_samples(samples))
        assert len(outputs.rows) == len(row.labels), "outputs are of these samples"
        return RecordedRow(**vars(row), outputs=outputs)


def row_loader(rows: PlannedRows, workers: int, device: torch.device) -> DataLoader[PackedRow]:
    """Rows one by one, in pinned memory where they go to a GPU.

    Args:
        workers: processes that decode ahead; 0 decodes in this one.
    """
    return DataLoader(
        rows,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
    )
