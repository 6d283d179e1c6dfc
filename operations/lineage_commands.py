"""`grace lineage` and `grace reproduce`: where a model came from, and whether it can be made again.

Both read the files of the runs; `grace lineage --mlflow` asks the tracking server instead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from grace_core.cli.app import INTERRUPTED, Settings, app, console
from grace_core.errors import GraceError

if TYPE_CHECKING:
    from rich.tree import Tree

    from grace_core.lineage.graph import Lineage
    from grace_core.reproduction.plan import Plan
    from grace_core.reproduction.verdict import Verdict

DIFFERS = 3
"""Exit code of a reproduction whose result is another."""

_PANEL = "Lineage"
_FILES_SHOWN = 8

Root = Annotated[
    Path, typer.Option("--root", metavar="FOLDER", help="Where the run directories are.")
]


@app.command(
    rich_help_panel=_PANEL,
    epilog="Examples:\n\n"
    "grace lineage Toy-GRACE-W4G128                       a release, by its name\n\n"
    "grace lineage runs/demo/releases/Toy-GRACE-W4G128    a published directory\n\n"
    "grace lineage w4 --root runs/demo --picture w4.svg   a stage of one run\n\n"
    "grace lineage --from runs/demo/artifacts/data-...    what came of these data?\n\n"
    "grace lineage models:/toy-grace-w4@candidate --mlflow",
)
def lineage(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Release's name, folder of an artifact or a published directory, stage such as "
            "w4, or at least 8 digits of a digest. With --mlflow: a registered name (NAME or "
            "NAME@ALIAS), a model's id, or digits.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="DIGEST|FOLDER",
            help="The other way: which models came from these data, this teacher, this anything.",
            show_default=False,
        ),
    ] = None,
    root: Root = Path("runs"),
    mlflow: Annotated[
        bool, typer.Option("--mlflow", help="Ask the server at MLFLOW_TRACKING_URI, no files.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The graph as JSON.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw it into this file.", show_default=False),
    ] = None,
) -> None:
    """Show what a model was made from: data, teacher, checkpoints, configuration, code, scores.

    With --from it goes the other way, from data or a teacher to all that came of
    them. Reads the manifests below --root; an ancestor whose folder is gone is
    shown with the digest that its descendants recorded.
    """
    if (model is None) == (source is None):
        raise typer.BadParameter("give either MODEL or --from DIGEST|FOLDER")
    forward = source is not None
    graph = _graph(source or model or "", forward=forward, root=root, mlflow=mlflow)
    if picture is not None:
        from grace_core.lineage.picture import picture as draw

        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(draw(graph), encoding="utf-8")
    if as_json:
        typer.echo(graph.model_dump_json(indent=1))
    elif forward:
        _show_descendants(graph)
    else:
        from grace_core.lineage.text import tree

        where = "whole in --json, and in each manifest.json"
        for node_id in graph.models:
            _print_tree(tree(graph, node_id, where))


@app.command(
    rich_help_panel=_PANEL,
    epilog="Examples:\n\n"
    "grace reproduce Toy-GRACE-W4G128\n\n"
    "grace reproduce ./Toy-GRACE-W4G128 --set data.source.root=/data/sharegpt4v\n\n"
    "grace reproduce w4 --root runs/demo --run-dir runs/again --set seed=18",
)
def reproduce(
    model: Annotated[
        str,
        typer.Argument(
            help="What `grace lineage` takes: a release's name, a folder, a published directory, "
            "a stage, or digits of a digest.",
            show_default=False,
        ),
    ],
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="New run directory. Without: runs/reproduced-NAME-DIGEST.",
            show_default=False,
        ),
    ] = None,
    root: Root = Path("runs"),
    settings: Settings = None,
) -> None:
    """Make a model again from its recorded configuration, and say whether it is the same.

    Runs the stages that the model needs, from the data on, in a folder of its
    own; nothing of the original is reused. Stopped at any point, the same command
    continues. What differs beforehand (code, packages, hardware, inputs) is told.

    Exit code 0: the same, bit for bit. 3: another; the first stage that went
    another way is named, with how far its weights are off.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries would tear ours apart
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from grace_core.lineage.find import find_model
    from grace_core.reproduction.plan import claim_run_dir, plan_reproduction, write_marker

    plan = plan_reproduction(find_model(model, root), run_dir, settings or [])
    with console.status("loading libraries"):
        from grace_core.cli.live import LiveProgress
        from grace_core.cli.remake import remake
        from grace_core.progress import RunMeter
        from grace_core.reproduction.inputs import differences
        from grace_core.reproduction.verdict import judge
    console.print(
        f"{plan.target.stage} {plan.target.short}: {len(plan.stages)} stages, in {plan.run_dir}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for difference in differences(plan):
        text = f"[yellow]differs:[/] {escape(difference)}"
        console.print(text, highlight=False, soft_wrap=True)
    claim_run_dir(plan)
    try:
        with LiveProgress(console, RunMeter()) as progress:
            made = remake(plan, progress)
    except KeyboardInterrupt:
        told = "interrupted; the same command continues where it stopped"
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    verdict = judge(plan, made)
    write_marker(plan, verdict.to_dict())
    _show_verdict(plan, verdict)
    if not verdict.identical:
        sys.exit(DIFFERS)


def _graph(name: str, *, forward: bool, root: Path, mlflow: bool) -> Lineage:
    if mlflow:
        from operations.mlflow_lineage import descendants_in_mlflow, lineage_in_mlflow

        return descendants_in_mlflow(name) if forward else lineage_in_mlflow(name)
    from grace_core.lineage.collect import artifacts_below
    from grace_core.lineage.find import data_digest, find_model
    from grace_core.lineage.forward import descendants

    if not forward:
        return find_model(name, root).lineage
    digest = data_digest(name)
    if not root.is_dir():
        raise GraceError(f"no folder {root}; say with --root where the run directories are")
    return descendants(digest, artifacts_below(root))


def _print_tree(tree: Tree) -> None:
    """Wrapped and coloured in a terminal; whole lines in a file or a pipe."""
    if console.is_terminal:
        console.print(tree, highlight=False)
    else:
        from grace_core.lineage.text import plain

        typer.echo(plain(tree), nl=False)


def _show_descendants(graph: Lineage) -> None:
    from grace_core.lineage.forward import models_in
    from grace_core.lineage.text import descendants_tree

    _print_tree(descendants_tree(graph))
    models = [f"{node.name} {node.short}" for node in models_in(graph)]
    console.print(f"\nModels: {', '.join(models) or 'none'}", highlight=False, soft_wrap=True)


def _show_verdict(plan: Plan, verdict: Verdict) -> None:
    lines = []
    if verdict.divergence is None:
        lines.append(f"[green]identical[/]: {plan.target.stage} {verdict.made}")
    else:
        found = verdict.divergence
        lines.append(
            f"[red]differs[/]: {plan.target.stage} is {verdict.made[:12]}, recorded was "
            f"{verdict.recorded[:12]}"
        )
        lines.append(
            f"first different stage: [bold]{found.stage}[/] ({found.made[:12]}, recorded "
            f"{found.recorded[:12]})"
        )
        if found.changed_inputs:
            lines.append(f"inputs that were others: {', '.join(found.changed_inputs)}")
        if found.files is None:
            lines.append("the original's files are not here, so only digests were compared")
        else:
            listed = ", ".join(found.files[:_FILES_SHOWN])
            more = len(found.files) - _FILES_SHOWN
            lines.append(f"files: {listed}{f' and {more} more' if more > 0 else ''}")
        if found.weights is not None:
            lines.append(
                f"weights: {found.weights['different']:.0f} of {found.weights['tensors']:.0f} "
                f"tensors differ, by at most {found.weights['max_abs']:.3g}"
            )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
