"""What `grace check` says about memory: what one GPU holds, and which GPUs that fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from grace_core.cli.findings import Findings
from grace_core.config.tree import GraceConfig
from grace_core.doctor.memory import Need, needs
from grace_core.training.memory import BACKWARD, LIBRARIES, STEP, recomputed_layers

CARDS = (24, 40, 48, 80, 141)
"""GB that GPUs are sold with. Taken as 10^9 bytes: they have about 7 % more, left for gaps."""

ZERO_STAGES = (1, 2, 3)
_GB = 1e9


@dataclass(frozen=True)
class _Demand:
    """What one GPU must have for every training stage, by number of recomputed layers."""

    bytes: dict[int, float]

    def layers(self, card_gb: int) -> int | None:
        """The fewest layers to recompute so that it fits; None where it does not."""
        return next((n for n, size in self.bytes.items() if size <= card_gb * _GB), None)


def show_memory(config: GraceConfig, findings: Findings, console: Console) -> None:
    """Print both tables, or why there are none."""
    if config.launch.device == "cpu":
        return
    found = needs(config, findings.teacher, findings.student)
    if found is None:
        away = [
            f"models.{role}"
            for role, checkpoint in (("teacher", findings.teacher), ("student", findings.student))
            if checkpoint.parameters is None
        ]
        text = (
            f"Memory of a GPU: not known, the weights of {' and '.join(away)} are not on this "
            "machine; their files' headers tell. Download them, or ask `grace doctor`."
        )
        console.print(text, highlight=False, markup=False)
        return
    processes, all_layers = config.launch.world_size, ", all layers recomputed"
    if config.distill.training.recompute != "auto":
        all_layers = ""
    gpus = f"1 GPU of {processes}" if processes > 1 else "the GPU"
    _say(console, f"Memory of {gpus} in GB, at most{all_layers}")
    console.print(_parts(found))
    if not all(BACKWARD in need.memory.moments for need in found if STEP in need.memory.moments):
        _say(console, "Activations are not counted: the models' files are not here.\n")
    _say(console, "How many decoder layers must be recomputed to fit on a GPU of so many GB")
    fits = _fits(config, findings)
    console.print(_cards(fits))
    whole = config.models.teacher_weights == "whole" and processes > 1
    teacher = max(need.teacher for need in found)
    if whole and teacher and any("no" in cells for cells in fits.values()):
        text = f"models.teacher_weights: sharded divides the teacher's {_gb(teacher)} GB"
        _say(console, f"{text} by {processes}.\n")


def _say(console: Console, text: str) -> None:
    console.print(text, style="italic", highlight=False, markup=False)


def _parts(found: Sequence[Need]) -> Table:
    """Stages that take the same share a column."""
    columns = [list(alike) for _, alike in groupby(found, key=lambda need: need.memory)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for needs_alike in columns:
        table.add_column(", ".join(need.stage for need in needs_alike), justify="right")
    memories = [needs_alike[0].memory for needs_alike in columns]
    for name in _names(memory.held for memory in memories):
        table.add_row(name, *(_gb(memory.held.get(name, 0.0)) for memory in memories))
    table.add_row(
        "CUDA, cuBLAS, NCCL, about", *(_gb(LIBRARIES) for _ in memories), end_section=True
    )
    for name in _names(memory.moments for memory in memories):
        table.add_row(f"+ {name}", *(_gb(memory.moments.get(name, 0.0)) for memory in memories))
    table.add_section()
    table.add_row("peak", *(_gb(memory.peak + LIBRARIES) for memory in memories))
    return table


def _names(parts: Iterable[Mapping[str, float]]) -> list[str]:
    """Of the table's rows, each once."""
    return list(dict.fromkeys(name for part in parts for name in part))


def _fits(config: GraceConfig, findings: Findings) -> dict[int, list[str]]:
    """By ZeRO stage, whether the training fits on each of the `CARDS`."""
    layers = findings.student.of_text("num_hidden_layers") or 0
    found: dict[int, list[str]] = {}
    for stage in ZERO_STAGES:
        demand = _demand(config, findings, stage, layers)
        counts = [demand.layers(card) for card in CARDS]
        found[stage] = [
            "no" if count is None else f"{count} of {layers}" if layers else "yes"
            for count in counts
        ]
    return found


def _cards(fits: Mapping[int, Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for card in CARDS:
        table.add_column(str(card), justify="right")
    for stage, cells in fits.items():
        table.add_row(f"ZeRO-{stage}", *cells)
    return table


def _demand(config: GraceConfig, findings: Findings, stage: int, layers: int) -> _Demand:
    """Of the stage that takes most."""
    setting = config.distill.training.recompute
    counts: Sequence[int] = range(layers + 1)
    if setting != "auto":
        counts = [recomputed_layers(config.distill.training, layers)]
    sizes = {}
    for count in counts:
        found = needs(
            config, findings.teacher, findings.student, zero_stage=stage, recomputed=count
        )
        assert found is not None, "it was known before"
        sizes[count] = LIBRARIES + max(need.total for need in found)
    return _Demand(sizes)


def _gb(size: float) -> str:
    return "" if size == 0 else f"{size / _GB:.1f}"
