"""What a scheduled run starts with: a look at whether there is anything new to learn from."""

from __future__ import annotations

from typing import cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed

from grace_core.config import GraceConfig
from grace_core.stages.inputs import Comparison, compare_inputs, record_inputs
from operations.flow_run_states import NOTHING_NEW
from tasks.tracked import StageRef


@task(task_run_name="inputs", cache_policy=NO_CACHE, persist_result=False)
def look_at_inputs(config: GraceConfig) -> Comparison:
    """Compare data and teacher with what the last completed scheduled run found."""
    found = compare_inputs(config)
    get_run_logger().info("Inputs: %s", found.describe())
    return found


@task(task_run_name="remember-inputs", cache_policy=NO_CACHE, persist_result=False)
def remember_inputs(config: GraceConfig, inputs: Comparison) -> None:
    """Called when everything else is done, so that a run that failed is tried again."""
    record_inputs(config, inputs.now)


def nothing_new(inputs: Comparison) -> StageRef:
    """The final state of a flow run that has nothing to do, saying what was compared."""
    message = f"neither data nor teacher changed: {inputs.describe()}"
    # Prefect takes a state that a flow returns as the flow run's own.
    return cast(StageRef, Completed(name=NOTHING_NEW, message=message, data=inputs.now))
