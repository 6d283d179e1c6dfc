"""The stages of the pipeline, each a function from configuration and artifacts to an artifact.

A stage first looks whether its artifact exists (same configuration section, same parents, same
package version) and returns it at once. Otherwise it works, and the artifact's directory gets its
name only when everything in it is whole. Prefect tasks and the command line call the same
functions; nothing here knows either.

A stage's module is imported when the stage is first asked for: what they need takes seconds to
import, and a flow run that finds nothing to do needs none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grace_core.stages.once import StageContext

if TYPE_CHECKING:
    from grace_core.stages.benchmarks import prepare_benchmarks
    from grace_core.stages.data import generate_world, prepare_data
    from grace_core.stages.evaluation import evaluate
    from grace_core.stages.publishing import find_publication, publish
    from grace_core.stages.releasing import release
    from grace_core.stages.reporting import report
    from grace_core.stages.training import distill, fit_teacher, quantize, record_teacher

__all__ = [
    "StageContext",
    "distill",
    "evaluate",
    "find_publication",
    "fit_teacher",
    "generate_world",
    "prepare_benchmarks",
    "prepare_data",
    "publish",
    "quantize",
    "record_teacher",
    "release",
    "report",
]

_MODULES = {
    "prepare_benchmarks": "benchmarks",
    **dict.fromkeys(("generate_world", "prepare_data"), "data"),
    "evaluate": "evaluation",
    **dict.fromkeys(("find_publication", "publish"), "publishing"),
    "release": "releasing",
    "report": "reporting",
    **dict.fromkeys(("distill", "fit_teacher", "quantize", "record_teacher"), "training"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
