"""The training loop, the same for distillation and for quantized training.

One optimizer step: the teacher goes over this rank's rows, the counts are summed over all ranks,
the student goes forward and backward row by row, the sums are reduced, weights and scales are
stepped, and the controller learns of the step's distillation loss.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from datasets import load_from_disk
from torch import distributed as dist

from grace_core.data.packing import planned_steps
from grace_core.errors import GraceError
from grace_core.losses.objective import (
    GlobalCounts,
    StudentObjective,
    Teacher,
    TeacherRow,
    TermWeights,
    make_controller,
    omega_at,
    recorded_teacher_row,
    teacher_rows,
)
from grace_core.models.families import set_trainable
from grace_core.models.frozen_tower import TowerStates, tower_states
from grace_core.models.fused_forward import choose_forward
from grace_core.models.loading import CheckpointFolder, check_pair, load_model, read_checkpoint
from grace_core.models.rows import PackedRow
from grace_core.models.visual_inputs import VisualInputs, check_same_tokens
from grace_core.quantization.cycle import QuantizationCycle
from grace_core.quantization.scales import ScaleBank
from grace_core.training import checkpoint as checkpoints
from grace_core.training.engine import deepspeed_engine
from grace_core.training.gradient_shares import gradient_shares
from grace_core.training.job import TrainingJob
from grace_core.training.memory import later_bytes
from grace_core.training.optimizer import (
    clip_flat_gradient,
    rate_at,
    scale_optimizer,
    set_rate,
)
from grace_core.training.planned_rows import PlannedRows, RankPlan, RecordedRow, row_loader
from grace_core.training.quantized_start import quantized_start
from grace_core.training.recompute import (
    choose_recomputed_layers,
    recompute_layers,
    trained_sizes,
)
from grace_core.training.reports import Agreement, Reporter, StepReport, agree
from grace_core.training.result import write_result
from grace_core.training.saved import Layout, Saved, latest_checkpoint
from grace_core.training.stopping import StopSignal
from grace_core.training.teacher import gathered_bytes, load_teacher
from grace_core.training.teacher_outputs import TeacherOutputs
from grace_core.training.zero import QUANTIZED_ONCE_STAGES

log = logging.getLogger(__name__)


class TrainingDiverged(GraceError):
    """The loss or a gradient stopped being a finite number."""


def train(job: TrainingJob, device: torch.device, stop: StopSignal) -> bool:
    """Run a job to its end, or until told to stop; called by every rank of the group.

    Returns True when the result was written, False when the run stopped early and can go on.
    """
    trainer = Trainer(job, device)
    if not trainer.run(stop):
        return False
    write_result(job, trainer.student.model, trainer.bank)
    return True


class Trainer:
    """Models, optimizers and position of one run."""

    def __init__(self, job: TrainingJob, device: torch.device) -> None:
        self.job = job
        self.device = device
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        training = job.training
        torch.manual_seed(job.seed)

        folder = read_checkpoint(job.student)
        self.family = folder.family
        self.visual = VisualInputs(folder, min_pixels=job.min_pixels, max_pixels=job.max_pixels)
        self.teacher: Teacher | None = None
        if job.objective.needs_teacher and job.teacher_outputs is None:
            self.teacher = self._load_teacher(folder)
        model = self._load_student(folder).train()
        set_trainable(model, self.family, training.trainable)
        choose_forward(model, self.family, training.kernels)

        layout = Layout(self.processes, training.zero_stage)
        saved = _agreed(job, layout)
        if saved is not None:
            checkpoints.load_weights(saved, model)
        self.bank: ScaleBank | None = None
        self.scale_optimizer: torch.optim.AdamW | None = None
        if job.precision is not None:
            self.bank = quantized_start(model, job, self.family)
            self.scale_optimizer = scale_optimizer(self.bank, training)
        self.cycle = _quantization_cycle(model, self.bank, training.zero_stage)
        self.student = StudentObjective(
            model, self.family, job.objective, logits_bytes=training.logits_mib * 2**20
        )
        self.engine = deepspeed_engine(self.student, job, self.processes, device)
        later = later_bytes(
            trained_sizes(model),
            training,
            processes=self.processes,
            on_gpu=device.type == "cuda",
        )
        if self.teacher is not None:
            later += gathered_bytes(self.teacher)
        recompute_layers(
            model,
            self.family,
            choose_recomputed_layers(model, self.family, training, later_bytes=later),
        )
        self.controller = make_controller(job.objective)
        self.layout = layout
        self.step = 0
        if saved is not None:
            checkpoints.load_optimizer(saved, self.engine)
            if self.bank is not None and self.scale_optimizer is not None:
                checkpoints.load_scales(saved, self.bank, self.scale_optimizer)
            self.controller.load_state_dict(saved.controller)
            self.step = saved.step
            log.info("continuing after step %d", self.step)

        self.data = load_from_disk(str(job.data))
        self.lengths: list[int] = list(self.data["num_tokens"])
        if not self.lengths:
            raise GraceError(
                f"{job.data} holds no samples; see quarantine.jsonl beside it for the reasons"
            )
        self.outputs = self._recorded_outputs()
        self.steps = planned_steps(
            self.lengths,
            row_tokens=training.row_tokens,
            rows_per_step=training.rows_per_step,
            seed=job.seed,
            steps=training.steps,
            epochs=training.epochs,
        )

    def run(self, stop: StopSignal) -> bool:
        """Train to the last step; False when stopped before it."""
        reporter = Reporter(self.job, self.step, self.steps) if self.rank == 0 else None
        every = self.job.training.checkpoint_every
        rows = iter(self._rows())
        last_saved = self.step
        stop.write_seconds = checkpoints.measured_write_seconds(
            self.job.checkpoints, self.student.model
        )
        try:
            while self.step < self.steps:
                started = time.monotonic()
                of_step = [next(rows) for _ in range(self._rows_per_process)]
                waited = time.monotonic() - started
                report = self.optimizer_step(of_step)
                seconds = time.monotonic() - started
                agreed = agree(self.device, stop=stop.requested, data_seconds=waited)
                if reporter is not None:
                    reporter.stepped(self.step, self._values(report, seconds, agreed))
                if agreed.stop:
                    self._stop(stop, last_saved, reporter)
                    return False
                if self.step % every == 0 and self.step < self.steps:
                    stop.write_seconds = self.save(reporter)
                    last_saved = self.step
        finally:
            if reporter is not None:
                reporter.close()
        return True

    def optimizer_step(self, rows: list[PackedRow]) -> StepReport:
        """One optimizer step over this rank's rows."""
        objective, training = self.job.objective, self.job.training
        rows = [row.to(self.device) for row in rows]
        taught = self._taught(rows)
        counts = self._global_counts(rows, taught)
        beta, omega = self.controller.beta, omega_at(objective, self.step)
        weights = TermWeights.of(objective, counts, beta=beta, omega=omega)

        rate = rate_at(self.step, self.steps, training.warmup_share)
        set_rate(self.engine.basic_optimizer, rate * training.learning_rate)
        if self.bank is not None:
            self.bank.zero_grad()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        with self.cycle.weights_quantized() if self.cycle is not None else nullcontext():
            for row, teacher, tower in zip(rows, taught, self._tower_states(rows), strict=True):
                loss, row_sums = self.engine(row, teacher, weights, tower)
                # DeepSpeed averages over ranks and, unless told not to, over rows; ours is a sum.
                self.engine.backward(loss * self.processes, scale_wrt_gas=False)
                sums += row_sums
                if not self.engine.is_gradient_accumulation_boundary():
                    self.engine.step()  # counts the row, no more
        dist.all_reduce(sums)
        report = self._report(sums, counts, rows)
        self._step_scales(rate)
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        scale_norm = self._scale_grad_norm
        if not math.isfinite(grad_norm):
            raise TrainingDiverged(self._divergence("gradient norm", grad_norm))
        if objective.distillation.kind != "none":
            self.controller.update(report.distillation)
        self.step += 1
        return StepReport(**{**vars(report), "grad_norm": grad_norm, "scale_grad_norm": scale_norm})

    def _taught(self, rows: Sequence[PackedRow]) -> Sequence[TeacherRow | None]:
        """What the teacher says of rows, or said when its outputs were recorded."""
        objective = self.job.objective
        if self.outputs is not None:
            recorded = [row.outputs for row in rows if isinstance(row, RecordedRow)]
            assert len(recorded) == len(rows), "every row comes with the outputs of its samples"
            return [
                recorded_teacher_row(objective, outputs.rows, outputs.relations)
                for outputs in recorded
            ]
        if self.teacher is None:
            return [None] * len(rows)
        training = self.job.training
        return teacher_rows(
            self.teacher,
            objective,
            rows,
            logits_bytes=training.logits_mib * 2**20,
            row_tokens=training.row_tokens if self.job.teacher_weights == "sharded" else None,
        )

    def _tower_states(self, rows: Sequence[PackedRow]) -> Iterable[TowerStates | None]:
        """Of the student's vision tower, where it sees several rows at once.

        Under ZeRO-3 weights are whole inside of the engine's forward pass alone.
        """
        if self.job.training.zero_stage == 3:
            return [None] * len(rows)
        return tower_states(self.student.model, self.family, rows)

    def save(self, reporter: Reporter | None) -> float:
        """Write a checkpoint; returns the seconds it took."""
        scales = None
        if self.bank is not None and self.scale_optimizer is not None:
            scales = (self.bank, self.scale_optimizer)
        seconds = checkpoints.save_checkpoint(
            self.job.checkpoints,
            self.engine,
            self.student.model,
            step=self.step,
            layout=self.layout,
            controller=self.controller.state_dict(),
            scales=scales,
            keep=self.job.training.keep_checkpoints,
        )
        if reporter is not None:
            reporter.saved(self.step, seconds)
        return seconds

    @property
    def _rows_per_process(self) -> int:
        return self.job.training.rows_per_step // self.processes

    def _load_student(self, folder: CheckpointFolder) -> Any:
        return load_model(folder, device=self.device, attention="packed")

    def _load_teacher(self, student: CheckpointFolder) -> Teacher:
        assert self.job.teacher is not None, "the objective needs a teacher"
        folder = read_checkpoint(self.job.teacher)
        check_pair(folder, student)
        visual = VisualInputs(
            folder, min_pixels=self.job.min_pixels, max_pixels=self.job.max_pixels
        )
        check_same_tokens(visual, self.visual)
        return load_teacher(folder, self.job.teacher_weights, self.job.training, self.device)

    def _recorded_outputs(self) -> TeacherOutputs | None:
        job, distillation = self.job, self.job.objective.distillation
        if job.teacher_outputs is None or not job.objective.needs_teacher:
            return None
        return TeacherOutputs(
            job.teacher_outputs,
            samples=len(self.lengths),
            temperature=None if distillation.kind == "none" else distillation.temperature,
        )

    def _rows(self) -> Iterator[PackedRow]:
        training = self.job.training
        plan = RankPlan(
            self.lengths,
            row_tokens=training.row_tokens,
            rows_per_step=training.rows_per_step,
            seed=self.job.seed,
            first_step=self.step,
            rank=self.rank,
            processes=self.processes,
        )
        rows = PlannedRows(self.data, self.visual, plan, self.outputs)
        return iter(row_loader(rows, training.data_workers, self.device))

    def _global_counts(
        self, rows: list[PackedRow], taught: Sequence[TeacherRow | None]
    ) -> GlobalCounts:
        counts = GlobalCounts.of(rows, taught).stacked()
        dist.all_reduce(counts)
        return GlobalCounts(*counts)

    def _report(
        self, sums: torch.Tensor, counts: GlobalCounts, rows: list[PackedRow]
    ) -> StepReport:
        tokens = sums.new_tensor(float(sum(row.input_ids.shape[1] for row in rows)))
        dist.all_reduce(tokens)
        denominators = counts.stacked()
        means = sums / torch.where(denominators > 0, denominators, 1.0)  # 0 of none is 0
        # The one time in a step that the host waits for the device before the optimizer.
        read = torch.stack([*means, counts.tokens, tokens]).tolist()
        cross_entropy, distillation, relational, supervised, all_tokens = read
        report = StepReport(
            cross_entropy=cross_entropy,
            distillation=distillation,
            relational=relational,
            tokens=int(all_tokens),
            supervised=supervised,
            grad_norm=0.0,
            scale_grad_norm=None,
        )
        for name in ("cross_entropy", "distillation", "relational"):
            if not math.isfinite(getattr(report, name)):
                raise TrainingDiverged(self._divergence(name, getattr(report, name)))
        return report

    def _step_scales(self, rate: float) -> None:
        """Step theta with the gradient summed over ranks, before the weights move."""
        self._scale_grad_norm: float | None = None
        if self.bank is None or self.scale_optimizer is None:
            return
        copies = self.processes  # each row's loss carried the factor that undoes averaging
        if self.cycle is not None:
            held = gradient_shares(self.engine, self.cycle.weights, self.processes)
            self.cycle.map_gradients(held.shares)
            copies = held.copies
        gradient = self.bank.flat.grad
        assert gradient is not None and gradient.dtype == torch.float32
        dist.all_reduce(gradient)
        gradient.div_(copies)
        norm = clip_flat_gradient(gradient, self.job.training.max_grad_norm)
        if not math.isfinite(norm):
            raise TrainingDiverged(self._divergence("gradient norm of the scales", norm))
        self._scale_grad_norm = norm
        set_rate(self.scale_optimizer, rate * self.job.training.scale_learning_rate)
        self.scale_optimizer.step()

    def _divergence(self, what: str, value: float) -> str:
        return (
            f"stage {self.job.stage}, step {self.step + 1}: {what} is {value}; training stopped "
            f"before anything was overwritten. Last good checkpoint: {self.job.checkpoints}. "
            "Lower learning_rate or omega, or look at the records of this step, then run again"
        )

    def _stop(self, stop: StopSignal, last_saved: int, reporter: Reporter | None) -> None:
        fits = torch.tensor(int(stop.write_fits(self.job.grace_seconds)), device=self.device)
        dist.all_reduce(fits, op=dist.ReduceOp.MIN)
        if bool(fits):
            self.save(reporter)
            log.warning("stopped by signal after step %d; saved, nothing is lost", self.step)
        else:
            log.warning(
                "stopped by signal after step %d; no time to save, %d steps will be repeated",
                self.step,
                self.step - last_saved,
            )

    def _values(self, report: StepReport, seconds: float, agreed: Agreement) -> dict[str, float]:
        """What a step's event holds; `seconds` is the whole step, waiting for data included."""
        values = {
            "cross_entropy": report.cross_entropy,
            "distillation": report.distillation,
            "relational": report.relational,
            "beta": self.controller.beta,
            "omega": omega_at(self.job.objective, self.step - 1),
            "learning_rate": self.engine.basic_optimizer.param_groups[0]["lr"],
            "grad_norm": report.grad_norm,
            "supervised_tokens": report.supervised,
            "tokens_per_second": report.tokens / seconds,
            "seconds": seconds,
            "data_seconds": agreed.data_seconds,
            "steps": float(self.steps),
            **agreed.memory,
        }
        if self.controller.ema is not None:
            values["distillation_ema"] = self.controller.ema
        if self.scale_optimizer is not None:
            values["scale_learning_rate"] = self.scale_optimizer.param_groups[0]["lr"]
        if report.scale_grad_norm is not None:
            values["scale_grad_norm"] = report.scale_grad_norm
        return values


def _quantization_cycle(
    model: torch.nn.Module, bank: ScaleBank | None, zero_stage: int
) -> QuantizationCycle | None:
    """None where nothing is quantized, or in every pass."""
    if bank is None:
        return None
    if zero_stage not in QUANTIZED_ONCE_STAGES:
        log.info("ZeRO %d: weights are quantized in every pass, not once a step", zero_stage)
        return None
    return QuantizationCycle(model, bank)


def _agreed(job: TrainingJob, layout: Layout) -> Saved | None:
    """The checkpoint to continue, found and verified by rank 0 alone."""
    found: list[Saved | None] = [None]
    if dist.get_rank() == 0:
        found = [latest_checkpoint(job.checkpoints, layout)]
    dist.broadcast_object_list(found)
    return found[0]
