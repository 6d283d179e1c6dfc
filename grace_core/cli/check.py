"""What `grace check` shows: the resolved configuration and the work it stands for."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from grace_core.cli.findings import Findings
from grace_core.cli.memory import show_memory
from grace_core.config.launch import Launch, SlurmLaunch
from grace_core.config.load import config_digest
from grace_core.config.objective import Objective
from grace_core.config.training import Training
from grace_core.config.tree import GraceConfig
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.doctor.memory import training_stages

_DISTILLATION = {"gated-decoupled": "GDKD", "decoupled": "DKD", "plain": "KD"}


def show_plan(config: GraceConfig, findings: Findings, console: Console) -> None:
    """Print the tree, the checkpoints, the stages and the warnings."""
    tree = Tree(f"[bold]{escape(config.name)}[/]  digest {config_digest(config)[:16]}")
    _add_section(tree, config)
    console.print(tree, highlight=False)
    console.print("[dim]Values left at their default are dim.[/]\n")
    console.print(_checkpoints(findings))
    console.print(_stages(config))
    show_memory(config, findings, console)
    console.print(_launch(config.launch), highlight=False, markup=False)
    console.print(f"Everything goes to {config.run_dir}/", highlight=False, markup=False)
    for warning in findings.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    console.print("[green]The configuration is valid.[/]")


def _add_section(tree: Tree, section: BaseModel) -> None:
    for name, value in section:
        if isinstance(value, BaseModel):
            given = name in section.model_fields_set
            _add_section(tree.add(f"[bold]{name}[/]" if given else f"[dim]{name}[/]"), value)
            continue
        style = "" if name in section.model_fields_set else "dim"
        text = f"{name}: {_shown(value)}"
        tree.add(f"[{style}]{escape(text)}[/]" if style else escape(text))


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        given = [
            f"{name}: {_shown(getattr(value, name))}" for name in sorted(value.model_fields_set)
        ]
        return given[0] if len(given) == 1 else "{" + ", ".join(given) + "}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _checkpoints(findings: Findings) -> Table:
    columns = ("", "path", "family", "parameters", "layers", "width", "vocabulary")
    table = _table("Checkpoints", *columns)
    for role, checkpoint in (("teacher", findings.teacher), ("student", findings.student)):
        table.add_row(role, escape(checkpoint.source.path), *_sizes(checkpoint))
    return table


def _sizes(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.folder is None:
        return ["not here"]
    family = str(checkpoint.config.get("model_type", "?"))
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size")
    return [
        family,
        _number(checkpoint.parameters),
        *(_number(checkpoint.of_text(name)) for name in sizes),
    ]


def _launch(launch: Launch) -> str:
    ranks = f"{launch.processes} process" + ("" if launch.processes == 1 else "es")
    where = f"{ranks} on this machine"
    if isinstance(launch.backend, SlurmLaunch):
        partition = launch.backend.partition
        where = f"{ranks} on each of {launch.nodes} nodes" if launch.nodes > 1 else ranks
        where += ", as a job of SLURM in " + (
            f"partition {partition}" if partition else "the default partition"
        )
    return f"Each training runs in {where}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _stages(config: GraceConfig) -> Table:
    table = _table("Stages", "", "of", "length", "a step, at most", "loss")
    table.add_row("data", config.data.source.kind, _records(config))
    starts = {"teacher": "teacher", "bf16": "student"}
    for name, stage in training_stages(config).items():
        rows, row = stage.training.rows_per_step, stage.training.row_tokens
        table.add_row(
            name,
            starts.get(name, "bf16" if config.quantize.start is None else "quantize.start"),
            _length(stage.training),
            f"{rows:,} x {row:,} tokens",
            _loss(stage.objective),
        )
    labels = ", ".join(config.students)
    items = "all" if config.evaluation.items is None else f"{config.evaluation.items:,}"
    table.add_row("release", labels)
    table.add_row("evaluate", "every model", f"{items} questions")
    goes = f"to a {config.publish.destination.kind}" if config.publish.enabled else "off"
    table.add_row("publish", labels, goes)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("a step, at most", "loss"))
    return table


def _records(config: GraceConfig) -> str:
    source = config.data.source
    if source.kind == "toy":
        return f"{source.records:,} records"
    return "all records" if source.limit is None else f"first {source.limit:,} records"


def _length(training: Training) -> str:
    if training.steps is not None:
        return f"{training.steps:,} steps"
    return f"{training.epochs:g} epoch" + ("" if training.epochs == 1 else "s")


def _loss(objective: Objective) -> str:
    """Eq. 21 with this configuration's weights."""
    terms = ["CE"] if objective.cross_entropy else []
    if objective.distillation.kind != "none":
        controller = objective.controller
        beta = f"{controller.beta_init:g}" if controller.kind == "fixed" else "beta"
        terms.append(f"{beta} {_DISTILLATION[objective.distillation.kind]}")
    if objective.relational.enabled:
        terms.append(f"{objective.relational.omega:g} RCKA")
    return " + ".join(terms)
