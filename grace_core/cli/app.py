"""Commands, their options and their help. Whatever is slow to import is imported when it is needed.

A mistake of the user ends with its message on standard error and exit code 1, without a traceback.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from grace_core import __version__
from grace_core.config import GraceConfig, load_config
from grace_core.errors import GraceError

if TYPE_CHECKING:
    from grace_core.artifacts import Artifact
    from grace_core.cli.chain import Chain
    from grace_core.plan import Goal
    from grace_core.progress import RunMeter

log = logging.getLogger(__name__)

INTERRUPTED = 130

_COMMAND: ContextVar[str] = ContextVar("command")
"""This very command, ready for a shell: what continues a run that ended early."""

app = typer.Typer(
    name="grace",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distil and quantize vision-language models with GRACE, one stage or all of them.",
    epilog="Examples:\n\n"
    "grace check configs/toy.yaml                    what would it do?\n\n"
    "grace run configs/toy.yaml --set seed=3         all of it, with another seed\n\n"
    "grace quantize configs/toy.yaml --variant w4    one stage, and those it needs",
)
toy = typer.Typer(no_args_is_help=True, help="Make the toy world: pictures, questions, weights.")
app.add_typer(toy, name="toy", rich_help_panel="Toy world")
console = Console()

STAGE_PANEL = "One stage (the stages it needs run first; finished ones are kept)"

ConfigFile = Annotated[
    Path,
    typer.Argument(help="Configuration file, such as configs/toy.yaml.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Replace a value of the file, as in data.source.records=200; repeatable.",
        show_default=False,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(
    rich_help_panel="Whole pipeline",
    epilog="Example: grace check configs/toy.yaml --set quantize.variants=\\[w4]",
)
def check(config: ConfigFile, settings: Settings = None) -> None:
    """Check a configuration and show what it would run; nothing is loaded or downloaded.

    Works on any machine: a GPU, data or weights that are not here are warned of. Ends with exit
    code 1 and all problems at once when the configuration cannot run anywhere.
    """
    from grace_core.cli.check import show_plan
    from grace_core.cli.findings import check_machine

    resolved = load_config(config, settings or [])
    findings = check_machine(resolved, str(config))
    show_plan(resolved, findings, console)


@app.command(
    rich_help_panel="Whole pipeline",
    epilog="Example: grace run configs/toy.yaml --set run_dir=runs/second --set seed=3",
)
def run(config: ConfigFile, settings: Settings = None) -> None:
    """Run every stage that is not done yet, and show the results.

    Stopped at any point, the same command continues: finished stages are kept, and a training
    goes on from its last checkpoint.
    """
    with running(config, settings, "publish") as chain:
        evaluations, report = chain.evaluations(), chain.report()
        waits = chain.config.publish.enabled and chain.config.publish.approval
        published = None if waits else chain.publication()
    _show_table(evaluations)
    _show_report(report)
    if published is not None:
        show_releases(published)
    else:
        console.print(
            "\nNothing is published yet: publish.approval is true. Look at the results, then\n  "
            f"grace publish {config} --approved-by YOUR-NAME",
            markup=False,
            highlight=False,
        )


@app.command(rich_help_panel=STAGE_PANEL)
def data(config: ConfigFile, settings: Settings = None) -> None:
    """Prepare the training data: tokens and pictures, unusable records in quarantine."""
    with running(config, settings, "data") as chain:
        _show_metrics({"data": chain.data()})


@app.command(rich_help_panel=STAGE_PANEL)
def teacher(config: ConfigFile, settings: Settings = None) -> None:
    """Fit the teacher to the data, and record what it says of them (sections teacher_fit and
    teacher_outputs)."""
    with running(config, settings, "teacher") as chain:
        made = {} if chain.config.teacher_fit is None else {"teacher": chain.teacher()}
        if chain.config.records_teacher:
            made["teacher-outputs"] = chain.teacher_outputs()
        _show_metrics(made)


@app.command(rich_help_panel=STAGE_PANEL)
def distill(config: ConfigFile, settings: Settings = None) -> None:
    """Train the BF16 student."""
    with running(config, settings, "distill") as chain:
        _show_metrics({"bf16": chain.bf16()})


@app.command(
    rich_help_panel=STAGE_PANEL, epilog="Example: grace quantize configs/toy.yaml --variant w4"
)
def quantize(
    config: ConfigFile,
    settings: Settings = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="w8|w4",
            help="Precision to train; repeatable. Without: those of the configuration.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train the quantized students, starting from the BF16 student."""
    chosen = [f"quantize.variants=[{','.join(variant)}]"] if variant else []
    with running(config, [*(settings or []), *chosen], "quantize") as chain:
        _show_metrics({name: chain.quantized(name) for name in chain.config.quantize.variants})


@app.command(rich_help_panel=STAGE_PANEL)
def release(config: ConfigFile, settings: Settings = None) -> None:
    """Write the students in the form that users load, and prove it equal to what was trained."""
    with running(config, settings, "release") as chain:
        _show_metrics(chain.releases())


