"""Stage `benchmarks`: the questions that every model of a run is asked, read and packed once.

It comes before all training, so that a wrong column or a picture that nobody can decode is known
while it costs nothing yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from grace_core.artifacts import Artifact, ArtifactWriter, Parent, fingerprint
from grace_core.config.evaluation import ChosenBenchmark, Evaluation
from grace_core.config.tree import GraceConfig
from grace_core.data.listing import listing_digest
from grace_core.data.sharegpt4v import UnusableRecord
from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import find_benchmark, is_generated
from grace_core.evaluation.items import Item, Picture
from grace_core.evaluation.loading.place import (
    Place,
    Wanted,
    declared_source,
    is_commit,
    locate,
    resolve_revision,
)
from grace_core.evaluation.loading.prepared import PicturePack, write_items
from grace_core.evaluation.loading.rows import load_questions
from grace_core.evaluation.loading.wanted import wanted
from grace_core.evaluation.prompts import STYLES
from grace_core.locks import sole_maker
from grace_core.stages.once import StageContext, once, progress
from grace_core.toy.world import write_benchmark
from grace_core.whole_files import write_whole

BENCHMARK_SEED = 1
"""The toy benchmarks are the same for every run, whatever the run's own seed."""

COMMITS_FILE = "benchmark-commits.json"
"""In run_dir: the commits of data sets that are not pinned, as they were first found. So one that
is edited while a run trains, or before its approval, is the same one to all of it."""

_MOST_THREADS = 8
_REPORTED = 100  # pictures between two reports
_SHOWN = 10  # pictures that cannot be decoded, of a list


def prepare_benchmarks(config: GraceConfig, context: StageContext) -> Artifact:
    """Stage `benchmarks`: a folder for each benchmark, to be read by `read_items`.

    A benchmark of the Hub is known by the commit that its revision was at when this run folder
    first asked, one on this machine by the names, sizes and times of its files; what was read from
    it, by content. The facts say where each came from, how it was worded and whether it was cut.

    Raises GraceError where rows do not fit the benchmark or a picture cannot be decoded: without an
    answer to every item a benchmark has no number.
    """
    settings = config.evaluation
    section: dict[str, Any] = {
        "questions": {each.name: each.items or settings.items for each in settings.benchmarks},
        "prompts": {each.name: each.prompt or settings.prompt for each in settings.benchmarks},
        "seed": BENCHMARK_SEED,
    }
    asked = {
        each: _at_commit(each, config.run_dir, context)
        for each in settings.benchmarks
        if not is_generated(each)
    }
    parents = {
        f"source-{each.name}": _source_parent(each, place, config.run_dir)
        for each, place in asked.items()
    }

    def make(writer: ArtifactWriter) -> None:
        with TemporaryDirectory() as made:
            if any(map(is_generated, settings.benchmarks)):
                write_benchmark(Path(made), seed=BENCHMARK_SEED)
            # All are found and downloaded before the first is read.
            places = {
                each: locate(
                    find_benchmark(each.name),
                    asked.get(each) or Wanted(path=Path(made) / each.name),
                )
                for each in settings.benchmarks
            }
            packed: dict[str, list[Item]] = {
                each.name: _pack(each, place, settings, writer) for each, place in places.items()
            }
        _open_pictures(packed, context)

    return once(config, context, "benchmarks", section, parents, make)


def _at_commit(chosen: ChosenBenchmark, run_dir: Path, context: StageContext) -> Wanted:
    """What is asked for, with the commit at which this run reads a data set of the Hub."""
    asked = wanted(chosen)
    if asked.path is not None or is_commit(asked.revision):
        return asked
    repository = declared_source(find_benchmark(chosen.name), asked).repository
    file, key = run_dir / COMMITS_FILE, f"{repository}@{asked.revision or 'main'}"
    known = _commits(file)
    if key not in known:
        if context.finished_only:
            raise GraceError(
                f"stage benchmarks is not done for this configuration: {file} has no commit of "
                f"{key}; run `grace evaluate CONFIG` with the same settings, or the deployment "
                "grace-evaluate/evaluate, and then this again"
            )
        with sole_maker(file):
            known = {key: resolve_revision(repository, asked.revision), **_commits(file)}
            write_whole(file, json.dumps(known, indent=1) + "\n")
    return replace(asked, revision=known[key])


