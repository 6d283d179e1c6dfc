"""Commands about benchmarks: which there are, and what of one is put to a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from grace_core.cli.app import app, console
from grace_core.errors import GraceError

if TYPE_CHECKING:
    from grace_core.evaluation.declaration import Benchmark
    from grace_core.evaluation.items import Item, Picture
    from grace_core.evaluation.loading.place import Wanted

benchmark = typer.Typer(
    no_args_is_help=True,
    help="The declared benchmarks: their data, licences and rules, and how they are asked.",
)
app.add_typer(benchmark, name="benchmark", rich_help_panel="Scoring")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@benchmark.command("list", epilog="Example: grace benchmark list")
def list_benchmarks(as_json: AsJson = False) -> None:
    """Every benchmark that a configuration may name under `evaluation.benchmarks`."""
    from grace_core.evaluation.benchmarks import BENCHMARKS

    rows = [_told(each) for each in BENCHMARKS.values()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    columns = ("name", "items", "answer", "headline", "data", "licence")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        right = column == "items"
        table.add_column(
            column, overflow="fold", no_wrap=column == "name", justify="right" if right else "left"
        )
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    console.print(table)


@benchmark.command(
    epilog="Examples:\n\n"
    "grace benchmark show mmmu                                as declared, from the Hub\n\n"
    "grace benchmark show mmbench --source data/MMBench_DEV_EN.tsv --prompt qwen3-vl\n\n"
    "grace benchmark show mmstar --source data/mmstar --items 1500 --json > items.jsonl",
)
def show(
    name: Annotated[
        str, typer.Argument(help="As `grace benchmark list` has it.", show_default=False)
    ],
    source: Annotated[
        str | None,
        typer.Option(
            help="File or folder of rows (parquet, TSV, JSON Lines, Arrow), or a data set of the "
            "Hub, instead of the declared one.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Configuration of the data set.", show_default=False)
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data set.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit of the data set.", show_default=False)
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures that rows name by path.", show_default=False),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Style of the prompts: llava, qwen3-vl, vlmevalkit or grace.")
    ] = "llava",
    items: Annotated[int, typer.Option(min=1, help="Items to show, from the first.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show a benchmark's first items as they are put to the model, with what is right.

    Columns are checked and every shown picture is decoded, so this also tells whether a data set
    can be used.
    """
    from grace_core.evaluation.benchmarks import find_benchmark
    from grace_core.evaluation.loading.place import locate
    from grace_core.evaluation.loading.rows import load_items
    from grace_core.evaluation.prompts import STYLES

    if prompt not in STYLES:
        raise GraceError(f"--prompt {prompt!r} is not known; use one of {', '.join(STYLES)}")
    declared = find_benchmark(name)
    place = locate(declared, _wanted(source, config, split, revision, pictures))
    found = load_items(declared, place, limit=items, style=STYLES[prompt])
    if as_json:
        for item in found:
            typer.echo(json.dumps(_plain(item), ensure_ascii=False))
        return
    say = f"{declared.title} from {place.description}, worded as {prompt}"
    console.print(say, markup=False, highlight=False, soft_wrap=True)
    columns = ", ".join(
        f"{column} ({each.type}{', scores' if each.scores else ''})"
        for column, each in declared.columns.items()
    )
    console.print(f"columns: {columns}", markup=False, highlight=False, soft_wrap=True)
    for item in found:
        _show(item, declared)


def _wanted(
    source: str | None,
    config: str | None,
    split: str | None,
    revision: str | None,
    pictures: Path | None,
) -> Wanted:
    from grace_core.evaluation.loading.place import Wanted

    here = source is not None and Path(source).expanduser().exists()
    if source is not None and not here and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise GraceError(
            f"--source {source} does not exist, and is no data set of the Hub (`owner/name`)"
        )
    if here and revision is not None:
        raise GraceError("--revision is a commit of the Hub; --source is on this machine")
    return Wanted(
        path=Path(source).expanduser() if source is not None and here else None,
        repository=None if here else source,
        config=config,
        split=split,
        revision=revision,
        pictures=pictures,
    )


def _told(declared: Benchmark) -> dict[str, Any]:
    source = declared.source
    data = "generated"
    if source is not None:
        parts = [source.repository, source.config or "", source.split]
        data = " ".join(part for part in parts if part)
    return {
        "name": declared.name,
        "title": declared.title,
        "items": "" if declared.rows is None else declared.rows,
        "answer": ", ".join(declared.max_new_tokens),
        "headline": declared.headline[0],
        "data": data,
        "licence": declared.licence,
        "columns": {name: column.type for name, column in declared.columns.items()},
        "rules": {rule.name: rule.source for rule in declared.rules},
    }


def _plain(item: Item) -> dict[str, Any]:
    gold = item.gold
    return {
        "id": item.id,
        "kind": gold.kind,
        "content": [
            part if isinstance(part, str) else _about(part) for part in item.question.content
        ],
        "choices": None if gold.choices is None else dict(gold.choices),
        "answers": list(gold.answers),
        "fields": dict(gold.fields),
    }


def _about(picture: Picture) -> dict[str, Any]:
    image = picture.open()
    return {"picture": picture.key, "width": image.width, "height": image.height}


def _show(item: Item, declared: Benchmark) -> None:
    budget = declared.max_new_tokens.get(item.gold.kind)
    console.rule(f"{item.id}  ({item.gold.kind}, at most {budget} tokens)")
    for part in item.question.content:
        if isinstance(part, str):
            console.print(part, markup=False, highlight=False, soft_wrap=True)
        else:
            told = _about(part)
            line = f"[picture {told['width']} x {told['height']}, {told['picture'][:12]}]"
            console.print(line, style="cyan", markup=False, highlight=False)
    right = " or ".join(item.gold.answers) or "not public"
    fields = ", ".join(f"{name} {value}" for name, value in item.gold.fields.items())
    line = f"right: {right}" + (f"   ({fields})" if fields else "")
    console.print(line, style="green", markup=False, highlight=False, soft_wrap=True)
