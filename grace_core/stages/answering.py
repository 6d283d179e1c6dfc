"""A model's answers to all benchmarks of an evaluation, by this process or by several."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict

from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.engine.generation import GenerationEngine
from grace_core.evaluation.engine.interface import Engine
from grace_core.evaluation.engine.journal import Journal
from grace_core.evaluation.engine.run import ANSWERS, ask_all, recorded
from grace_core.evaluation.engine.vllm import VllmEngine, load_vllm
from grace_core.evaluation.items import Item, Kind, Prediction
from grace_core.evaluation.loading.prepared import read_items
from grace_core.launch.backend import rank_environment
from grace_core.launch.crew import run_crew
from grace_core.models.loading import CheckpointFolder, load_model, load_tokenizer, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from grace_core.whole_files import write_whole

JOB_FILE = "job.json"
_MOST_THREADS = 8

Report = Callable[[str, int], None]
"""Called with a benchmark's name and how many of its questions are answered."""


class AskingJob(BaseModel):
    """One model and the questions that it is asked; what a process of several is told."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    config: GraceConfig
    model: Path
    """The checkpoint's folder."""

    benchmarks: Path
    """A folder of items for each benchmark."""

    work: Path
    """Where answers are kept until the evaluation is done."""

    def items(self) -> dict[str, list[Item]]:
        """The chosen items of every benchmark."""
        return {name: read_items(self.benchmarks / name) for name in self.config.evaluation.names}

    def folder(self, benchmark: str) -> Path:
        """Where answers to one benchmark are kept."""
        return self.work / benchmark


def evaluation_device(config: GraceConfig) -> torch.device:
    """Where this process computes: the configured device, or a GPU when there is one.

    With a scheduler the configured device is that of its nodes, where training alone runs.
    """
    here = config.launch.backend.kind == "local"
    if here and config.launch.device == "cuda" and not torch.cuda.is_available():
        raise GraceError("launch.device is cuda, but torch sees no GPU; set it to cpu or auto")
    if config.launch.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def processes(config: GraceConfig) -> int:
    """That share the questions: as configured, else one for each GPU."""
    if config.evaluation.processes is not None:
        return config.evaluation.processes
    on_gpus = evaluation_device(config).type == "cuda"
    return torch.cuda.device_count() if on_gpus else 1


def budgets(config: GraceConfig, benchmark: str) -> Mapping[str, int]:
    """Tokens of an answer at most, by kind of question: as configured, else as declared."""
    limit = config.evaluation.max_new_tokens
    if limit is not None:
        return dict.fromkeys(get_args(Kind), limit)
    return {str(kind): most for kind, most in find_benchmark(benchmark).max_new_tokens.items()}


def visual_inputs(config: GraceConfig, checkpoint: CheckpointFolder) -> VisualInputs:
    """How the benchmarks' pictures are resized: as configured, else as the checkpoint says."""
    limits = config.evaluation
    return VisualInputs(checkpoint, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)


@dataclass
class Answering:
    """Asks one model; it is loaded when it is first needed."""

    job: AskingJob
    checkpoint: CheckpointFolder
    items: Mapping[str, list[Item]]
    report: Report

    @cached_property
    def model(self) -> Any:
        """On this process's device, for packed rows and for generation."""
        device = evaluation_device(self.job.config)
        return load_model(self.checkpoint, device=device, attention="cached")

    @cached_property
    def _vllm(self) -> Any:
        every = [item.question for items in self.items.values() for item in items]
        return load_vllm(self.checkpoint.path, max(len(one.pictures) for one in every))

    def predictions(self) -> dict[str, list[Prediction]]:
        """Of every benchmark, in the order of its items; what was answered before is not asked."""
        count = processes(self.job.config)
        # vLLM keeps a GPU's memory as long as its process lives.
        apart = count > 1 or self.job.config.evaluation.engine == "vllm"
        if apart and not self._all_recorded():
            self._run_processes(count)
        return {name: self.asked(name) for name in self.items}

    def asked(self, benchmark: str) -> list[Prediction]:
        """Of one benchmark, by this process and whoever else is at it."""
        questions = [item.question for item in self.items[benchmark]]
        folder = self.job.folder(benchmark)
        found = recorded(questions, folder)
        if found is None:
            engine = self._engine(benchmark)
            found = ask_all(engine, questions, folder, lambda done, _: self.report(benchmark, done))
        self.report(benchmark, len(questions))
        return found

    def _engine(self, benchmark: str) -> Engine:
        config = self.job.config
        tokenizer = load_tokenizer(self.checkpoint.path)
        limits = budgets(config, benchmark)
        if config.evaluation.engine == "vllm":
            return VllmEngine(self._vllm, tokenizer, budgets=limits)
        cpus = len(os.sched_getaffinity(0)) // processes(config)
        on_gpu = self.model.device.type == "cuda"
        return GenerationEngine(
            self.model,
            self.checkpoint.family,
            tokenizer,
            visual_inputs(config, self.checkpoint),
            budgets=limits,
            batch_tokens=config.evaluation.batch_tokens,
            threads=max(1, min(_MOST_THREADS, cpus)) if on_gpu else 1,
        )

    def _all_recorded(self) -> bool:
        return all(
            recorded([item.question for item in items], self.job.folder(name)) is not None
            for name, items in self.items.items()
        )

    def _run_processes(self, count: int) -> None:
        job, launch = self.job, self.job.config.launch
        job.work.mkdir(parents=True, exist_ok=True)
        file = job.work / JOB_FILE
        write_whole(file, job.model_dump_json())
        shared = rank_environment(launch)
        journals = {name: Journal(job.folder(name) / ANSWERS) for name in self.items}

        def look() -> None:
            for name, journal in journals.items():
                before = len(journal.predictions)
                journal.refresh()
                if len(journal.predictions) != before:
                    self.report(name, len(journal.predictions))

        run_crew(
            [sys.executable, "-m", "grace_core.stages.answering_worker", str(file)],
            [{**shared, **_own_gpu(job.config, rank)} for rank in range(count)],
            stage=job.stage,
            log_folder=job.work / "logs",
            grace_seconds=launch.grace_seconds,
            timeout_seconds=None if launch.timeout_hours is None else 3600 * launch.timeout_hours,
            on_poll=look,
        )


def _own_gpu(config: GraceConfig, rank: int) -> dict[str, str]:
    """Environment that shows a process one GPU of those that this one sees."""
    if evaluation_device(config).type != "cuda":
        return {}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = named.split(",") if named else [str(at) for at in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": seen[rank % len(seen)]}


def answer_as_one_of_several(file: Path) -> None:
    """What each process does that `Answering` starts with this job's file."""
    job = AskingJob.model_validate_json(file.read_text(encoding="utf-8"))
    answering = Answering(job, read_checkpoint(job.model), job.items(), lambda _name, _done: None)
    for name in answering.items:
        answering.asked(name)
