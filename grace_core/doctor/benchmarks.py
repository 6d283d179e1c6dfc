"""The benchmarks: their rows are here or can be had, and the first ones fit their declaration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grace_core.config.evaluation import ChosenBenchmark
from grace_core.config.tree import GraceConfig
from grace_core.doctor.findings import Finding, ok, problem, warning
from grace_core.errors import GraceError

AREA = "benchmarks"

_REMEDY = "mend evaluation.benchmarks; `grace benchmark show NAME` tries a place"
_SAMPLE = 2
"""Items that are read of each benchmark on this machine, pictures included."""


@dataclass(frozen=True)
class Size:
    """Of one benchmark's files, in bytes."""

    name: str
    packed: float | None = None
    """At most, as the run keeps it; None: not known."""

    missing: float | None = None
    """Still to be downloaded to the Hub's cache; None: not known."""


def missing_benchmarks(config: GraceConfig) -> Iterator[Finding]:
    """Benchmarks that are not at the path that is given, those of the Hub without a commit, and
    those that are asked in part."""
    from grace_core.evaluation.benchmarks import is_generated

    unpinned = []
    for each in config.evaluation.benchmarks:
        if each.path is not None:
            if not Path(each.path).expanduser().exists():
                text = f"evaluation.benchmarks: {each.name}: not on this machine: {each.path}"
                yield problem(AREA, text, "set its path, or leave it out to use the Hub")
        elif not is_generated(each) and each.revision is None:
            unpinned.append(each.name)
    if unpinned:
        yield warning(
            AREA,
            f"evaluation.benchmarks: {', '.join(unpinned)} come from the Hub as they are that day",
            "pin `revision` to a commit of each, for scores that can be compared later",
        )
    limited = [
        each.name
        for each in config.evaluation.benchmarks
        if (each.items or config.evaluation.items) is not None and not is_generated(each)
    ]
    if limited and config.publish.enabled and config.evaluation.gate.complete:
        yield warning(
            AREA,
            f"evaluation.items: a part is asked of {', '.join(limited)}, and the regression gate "
            "lets no part of a benchmark pass",
            "for a run that is to publish, leave `items` out",
        )


def check_benchmarks(config: GraceConfig) -> tuple[list[Finding], list[Size]]:
    """What a run would read: first items of what is here, and whether the Hub has the rest.

    Sizes are of all but the generated ones.
    """
    from grace_core.evaluation.benchmarks import is_generated

    found = [*missing_benchmarks(config)]
    chosen = [each for each in config.evaluation.benchmarks if not is_generated(each)]
    if any(finding.severity == "problem" for finding in found):
        return found, [Size(each.name) for each in chosen]
    sizes = []
    for each in chosen:
        look = _looked_up if each.path is None else _read
        finding, size = look(each, config)
        found.append(finding)
        sizes.append(size)
    return found, sizes


def _read(chosen: ChosenBenchmark, config: GraceConfig) -> tuple[Finding, Size]:
    from grace_core.data.sharegpt4v import UnusableRecord
    from grace_core.evaluation.benchmarks import find_benchmark
    from grace_core.evaluation.loading.place import locate
    from grace_core.evaluation.loading.rows import load_items
    from grace_core.evaluation.loading.wanted import wanted
    from grace_core.evaluation.prompts import STYLES

    declared = find_benchmark(chosen.name)
    style = STYLES[chosen.prompt or config.evaluation.prompt]
    try:
        place = locate(declared, wanted(chosen))
        items = load_items(declared, place, limit=_SAMPLE, style=style)
        for item in items:
            for picture in item.question.pictures:
                picture.open()
    except (GraceError, UnusableRecord, OSError) as error:
        return problem(AREA, f"{chosen.name}: {error}", _REMEDY), Size(chosen.name)
    size = sum(file.stat().st_size for file in (*place.files, *place.picture_files))
    text = f"{chosen.name}: the first {len(items)} items of {chosen.path} are sound"
    return ok(AREA, text), Size(chosen.name, size * _share(chosen, config), 0)


def _looked_up(chosen: ChosenBenchmark, config: GraceConfig) -> tuple[Finding, Size]:
    from grace_core.evaluation.benchmarks import find_benchmark
    from grace_core.evaluation.loading.place import declared_source, look_up
    from grace_core.evaluation.loading.wanted import wanted

    declared, asked = find_benchmark(chosen.name), wanted(chosen)
    try:
        repository = declared_source(declared, asked).repository
        offer = look_up(declared, asked)
    except GraceError as error:
        return problem(AREA, f"{chosen.name}: {error}", _REMEDY), Size(chosen.name)
    packed = None if offer.size is None else offer.size * _share(chosen, config)
    text = f"{chosen.name}: {repository} at {offer.commit[:12]} can be had"
    return ok(AREA, text), Size(chosen.name, packed, offer.missing)


def _share(chosen: ChosenBenchmark, config: GraceConfig) -> float:
    """Of the items that are asked, in [0, 1]."""
    from grace_core.evaluation.benchmarks import find_benchmark

    items, rows = chosen.items or config.evaluation.items, find_benchmark(chosen.name).rows
    return 1.0 if items is None or rows is None else min(1.0, items / rows)
