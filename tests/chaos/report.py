"""What a campaign found, as a table, as a verdict and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from tests.chaos.rounds import Campaign, Round


@dataclass(frozen=True)
class Report:
    """The figures of a campaign."""

    seed: int
    seconds: float
    rounds: list[Round]
    problems: list[str]
    not_shown: list[str]

    @property
    def faults(self) -> int:
        return sum(len(item.faults) for item in self.rounds)

    def table(self) -> Table:
        """One row a kind of fault: how often, where, and how the runs ended."""
        table = Table(title=f"Faults (seed {self.seed})", title_justify="left")
        for column in ("fault", "times", "stages", "run ended", "seconds to the end"):
            table.add_column(column)
        rows: dict[str, list[tuple[str, str, float]]] = {}
        for item in self.rounds:
            for attempt in item.attempts:
                for fault in attempt.injected:
                    kind = fault.fault.partition(":")[0]
                    entry = (fault.stage, attempt.state, attempt.ended_after or 0.0)
                    rows.setdefault(kind, []).append(entry)
        for kind, entries in sorted(rows.items()):
            table.add_row(
                kind,
                str(len(entries)),
                _counted(stage for stage, _, _ in entries),
                _counted(state.lower() for _, state, _ in entries),
                f"{max(seconds for _, _, seconds in entries):.0f} at most",
            )
        return table

    def verdict(self) -> str:
        attempts = [attempt for item in self.rounds for attempt in item.attempts]
        lines = [
            f"{self.faults} faults in {len(attempts)} flow runs, {len(self.rounds) - 1} rounds "
            f"compared with an undisturbed one, {self.seconds / 60:.1f} minutes, seed {self.seed}",
            "last process of a flow gone after at most "
            f"{max(attempt.last_process_after for attempt in attempts):.1f} s",
        ]
        if self.problems:
            return "\n".join([*lines, f"{len(self.problems)} PROBLEMS:", *self.problems])
        lines.append("Everything held: weights bit-identical, nothing stuck.")
        return "\n".join([*lines, *self.not_shown])


def report(campaign: Campaign, seed: int, seconds: float) -> Report:
    """The report of a campaign that is over."""
    return Report(seed, seconds, campaign.rounds, campaign.problems, campaign.not_shown())


def write_report(found: Report, folder: Path) -> None:
    """Leave `report.json` in the campaign's folder."""
    content = {
        "seed": found.seed,
        "seconds": found.seconds,
        "faults": found.faults,
        "problems": found.problems,
        "not_shown": found.not_shown,
        "rounds": [asdict(item) for item in found.rounds],
    }
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _counted(names: Iterable[str]) -> str:
    counts = Counter(names)
    return ", ".join(f"{name} {count}" if count > 1 else name for name, count in counts.items())
