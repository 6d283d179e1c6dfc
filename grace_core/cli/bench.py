"""Commands of the bench: how fast, how large, and the whole pipeline at real size."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from grace_core.cli.app import ConfigFile, Settings, app, console
from grace_core.config import GraceConfig, load_config
from grace_core.whole_files import write_whole

if TYPE_CHECKING:
    from grace_core.bench.table import BenchTable, Line
    from grace_core.toy.checkpoints import Role

bench = typer.Typer(invoke_without_command=True, add_completion=False)
app.add_typer(bench, name="bench", rich_help_panel="Performance")

ShapesOption = Annotated[
    Literal["real", "toy"],
    typer.Option(help="real: Qwen3-VL 8B teaches 2B; toy: tiny models, for any machine."),
]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]


@bench.callback(
    epilog="Examples:\n\n"
    "grace bench                                     every row, on the GPU\n\n"
    "grace bench --rows gdkd,heads --repeats 20      two rows\n\n"
    "grace bench --profile w4-micro-step             what a row spends its time on\n\n"
    "grace bench --shapes toy --device cpu           seconds, on any machine\n\n"
    "torchrun --nproc-per-node 2 -m grace_core.cli bench --one-gpu runs/bench/bench.json",
)
def run_bench(
    context: typer.Context,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows to measure, with commas between; without, all: bf16-step, w4-step, "
            "w4-step-alone, w4-micro-step, gdkd, heads, fake-quantization, training-step.",
            show_default=False,
        ),
    ] = None,
    shapes: ShapesOption = "real",
    device: DeviceOption = "auto",
    repeats: Annotated[int, typer.Option(min=2, help="Repeats of a row, at most.")] = 10,
    recompute: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Decoder layers that the student computes again in its backward pass. Without: "
            "as few as keep the BF16 step within 10 GiB.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for bench.json and bench.md.")] = Path(
        "runs/bench"
    ),
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="ROW",
            help="Instead of measuring: profile one run of this row, longest kernels first.",
            show_default=False,
        ),
    ] = None,
    one_gpu: Annotated[
        Path | None,
        typer.Option(
            help="bench.json of a run on one GPU, to compare several GPUs' throughput with.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure the training beside a plain implementation, on random weights.

    Each row gives the median time of a micro-batch, the peak of GPU memory above
    weights and inputs, and the least time that its operations or bytes can take on
    this device, whose rates are measured first. Goals are shown on the device that
    they are stated for, one H200. docs/performance.md explains the rows.

    Started by torchrun on several GPUs, only training-step is measured, unless
    rows are named. A row that fails is shown as failed; the exit code is then 1.
    """
    if context.invoked_subcommand is not None:
        return
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries would tear ours apart
    from grace_core.bench.device import bench_device

    where = bench_device(device)
    os.environ["DS_ACCELERATOR"] = where.type  # DeepSpeed chooses on import
    from grace_core.bench.run import TRAINING_STEP, Bench

    first = os.environ.get("RANK", "0") == "0"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    with tempfile.TemporaryDirectory(prefix="grace-bench-") as folder:
        made = Bench(shapes, where, Path(folder), repeats=repeats, recompute=recompute)
        if profile is not None:
            text = made.profile(profile)
            if first:
                _write(output, f"profile-{profile}.txt", text)
                console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        names = rows.split(",") if rows else made.names if alone else [TRAINING_STEP]
        table: BenchTable | None = None
        for table in made.run(names):
            if one_gpu is not None:
                table = table.compared_with(one_gpu)
            if first:
                write_result(output, "bench", table.to_json(), table.to_markdown())
                _show(table.lines[-1])
    assert table is not None, "a bench has at least one row"
    if first:
        console.print(table.to_rich())
    if table.failed:
        raise typer.Exit(1)


