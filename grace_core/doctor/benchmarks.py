"""The benchmarks: their rows are here or can be had, and the first ones fit their declaration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grace_core.config.evaluation import ChosenBenchmark
from grace_core.config.tree import GraceConfig
from grace_core.doctor.findings import Finding, ok, problem, warning
from grace_core.errors import GraceError

AREA = "benchmarks"

_REMEDY = "mend evaluation.benchmarks; `grace benchmark show NAME` tries a place"
_SAMPLE = 2
"""Items that are read of each benchmark on this machine, pictures included."""


def missing_benchmarks(config: GraceConfig) -> Iterator[Finding]:
    """Benchmarks that are not at the path that is given, and those of the Hub without a commit."""
    unpinned = []
    for each in config.evaluation.benchmarks:
        if each.path is not None:
            if not Path(each.path).expanduser().exists():
                text = f"evaluation.benchmarks: {each.name}: not on this machine: {each.path}"
                yield problem(AREA, text, "set its path, or leave it out to use the Hub")
        elif not _is_generated(each) and each.revision is None:
            unpinned.append(each.name)
    if unpinned:
        yield warning(
            AREA,
            f"evaluation.benchmarks: {', '.join(unpinned)} come from the Hub as they are that day",
            "pin `revision` to a commit of each, for scores that can be compared later",
        )


def check_benchmarks(config: GraceConfig) -> Iterator[Finding]:
    """What a run would read: first items of what is here, and whether the Hub has the rest."""
    missing = [*missing_benchmarks(config)]
    yield from missing
    if any(finding.severity == "problem" for finding in missing):
        return
    for each in config.evaluation.benchmarks:
        if not _is_generated(each):
            yield _looked_up(each) if each.path is None else _read(each, config)


def _is_generated(chosen: ChosenBenchmark) -> bool:
    from grace_core.evaluation.benchmarks import find_benchmark

    source = find_benchmark(chosen.name).source
    return source is None and chosen.path is None and chosen.repository is None


def _read(chosen: ChosenBenchmark, config: GraceConfig) -> Finding:
    from grace_core.data.sharegpt4v import UnusableRecord
    from grace_core.evaluation.benchmarks import find_benchmark
    from grace_core.evaluation.loading.place import locate
    from grace_core.evaluation.loading.rows import load_items
    from grace_core.evaluation.loading.wanted import wanted
    from grace_core.evaluation.prompts import STYLES

    declared = find_benchmark(chosen.name)
    style = STYLES[chosen.prompt or config.evaluation.prompt]
    try:
        items = load_items(declared, locate(declared, wanted(chosen)), limit=_SAMPLE, style=style)
        for item in items:
            for picture in item.question.pictures:
                picture.open()
    except (GraceError, UnusableRecord, OSError) as error:
        return problem(AREA, f"{chosen.name}: {error}", _REMEDY)
    return ok(AREA, f"{chosen.name}: the first {len(items)} items of {chosen.path} are sound")


def _looked_up(chosen: ChosenBenchmark) -> Finding:
    from grace_core.evaluation.benchmarks import find_benchmark
    from grace_core.evaluation.loading.place import commit_on_hub, declared_source
    from grace_core.evaluation.loading.wanted import wanted

    asked = wanted(chosen)
    try:
        source = declared_source(find_benchmark(chosen.name), asked)
        commit = commit_on_hub(source.repository, asked.revision)
    except GraceError as error:
        return problem(AREA, f"{chosen.name}: {error}", _REMEDY)
    return ok(AREA, f"{chosen.name}: {source.repository} at {commit[:12]} can be had")
