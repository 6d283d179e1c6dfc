"""First task of every flow: what `grace doctor` checks, shown in Prefect, before anything works."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from grace_core.config import GraceConfig
from grace_core.doctor.findings import Finding, NotReady, Severity, as_rows, problems, summary
from grace_core.plan import Goal
from operations.doctor import examine_all
from operations.servers import ServerAway

_SHOWN = {Severity.WARNING, Severity.UNCHECKED}


class ServersAway(NotReady):
    """Nothing is wrong but that a server does not answer, which may pass."""


def _may_pass(_: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.result(raise_on_failure=False), ServersAway)


@task(
    task_run_name="examine",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=3,
    retry_delay_seconds=[5, 20, 60],
    retry_condition_fn=_may_pass,
)
def examine(config: GraceConfig, goal: Goal) -> list[Finding]:
    """Everything that a run up to `goal` needs; problems are left to the caller.

    Raises ServersAway, after a few more attempts, where servers that do not answer are all that is
    wrong.
    """
    findings = examine_all(config, goal)
    create_table_artifact(as_rows(findings), key="doctor", description=summary(findings))
    logger = get_run_logger()
    for finding in findings:
        if finding.severity in _SHOWN:
            logger.warning("%s: %s", finding.area, finding.sentence)
    found = problems(findings)
    if found and all(isinstance(finding, ServerAway) for finding in found):
        raise ServersAway(found)
    return findings