def _commits(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    try:
        return {str(name): str(commit) for name, commit in json.loads(file.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise GraceError(
            f"{file} is damaged ({error}); remove it, and the newest commits are read"
        ) from error


def _pack(
    chosen: ChosenBenchmark, place: Place, settings: Evaluation, writer: ArtifactWriter
) -> list[Item]:
    folder = writer.path / chosen.name
    folder.mkdir()
    with PicturePack(folder) as pack:
        questions = load_questions(
            find_benchmark(chosen.name),
            place,
            limit=chosen.items or settings.items,
            style=STYLES[chosen.prompt or settings.prompt],
            store=pack,
        )
    write_items(questions.items, folder)
    writer.metrics[f"{chosen.name}/items"] = float(len(questions.items))
    writer.metrics[f"{chosen.name}/pictures"] = float(pack.count)
    writer.facts[chosen.name] = {
        "repository": place.repository,
        "revision": place.revision,
        "config": place.config,
        "split": place.split,
        "prompt": None if is_generated(chosen) else chosen.prompt or settings.prompt,
        "part": questions.part,
        "declared": _is_declared(chosen, place),
    }
    return questions.items


def _is_declared(chosen: ChosenBenchmark, place: Place) -> bool:
    """Whether the rows are those of the place that the benchmark declares."""
    source = find_benchmark(chosen.name).source
    return source is not None and (source.repository, source.config, source.split) == (
        place.repository,
        place.config,
        place.split,
    )


def _open_pictures(packed: Mapping[str, list[Item]], context: StageContext) -> None:
    """Decode every packed picture once. Raises GraceError naming those that cannot be."""
    pictures = {
        picture.key: (f"{name}, item {item.id!r}", picture)
        for name, items in packed.items()
        for item in items
        for picture in item.question.pictures
    }

    def problem_of(place: tuple[str, Picture]) -> str | None:
        where, picture = place
        try:
            picture.open()
        except UnusableRecord as error:
            return f"{where}: {error}"
        return None

    problems: list[str] = []
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="pictures") as pool:
        for done, problem in enumerate(pool.map(problem_of, pictures.values()), start=1):
            if problem is not None:
                problems.append(problem)
            if done % _REPORTED == 0 or done == len(pictures):
                values = {"done": float(done), "total": float(len(pictures))}
                context.on_event(progress("benchmarks", done, values))
    if problems:
        shown = "\n  ".join([*problems[:_SHOWN], *(["..."] if len(problems) > _SHOWN else [])])
        raise GraceError(
            f"{len(problems)} of {len(pictures)} pictures of the benchmarks cannot be decoded, and "
            "without an answer to every item a benchmark has no number; mend or download the "
            f"files again, or leave the benchmark out of evaluation.benchmarks:\n  {shown}"
        )


def _source_parent(chosen: ChosenBenchmark, asked: Wanted, run_dir: Path) -> Parent:
    what = {"config": chosen.config, "split": chosen.split}
    if asked.path is None:
        source = declared_source(find_benchmark(chosen.name), asked)
        what |= {"repository": source.repository, "config": source.config, "split": source.split}
        return Parent(
            kind="benchmark",
            path=source.repository,
            digest=fingerprint("benchmark", {**what, "revision": asked.revision}, {}),
            revision=asked.revision,
        )
    if not asked.path.exists():
        raise GraceError(f"{chosen.name}: {asked.path} does not exist; mend its `path`")
    pictures = asked.pictures
    state = {
        "rows": _state_of(asked.path, run_dir),
        "pictures": None if pictures is None else _state_of(pictures, run_dir),
    }
    return Parent(
        kind="benchmark",
        path=str(asked.path),
        digest=fingerprint("benchmark", {**what, **state}, {}),
    )


def _state_of(path: Path, run_dir: Path) -> str:
    """Of a folder its listing, of a file its size and time: reading it all would take too long."""
    if path.is_dir():
        return listing_digest(path, run_dir)
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"