@bench.command(
    "checkpoint",
    epilog="Example: grace bench checkpoint student runs/random/student --shapes real",
)
def checkpoint(
    role: Annotated[
        Literal["teacher", "student"], typer.Argument(help="Which model.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    shapes: ShapesOption = "real",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the weights.")] = 0,
) -> None:
    """Write a checkpoint of random weights: an ordinary Hugging Face folder.

    The real teacher takes 17.5 GB, the real student 4.3 GB. Its tokenizer is the
    toy one with Qwen's control tokens at their published ids.
    """
    from grace_core.bench.device import bench_device
    from grace_core.bench.random_models import save_random_checkpoint
    from grace_core.bench.shapes import SHAPES

    save_random_checkpoint(folder, SHAPES[shapes], role, bench_device(device), seed=seed)
    typer.echo(folder)


@bench.command(
    epilog="Example, on one H200:\n\n"
    "GRACE_CHECKPOINTS=/dev/shm/random grace bench pipeline configs/real-size.yaml "
    "--random-checkpoints",
)
def pipeline(
    config: ConfigFile,
    settings: Settings = None,
    random_checkpoints: Annotated[
        bool,
        typer.Option(
            "--random-checkpoints",
            help="Write the models of random weights first, at real size, where the configuration "
            "names folders that are not there.",
        ),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for pipeline.json and pipeline.md.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Run every stage up to the evaluation, and note what each takes.

    Time, peak of GPU memory and size on disk of each stage. Finished stages are
    found, not run again: name a new run_dir to measure them.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    resolved = load_config(config, settings or [])
    from grace_core.artifacts import environment
    from grace_core.bench.pipeline import PipelineCosts, StageMeter
    from grace_core.cli.chain import Chain

    meter = StageMeter()
    if random_checkpoints:
        with meter.beside("checkpoints") as cost:
            cost.bytes = _write_missing_checkpoints(resolved)
    try:
        Chain(resolved, meter).evaluations()
    finally:  # what was measured before a failure is worth having
        costs = PipelineCosts(resolved.name, environment(), meter.costs)
        write_result(output, "pipeline", costs.to_json(), costs.to_markdown())
        console.print(costs.to_rich())


@bench.command(epilog="Example, about a minute on one H200: grace bench memory")
def memory(
    shapes: ShapesOption = "real",
    device: DeviceOption = "auto",
    output: Annotated[Path, typer.Option(help="Folder for memory.json and memory.md.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Measure the memory of trainings beside the estimate of `grace check`.

    BF16 and W4, all layers recomputed and none, under ZeRO-1 and ZeRO-2 on one
    GPU; two optimizer steps each, on random weights. On a CPU nothing is measured.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    from grace_core.bench.device import bench_device

    where = bench_device(device)
    os.environ["DS_ACCELERATOR"] = where.type  # DeepSpeed chooses on import
    from grace_core.artifacts import environment
    from grace_core.bench.memory import MemoryTable, measurements
    from grace_core.bench.shapes import SHAPES
    from grace_core.bench.workbench import Workbench

    found = MemoryTable(environment(), [])
    with tempfile.TemporaryDirectory(prefix="grace-bench-") as folder:
        made = Workbench(SHAPES[shapes], where, Path(folder) / "bench")
        for one in measurements(made, Path(folder)):
            found.measurements.append(one)
            write_result(output, "memory", found.to_json(), found.to_markdown())
    console.print(found.to_rich())


@bench.command(
    epilog="Examples:\n\n"
    "grace bench evaluation                               about 2 minutes on one H200\n\n"
    "grace bench evaluation --shapes toy --device cpu     half a minute, on any machine",
)
def evaluation(
    shapes: ShapesOption = "real",
    device: DeviceOption = "auto",
    questions: Annotated[
        int, typer.Option(min=4, help="Questions to the engine; long answers: a quarter.")
    ] = 512,
    one_at_a_time: Annotated[
        int, typer.Option(min=4, help="Of these, questions to the loop; likewise a quarter.")
    ] = 16,
    dtype: Annotated[
        Literal["bfloat16", "float32"],
        typer.Option(help="Of weights and states. In float32 all answers must be the same."),
    ] = "bfloat16",
    output: Annotated[
        Path, typer.Option(help="Folder for evaluation.json and evaluation.md.")
    ] = Path("runs/bench"),
) -> None:
    """Measure how many questions a second the evaluation answers.

    The engine beside a loop that puts one question at a time to the library's
    generate, on random weights and pictures: letters, letters with four questions
    to a picture, and answers of 128 tokens.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch

    from grace_core.artifacts import environment
    from grace_core.bench.device import bench_device
    from grace_core.bench.evaluation import EvaluationBench, EvaluationTable
    from grace_core.bench.shapes import SHAPES

    where, versions = bench_device(device), environment()
    name = versions.get("gpu", versions["cpu"]) if where.type == "cuda" else versions["cpu"]
    found = EvaluationTable(shapes, name, versions)
    with tempfile.TemporaryDirectory(prefix="grace-bench-") as folder:
        made = EvaluationBench(SHAPES[shapes], where, Path(folder), getattr(torch, dtype))
        for rate in made.rates(questions, one_at_a_time):
            found.rates.append(rate)
            write_result(output, "evaluation", found.to_json(), found.to_markdown())
    console.print(found.to_rich())


@bench.command(
    epilog="Examples:\n\n"
    "grace bench convert                  the 2B shapes, 5 minutes and 8 GB of disk\n\n"
    "grace bench convert --shapes toy     seconds",
)
def convert(
    shapes: ShapesOption = "real",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of a conversion.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the models, on the disk that is to be measured; without, the "
            "folder for temporary files.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for convert.json and convert.md.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Measure how long packing a student takes, from disk to disk, and its memory.

    W4, W8 and W4 as AWQ, on this machine's CPU; packing alone beside a loop over
    columns, as in the published code.
    """
    from grace_core.artifacts import environment
    from grace_core.bench.conversion import (
        ConversionTable,
        measure_conversions,
        measure_packing,
    )
    from grace_core.bench.shapes import SHAPES

    cores = len(os.sched_getaffinity(0))
    found = ConversionTable(environment(), cores, [], [])
    with tempfile.TemporaryDirectory(prefix="grace-bench-", dir=folder) as place:
        found.packings = measure_packing(SHAPES[shapes], repeats=repeats)
        for one in measure_conversions(SHAPES[shapes], Path(place), repeats=repeats):
            found.conversions.append(one)
            write_result(output, "convert", found.to_json(), found.to_markdown())
    console.print(found.to_rich())


def _write_missing_checkpoints(config: GraceConfig) -> int:
    """Returns the bytes written."""
    from grace_core.bench.device import bench_device
    from grace_core.bench.random_models import save_random_checkpoint
    from grace_core.bench.shapes import REAL

    device = bench_device(config.launch.device)
    written = 0
    sources: dict[Role, str] = {
        "teacher": config.models.teacher.path,
        "student": config.models.student.path,
    }
    for seed, (role, path) in enumerate(sources.items()):
        folder = Path(path)
        if not folder.is_dir():
            save_random_checkpoint(folder, REAL, role, device, seed=seed)
            written += sum(file.stat().st_size for file in folder.iterdir())
    return written


def _show(line: Line) -> None:
    times = [
        f"{which} {measured.milliseconds:.4g} ms" if measured else f"{which} failed"
        for which, measured in (("ours", line.ours), ("plain", line.plain))
    ]
    text = f"{line.name}: {', '.join(times)}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def write_result(folder: Path, name: str, as_json: str, as_markdown: str) -> None:
    """The two files of a result, each whole at all times."""
    _write(folder, f"{name}.json", as_json)
    _write(folder, f"{name}.md", as_markdown)


def _write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / name, text)
