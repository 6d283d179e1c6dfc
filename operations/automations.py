"""Automations of the Prefect server: runs that died unseen are ended, people are told of failures.

Prefect marks a run Crashed itself where the worker lives to see its process end. Where the machine
or the worker died too, only missing heartbeats tell; the open-source server acts on them only if an
automation says so.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification

from operations.flow_run_states import NOTHING_NEW, REJECTED, STAGE_LABEL

ZOMBIES = "grace: end runs without heartbeats"
STUCK = "grace: end runs that never start"
NOTIFY = "grace: tell of runs that ended"

HEARTBEAT_SECONDS = 30  # the least that Prefect allows; set in configs/work-pools
# Four heartbeats: a run whose server was away for a minute is not taken for dead.
ZOMBIE_AFTER = timedelta(seconds=4 * HEARTBEAT_SECONDS)
# A flow's process imports its libraries first (10 s from a local disk).
STUCK_AFTER = timedelta(seconds=120)

_FAILURES = ("Failed", "Crashed", "TimedOut")
_ENDS = (*_FAILURES, "Completed", "Cancelled", NOTHING_NEW, REJECTED)
_OUR_FLOWS = {"prefect.resource.role": "flow", "prefect.resource.name": ["grace", "grace-*"]}
_RUNS = {"prefect.resource.id": "prefect.flow-run.*"}


def zombie_automation() -> AutomationCore:
    """Runs that stopped sending heartbeats become Crashed.

    A run that has ended is left alone: the server refuses to crash it. One that was taken for dead
    while it worked, as after a long outage of the server, still ends as it ends.
    """
    seconds = round(ZOMBIE_AFTER.total_seconds())
    return _crash_unless(
        ZOMBIES,
        "A machine that dies says nothing; its runs' heartbeats stop.",
        after="heartbeat",
        expected=("heartbeat", *_ENDS),
        within=ZOMBIE_AFTER,
        message=f"No heartbeat for {seconds} s: the process, its worker or its machine died. Run "
        "it again: finished stages are kept, a training continues from its last checkpoint.",
    )


def stuck_automation() -> AutomationCore:
    """Runs that a worker took and never started become Crashed, and free their queue."""
    seconds = round(STUCK_AFTER.total_seconds())
    return _crash_unless(
        STUCK,
        "A worker that dies between taking a run and starting it leaves a pending run, which "
        "counts against the queue's limit.",
        after="Pending",
        expected=("Running", "Cancelling", "Scheduled", *_ENDS),
        within=STUCK_AFTER,
        message=f"Taken by a worker and not started within {seconds} s: the worker died. Run it "
        "again.",
    )


def standing_automations() -> tuple[AutomationCore, ...]:
    """Those that every server needs."""
    return zombie_automation(), stuck_automation()


def notification_automation(block_document_id: UUID, *, completed: bool) -> AutomationCore:
    """A message through a notification block when a run fails, crashes or times out.

    completed: also when a run completes, or a person refuses a publication.
    """
    ends = (*_FAILURES, "Completed", REJECTED) if completed else _FAILURES
    stage = f"flow_run.labels.get('{STAGE_LABEL}', 'none yet')"
    return AutomationCore(
        name=NOTIFY,
        description="Made by `grace setup --notify`.",
        trigger=EventTrigger(
            match=_RUNS,
            match_related=_OUR_FLOWS,
            for_each={"prefect.resource.id"},
            expect=_events(ends),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block_document_id,
                subject="{{ flow.name }}: {{ flow_run.state.name }}",
                body="Flow run {{ flow_run.name }} of {{ flow.name }} ended as "
                "{{ flow_run.state.name }}.\n"
                f"Last stage: {{{{ {stage} }}}}\n"
                "{{ flow_run.state.message or '' }}\n"
                "{{ flow_run|ui_url }}",
            )
        ],
    )


def _crash_unless(
    name: str,
    why: str,
    *,
    after: str,
    expected: tuple[str, ...],
    within: timedelta,
    message: str,
) -> AutomationCore:
    """Crash a run of ours to which, `within` so long `after` an event, none of `expected` came."""
    return AutomationCore(
        name=name,
        description=f"Made by `grace setup`. {why}",
        trigger=EventTrigger(
            match=_RUNS,
            match_related=_OUR_FLOWS,
            for_each={"prefect.resource.id"},
            after=_events((after,)),
            expect=_events(expected),
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )


def _events(names: tuple[str, ...]) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}
