"""A person's word before anything is published: who asks, how, and what the answer leads to.

Publishing is a flow of its own, so that nothing holds GPUs while a person thinks.
"""

from __future__ import annotations

from typing import Annotated, cast

from mlflow import MlflowClient
from prefect import get_client, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import FlowPauseTimeout, ObjectNotFound
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.states import Completed, Running
from prefect.utilities.urls import url_for
from pydantic import Field, StringConstraints

from grace_core import stages
from grace_core.config import GraceConfig
from grace_core.doctor.findings import Severity, require_no_problem
from grace_core.errors import GraceError
from grace_core.publish.approval import Approval
from grace_core.publish.release_set import destination_of, table_of
from operations.flow_run_states import REJECTED
from operations.publishing_rights import check_token_of_publisher
from tasks.tracked import StageRef

PUBLISHER = "grace-publish/publish"
_LOOK_SECONDS = 5
_SECONDS_A_DAY = 86400


class ApprovalForm(RunInput):
    """The form that a waiting publication shows in Prefect."""

    approve: bool = Field(description="Publish these models?")
    reviewer: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] = Field(
        description="Your name; it is recorded with the models."
    )
    note: str = Field("", max_length=2000, description="What you looked at, or why not.")


def approval_needed(config: GraceConfig) -> bool:
    return config.publish.enabled and config.publish.approval


def require_publisher(config: GraceConfig) -> None:
    """Raise before any work unless the deployment that asks is there and its token may publish."""
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(PUBLISHER)
        except ObjectNotFound:
            raise GraceError(
                f"publish.approval is true, but there is no deployment {PUBLISHER} to ask for it; "
                "run `grace setup`, or set publish.approval=false"
            ) from None
    findings = list(check_token_of_publisher(config))
    require_no_problem(findings)
    for finding in findings:
        if finding.severity in (Severity.WARNING, Severity.UNCHECKED):
            get_run_logger().warning("%s: %s", finding.area, finding.sentence)


@task(task_run_name="request-publication", cache_policy=NO_CACHE, persist_result=False)
def request_publication(run: str, config: str, overrides: list[str]) -> None:
    """Start the flow that asks a person and publishes; this flow run does not wait for it.

    A flow run that is tried again finds the one that it has started.
    """
    started = cast(
        FlowRun,
        run_deployment(
            PUBLISHER,
            parameters={"config": config, "overrides": overrides},
            timeout=0,
            as_subflow=False,
            idempotency_key=f"publication of {runtime.flow_run.id}",
        ),
    )
    address = url_for("flow-run", obj_id=started.id)
    get_run_logger().warning("Flow run %s asks for an approval: %s", started.name, address)
    create_markdown_artifact(
        f"Flow run [{started.name}]({address}) of `{PUBLISHER}` asks a person and publishes.",
        key="publication",
        description="Where the publication waits for approval",
    )
    MlflowClient().set_tag(run, "grace.publication_flow_run", str(started.id))


def decide(
    config: GraceConfig,
    run: str,
    releases: dict[str, StageRef],
    evaluations: dict[str, StageRef],
    *,
    ask: bool,
    days: float,
) -> tuple[bool, Approval | None]:
    """Show what would be published and wait for a person's word; True lets the flow go on.

    Nobody is asked where nothing would be sent (publishing is off, or all of it is there already)
    or where the question is switched off.

    Raises GraceError when nobody answers within that many days.
    """
    releases_made = {label: ref.artifact() for label, ref in releases.items()}
    scored = {label: ref.artifact() for label, ref in evaluations.items()}
    table = table_of(scored).to_markdown()
    places = "\n".join(f"- {label}: {destination_of(config, label)}" for label in releases)
    create_markdown_artifact(
        f"# {config.publish.name}\n\n{table}\n\n## Where it goes\n\n{places}\n",
        key="approval",
        description="What is to be published, and what it scores",
    )
    logger = get_run_logger()
    if not config.publish.enabled:
        logger.info("publish.enabled is false: nothing is sent, and nobody is asked")
        return True, None
    if stages.find_publication(config, releases_made, scored) is not None:
        logger.info("All of it is published already, and nobody is asked")
        return True, None
    if not ask:
        approval = Approval.now("nobody, the question was switched off")
        _tag(run, "not asked", approval)
        return True, approval
    answer = _answer(f"{table}\n\n{places}", days)
    approval = Approval.now(answer.reviewer, answer.note)
    _tag(run, "approved" if answer.approve else "rejected", approval)
    logger.info("%s by %s", "Approved" if answer.approve else "Rejected", approval.by)
    return answer.approve, approval


def rejected(approval: Approval | None) -> StageRef:
    """The final state of a publication that a person refused."""
    assert approval is not None, "a refusal has its person"
    note = f": {approval.note}" if approval.note else ""
    state: State[Approval] = Completed(
        name=REJECTED, message=f"refused by {approval.by}{note}", data=approval
    )
    # Prefect takes a state that a flow returns as the flow run's own.
    return cast(StageRef, state)


def _tag(run: str, decision: str, approval: Approval) -> None:
    client = MlflowClient()
    client.set_tag(run, "grace.approval", decision)
    for name, value in approval.model_dump().items():
        client.set_tag(run, f"grace.approval.{name}", value)


def _answer(description: str, days: float) -> ApprovalForm:
    form = ApprovalForm.with_initial_data(description=description)
    try:
        return pause_flow_run(
            wait_for_input=form,
            timeout=round(days * _SECONDS_A_DAY),
            poll_interval=_LOOK_SECONDS,
            key="approval",
        )
    except FlowPauseTimeout:
        # The server would answer any other end of an overdue pause with its own, mute, message.
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(runtime.flow_run.id, Running(), force=True)
        raise GraceError(
            f"nobody answered within {days:g} days, and nothing was published; run the deployment "
            f"{PUBLISHER} again to ask again"
        ) from None
