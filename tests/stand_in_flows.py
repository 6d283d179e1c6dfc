"""The deployed flows with stand-in stages, for a worker's process: `tests.stand_in_flows.NAME`.

Importing this module installs the stand-ins for good, so it is only imported in a process that runs
one flow. Everything else is real: the deployment, the worker, the flow, its tasks, the tracking.
"""

from __future__ import annotations

from flows.pipeline import grace
from flows.stages import data, distill, evaluate, publish, quantize, release
from grace_core import stages
from tests.stand_in_stages import StandIns

__all__ = ["data", "distill", "evaluate", "grace", "publish", "quantize", "release"]

vars(stages).update(StandIns().functions())