@app.command(rich_help_panel=STAGE_PANEL)
def evaluate(config: ConfigFile, settings: Settings = None) -> None:
    """Score teacher, baseline and releases on the benchmarks."""
    with running(config, settings, "evaluate") as chain:
        evaluations, report = chain.evaluations(), chain.report()
    _show_table(evaluations)
    _show_report(report)


@toy.command("world", epilog="Example: grace toy world runs/world --records 100")
def toy_world(
    folder: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    records: Annotated[int, typer.Option(min=1, help="Training records.")] = 2400,
    seed: Annotated[int, typer.Option(min=0, help="Of the training records.")] = 0,
    wrong_answer_share: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of wrong training answers.")
    ] = 0.1,
) -> None:
    """Write toy pictures with conversations, in ShareGPT4V's schema, and the toy benchmarks."""
    from grace_core.stages.benchmarks import BENCHMARK_SEED
    from grace_core.toy.world import write_benchmark, write_training_set

    annotations = write_training_set(
        folder, count=records, seed=seed, wrong_answer_share=wrong_answer_share
    )
    typer.echo(annotations)
    for benchmark in write_benchmark(folder, seed=BENCHMARK_SEED):
        typer.echo(benchmark)


@toy.command(
    "pretrain",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def toy_pretrain(context: typer.Context) -> None:
    """Pretrain the toy teacher or student from random weights (`--help` for its options)."""
    from grace_core.toy.pretrain import pretrain

    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(pretrain)
    command(args=context.args, prog_name="grace toy pretrain")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `grace`; ends the process unless a command just returned."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)  # ends like Ctrl-C: a training saves and leaves
    given = sys.argv[1:] if arguments is None else list(arguments)
    _COMMAND.set(shlex.join(["grace", *given]))
    try:
        app(args=given, prog_name="grace")
    except GraceError as error:
        notes: list[str] = getattr(error, "__notes__", [])
        Console(stderr=True).print(
            "\n".join([f"[red]error:[/] {escape(str(error))}", *map(escape, notes)]),
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(1)


@contextmanager
def running(
    config: Path, settings: list[str] | None, goal: Goal, *, finished_only: bool = False
) -> Iterator[Chain]:
    """The configuration's stages, shown while they run; what ends them early is reported.

    goal: what the command asks for, which decides how many stages there are on the way.
    finished_only: a stage that is not done is an error, and nothing runs.
    """
    resolved = load_config(config, settings or [])
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries would tear ours apart
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _examine(resolved, goal)
    from grace_core.failure import remove_failure
    from grace_core.progress import RunMeter

    meter = RunMeter(resolved, goal)
    try:
        with console.status("loading libraries"):
            from grace_core.cli.chain import Chain
            from grace_core.cli.live import LiveProgress
        with LiveProgress(console, meter) as progress:
            yield Chain(resolved, progress, finished_only=finished_only)
    except KeyboardInterrupt as interrupt:
        told = "interrupted; the same command continues where it stopped"
        report = _report(interrupt, resolved.run_dir, meter)
        Console(stderr=True).print(
            f"{told}\n{report}", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        error.add_note(_report(error, resolved.run_dir, meter))
        raise
    remove_failure(resolved.run_dir)


def _examine(config: GraceConfig, goal: Goal) -> None:
    """What `grace doctor` checks, servers left out; raises NotReady where the run would fail."""
    from grace_core.doctor.examination import examine
    from grace_core.doctor.findings import Severity, require_no_problem

    findings = examine(config, goal)
    require_no_problem(findings)
    for finding in findings:
        if finding.severity in (Severity.WARNING, Severity.UNCHECKED):
            text = f"[yellow]{finding.severity}:[/] {escape(finding.sentence)}"
            console.print(text, highlight=False, soft_wrap=True)


def _report(error: BaseException, run_dir: Path, meter: RunMeter) -> str:
    """The report on an early end, as text; also written to the run's folder where that can be."""
    from grace_core.failure import failure_of, write_failure

    failure = failure_of(
        error,
        run_dir,
        stage=meter.stage,
        since=meter.stage_began,
        finished=meter.finished,
        commands=[_COMMAND.get()],
    )
    try:
        write_failure(failure, run_dir)
    except OSError as unwritten:
        log.warning("the report on the failure could not be written: %s", unwritten)
    return failure.to_text(after=str(error))


def _show_metrics(artifacts: Mapping[str, Artifact]) -> None:
    for label, artifact in artifacts.items():
        metrics = artifact.manifest.metrics
        shown = "  ".join(f"{name} {value:,.10g}" for name, value in metrics.items())
        if shown:
            console.print(f"{label}: {shown}", highlight=False, soft_wrap=True)


def _show_table(evaluations: Mapping[str, Artifact]) -> None:
    from grace_core.publish.release_set import table_of

    console.print()
    console.print(table_of(evaluations).to_rich())


def _show_report(report: Artifact) -> None:
    page = report.path / "index.html"
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


def show_releases(published: Artifact) -> None:
    import json

    results = json.loads((published.path / "results.json").read_text(encoding="utf-8"))
    console.print("\nReleased models:")
    for label, place in results["releases"].items():
        console.print(f"  {label:5} {place}", markup=False, highlight=False, soft_wrap=True)
    file = published.path / "results.json"
    console.print(f"Results: {file}", markup=False, highlight=False, soft_wrap=True)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
