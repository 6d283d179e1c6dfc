"""Which faults come when: rounds of attempts, until enough faults were injected."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.attempt import Attempt, Injected, Planned, run_attempt
from tests.chaos.checks import Outcome, differences, half_written, open_runs, outcome
from tests.chaos.faults import FAULTS, Fault, damage
from tests.chaos.servers import Servers
from tests.chaos.view import STAGES, START, artifacts, finished_stages

_DISK = "900m"  # a run's own small disk, which can be full without harm to anything else
_SECONDS = {START: 10.0, "bf16": 14.0, "w8": 13.0, "w4": 13.0}
"""What these take on two cores; the other stages are over within a second."""
_LONG = tuple(_SECONDS)
_AHEAD = 4  # stages: faults that end a run come early in what is left, so that many fit in a round
_NOT_BEFORE = {
    # The heartbeats that end such a run need a server, and take two minutes.
    "SIGKILL worker and flow": ("SIGKILL Prefect", "Prefect away for a minute"),
    "SIGKILL the flow": ("SIGKILL the worker", "SIGKILL the starting worker"),
}
"""Faults that would only make these last: nobody is left to see the process end."""

_DAMAGED = ("checkpoint", "artifact")
"""What is damaged between two attempts."""

_READS = {
    "bf16": ("data",),
    "w8": ("data", "bf16"),
    "w4": ("data", "bf16"),
    "release-w4": ("w4",),
    "evaluate-w4": ("release-w4",),
    "report": ("evaluate-bf16",),
    "publish": ("release-bf16", "evaluate-bf16"),
}
"""What the next stage reads from those before it, and must notice when it is damaged."""


@dataclass
class Round:
    """One run of the pipeline from nothing to its released models."""

    number: int
    attempts: list[Attempt] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[Injected]:
        return [fault for attempt in self.attempts for fault in attempt.injected]


class Campaign:
    """Rounds with faults, compared with one round without any."""

    def __init__(
        self,
        servers: Servers,
        config: str,
        folder: Path,
        seed: int,
        tell: Callable[[str], None],
    ) -> None:
        self._servers, self._config, self._folder, self._tell = servers, config, folder, tell
        self._chance = random.Random(seed)
        self._planned_kinds: Counter[str] = Counter()
        self._places: Counter[str] = Counter()
        self.rounds: list[Round] = []
        self.reference: Outcome | None = None

    @property
    def faults(self) -> int:
        return sum(len(item.faults) for item in self.rounds)

    @property
    def problems(self) -> list[str]:
        return [
            f"round {item.number}: {problem}"
            for item in self.rounds
            for problem in (*item.problems, *(p for a in item.attempts for p in a.problems))
        ]

    def not_shown(self) -> list[str]:
        """Kinds of faults that never happened, and parts of a run in which none did."""
        kinds = self._happened()
        places = {fault.stage for item in self.rounds for fault in item.faults}
        expected = (*(fault.name for fault in FAULTS), *_DAMAGED)
        missing = [f"never happened: {kind}" for kind in expected if kind not in kinds]
        missing += [f"nothing failed in {place}" for place in _LONG if place not in places]
        if not places - set(_LONG):
            missing.append("nothing failed in or between the short stages")
        return missing

    def _happened(self) -> Counter[str]:
        """How often each kind of fault happened."""
        return Counter(
            fault.fault.partition(":")[0] for item in self.rounds for fault in item.faults
        )

    def run(self, faults: int, deadline: float) -> None:
        """An undisturbed round, then others until so many faults happened or time is up.

        deadline: time.monotonic() after which no further fault is planned.
        """
        self._round(Round(0), quiet=lambda: True)
        while self.faults < faults and time.monotonic() < deadline:
            self._round(
                Round(len(self.rounds)),
                quiet=lambda: self.faults >= faults or time.monotonic() > deadline,
            )

    def _round(self, this: Round, quiet: Callable[[], bool]) -> None:
        self.rounds.append(this)
        run_dir = (self._folder / f"round-{this.number}").absolute()
        with small_disk(run_dir):
            while not this.attempts or this.attempts[-1].state != "COMPLETED":
                if len(this.attempts) >= 40:
                    this.problems.append("not completed after 40 attempts")
                    break
                plan: list[Planned] = []
                damaged = None
                # When only the start is left, faults there would go on for ever and show nothing.
                if not quiet() and len(_left(run_dir)) > 1:
                    damaged = self._damage(run_dir)
                    # A damaged artifact must end the next run by itself.
                    if damaged is None or damaged.fault.startswith("checkpoint"):
                        plan = self._plan(run_dir)
                attempt = run_attempt(self._servers, self._config, run_dir, plan, self._chance)
                if damaged is not None:
                    attempt.injected.insert(0, damaged)
                    if damaged.fault.startswith("artifact"):
                        attempt.expected = ("FAILED",)
                attempt.judge()
                this.attempts.append(attempt)
                attempt.problems += half_written(run_dir)
                self._tell(_line(this, attempt))
            flow_runs = [attempt.flow_run_id for attempt in this.attempts]
            found = outcome(run_dir, self._servers.mlflow_address, flow_runs)
            if self.reference is None:
                self.reference = found
            made_again = Counter(
                fault.stage for fault in this.faults if fault.fault.startswith("artifact")
            )
            this.problems += differences(self.reference, found, made_again)
            this.problems += open_runs(self._servers.mlflow_address, flow_runs)
        if not this.problems and not any(attempt.problems for attempt in this.attempts):
            shutil.rmtree(run_dir)

    def _plan(self, run_dir: Path) -> list[Planned]:
        """One fault that ends the attempt, and a few before it that must not."""
        left = _left(run_dir)
        last = self._rarest([fault for fault in FAULTS if fault.ends is not None], left)
        possible = [place for place in left if place in last.stages]
        soon = [place for place in left[:_AHEAD] if place in possible]
        stage = self._place(soon or possible[:1])
        unsuitable = _NOT_BEFORE.get(last.name, ())
        lasting = [f for f in FAULTS if f.ends is None and f.name not in unsuitable]
        before = left[: left.index(stage) + 1]
        plan = [self._planned(last, stage)]
        for _ in range(self._chance.choice((2, 2, 3, 3))):
            fault = self._rarest(lasting, before)
            places = [place for place in before if place in fault.stages]
            plan.append(self._planned(fault, self._place(places)))
        return sorted(plan, key=lambda item: (STAGES.index(item.stage), item.delay))

    def _planned(self, fault: Fault, stage: str) -> Planned:
        return Planned(fault, stage, self._chance.uniform(0.0, _SECONDS.get(stage, 0.8)))

    def _place(self, stages: list[str]) -> str:
        """One of these stages, those with fewer faults so far first."""
        mixed = self._chance.sample(stages, len(stages))
        chosen = min(mixed, key=lambda stage: self._places[stage])
        # Every attempt has a start, and one that ends there shows nothing of the stages.
        self._places[chosen] += 3 if chosen == START else 1
        return chosen

    def _rarest(self, faults: list[Fault], left: list[str]) -> Fault:
        """A fault that can happen in these stages and happened least for its weight.

        What was only planned decides between equals: a run may end before it comes to that.
        """
        possible = [fault for fault in faults if set(fault.stages) & set(left)]
        mixed = self._chance.sample(possible, len(possible))
        happened = self._happened()
        chosen = min(
            mixed,
            key=lambda fault: (
                happened[fault.name] / fault.weight,
                self._planned_kinds[fault.name] / fault.weight,
            ),
        )
        self._planned_kinds[chosen.name] += 1
        return chosen

    def _damage(self, run_dir: Path) -> Injected | None:
        """Now and then, between two attempts, damage what the next one reads first."""
        spared = self._chance.random() < 0.4
        spared = spared and all(self._happened()[kind] for kind in _DAMAGED)
        if spared or not run_dir.joinpath("artifacts").is_dir():
            return None
        checkpoints = sorted((run_dir / "work").glob("*/checkpoints/step-*"))
        if checkpoints:
            stage = checkpoints[-1].parent.parent.name.rpartition("-")[0]
            file = self._chance.choice(_with_content(checkpoints[-1]))
            return Injected(f"checkpoint: {damage(file, self._chance)}", stage, 0.0)
        next_stage = _left(run_dir)[1]  # after the start
        found = [
            folder
            for folder in artifacts(run_dir)
            if folder.name.rpartition("-")[0] in _READS.get(next_stage, ())
        ]
        if not found:
            return None
        folder = self._chance.choice(found)
        file = self._chance.choice(_with_content(folder))
        return Injected(f"artifact: {damage(file, self._chance)}", folder.name[:-13], 0.0)


def _left(run_dir: Path) -> list[str]:
    """Stages that the next attempt has before it; the start comes every time."""
    done = finished_stages(run_dir)
    return [stage for stage in STAGES if stage not in done]


def _with_content(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own in `folder`, whose content stays in it afterwards."""
    folder.mkdir(parents=True)
    disk = folder.with_name(f"{folder.name}.disk")
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)], check=True
    )
    try:
        yield
        shutil.copytree(folder, disk, dirs_exist_ok=True, symlinks=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()
        disk.rename(folder)


def _line(this: Round, attempt: Attempt) -> str:
    faults = "; ".join(f"{item.fault} in {item.stage}" for item in attempt.injected) or "no fault"
    after = "" if attempt.ended_after is None else f", {attempt.ended_after:.0f} s after the last"
    bad = "".join(f"\n      PROBLEM {problem}" for problem in attempt.problems)
    return (
        f"round {this.number} attempt {len(this.attempts)}: {attempt.state:9} "
        f"{attempt.seconds:4.0f} s{after}  {faults}{bad}"
    )
