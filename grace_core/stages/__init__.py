"""The stages of the pipeline, each a function from configuration and artifacts to an artifact.

A stage first looks whether its artifact exists (same configuration section, same parents, same
package version) and returns it at once. Otherwise it works, and the artifact's directory gets its
name only when everything in it is whole. Prefect tasks and the command line call the same
functions; nothing here knows either.
"""

from grace_core.stages.data import generate_benchmarks, generate_world, prepare_data
from grace_core.stages.evaluation import evaluate
from grace_core.stages.once import StageContext
from grace_core.stages.publishing import find_publication, publish
from grace_core.stages.release import release
from grace_core.stages.training import distill, fit_teacher, quantize

__all__ = [
    "StageContext",
    "distill",
    "evaluate",
    "find_publication",
    "fit_teacher",
    "generate_benchmarks",
    "generate_world",
    "prepare_data",
    "publish",
    "quantize",
    "release",
]
