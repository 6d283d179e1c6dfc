"""The place of a benchmark's rows, as a configuration names it."""

from __future__ import annotations

from pathlib import Path

from grace_core.config.evaluation import ChosenBenchmark
from grace_core.config.load import require_environment
from grace_core.evaluation.loading.place import Wanted


def wanted(chosen: ChosenBenchmark) -> Wanted:
    """Raises GraceError where a path needs an environment variable that is not set."""
    for key in ("path", "pictures"):
        require_environment(getattr(chosen, key) or "", f"evaluation.benchmarks.{key}")
    return Wanted(
        path=_path(chosen.path),
        repository=chosen.repository,
        config=chosen.config,
        split=chosen.split,
        revision=chosen.revision,
        pictures=_path(chosen.pictures),
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
