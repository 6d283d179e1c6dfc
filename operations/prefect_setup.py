"""`grace setup`: what a Prefect server needs before it can run the flows.

Every step looks first and changes only what differs, so that it can be called again at any time:
after an update of the project, or to have another limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from httpx import ConnectError, HTTPError
from prefect import get_client
from prefect.automations import AutomationCore
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from grace_core.errors import GraceError
from operations.automations import notification_automation, standing_automations
from operations.servers import shown_address

GPU_POOL, CPU_POOL = "grace-gpu", "grace-cpu"
TRAIN_QUEUE = "train"

_TEMPLATES = Path("configs/work-pools")
_PURPOSE = {
    GPU_POOL: "Trains, and scores what was trained. One worker on each machine with GPUs.",
    CPU_POOL: "Prepares data, asks for approvals and publishes. One worker, no GPU.",
}
_SHOWN_LINES = 15
_COMPARED = (  # what of a deployment prefect.yaml decides
    *("description", "entrypoint", "parameters", "tags", "work_pool_name", "work_queue_name"),
    *("job_variables", "pull_steps", "enforce_parameter_schema", "parameter_openapi_schema"),
)


@dataclass(frozen=True)
class Step:
    """One thing that the server has now, and what was done to get there."""

    what: str
    change: Literal["created", "updated", "unchanged"]
    note: str = ""


@contextmanager
def prefect_server() -> Iterator[SyncPrefectClient]:
    """A client of the configured server; raises GraceError unless it answers."""
    address = shown_address(PREFECT_API_URL.value() or "")
    if not address:
        raise GraceError(
            "PREFECT_API_URL is not set, so there is no server to set up; export it, for instance "
            "http://127.0.0.1:4200/api, and start the server with `prefect server start`"
        )
    try:
        with get_client(sync_client=True) as client:
            client.hello().raise_for_status()
            yield client
    except ConnectError as error:
        raise GraceError(
            f"no Prefect server answers at PREFECT_API_URL ({address}): {error}; start it with "
            "`prefect server start`, or correct the address"
        ) from error
    except HTTPError as error:
        raise GraceError(f"the Prefect server at {address} answered: {error}") from error


class Setup:
    """The steps, against one server. project: the folder that holds prefect.yaml."""

    def __init__(self, client: SyncPrefectClient, project: Path, *, dry_run: bool = False) -> None:
        self._client = client
        self._project = project
        self._dry_run = dry_run

    def pool(self, name: str) -> Step:
        """A process work pool with the template in configs/work-pools."""
        file = self._project / _TEMPLATES / f"{name}.json"
        template = json.loads(file.read_text(encoding="utf-8"))
        purpose, what = _PURPOSE[name], f"work pool {name}"
        try:
            found = self._client.read_work_pool(name)
        except ObjectNotFound:
            if not self._dry_run:
                self._client.create_work_pool(
                    WorkPoolCreate(
                        name=name,
                        type="process",
                        description=purpose,
                        base_job_template=template,
                    )
                )
            return Step(what, "created")
        if found.type != "process":
            raise GraceError(
                f"work pool {name} exists with type {found.type}, and a pool's type cannot be "
                f"changed; delete it with `prefect work-pool delete {name}` and run this again"
            )
        if found.base_job_template == template and found.description == purpose:
            return Step(what, "unchanged")
        if not self._dry_run:
            self._client.update_work_pool(
                name, WorkPoolUpdate(description=purpose, base_job_template=template)
            )
        return Step(what, "updated", f"from {file}")

    def train_queue(self, limit: int | None) -> Step:
        """The queue whose limit shares out the GPUs; None keeps the limit it has, or makes it 1."""
        what = f"work queue {GPU_POOL}/{TRAIN_QUEUE}"
        try:
            found = self._client.read_work_queue_by_name(TRAIN_QUEUE, GPU_POOL)
        except ObjectNotFound:
            limit = limit or 1
            if not self._dry_run:
                self._client.create_work_queue(
                    TRAIN_QUEUE, concurrency_limit=limit, work_pool_name=GPU_POOL
                )
            return Step(what, "created", f"{limit} at a time")
        wanted = limit or found.concurrency_limit or 1
        if found.concurrency_limit == wanted:
            return Step(what, "unchanged", f"{wanted} at a time")
        if not self._dry_run:
            self._client.update_work_queue(found.id, concurrency_limit=wanted)
        return Step(what, "updated", f"{wanted} at a time")

    def automation(self, wanted: AutomationCore) -> Step:
        """An automation of that name; whether it is switched on stays as people have it."""
        what = f"automation {wanted.name!r}"
        found = self._client.read_automations_by_name(wanted.name)
        if not found:
            if not self._dry_run:
                self._client.create_automation(wanted)
            return Step(what, "created")
        note = "" if found[0].enabled else "switched off in Prefect"
        if _content(found[0]) == _content(wanted):
            return Step(what, "unchanged", note)
        if not self._dry_run:
            kept = wanted.model_copy(update={"enabled": found[0].enabled})
            self._client.update_automation(found[0].id, kept)
        return Step(what, "updated", note)

    def notification_block(self, name: str) -> UUID:
        """Id of the block `TYPE/NAME`; raises GraceError unless it is there and sends messages."""
        kind, _, block = name.partition("/")
        try:
            document = self._client.read_block_document_by_name(block, kind)
        except ObjectNotFound:
            raise GraceError(
                f"--notify {name}: the server has no such block; make one under Blocks in "
                "Prefect's page and name it as TYPE/NAME, for instance slack-webhook/operators"
            ) from None
        schema = document.block_schema
        if schema is None or "notify" not in schema.capabilities:
            raise GraceError(
                f"--notify {name}: a block of type {kind} sends no messages; take one such as "
                "slack-webhook, email-server or custom-webhook"
            )
        return document.id

    def deployments(self) -> list[Step]:
        """Those of prefect.yaml. A schedule that is there already stays on or off as it is."""
        if self._dry_run:
            return []
        before = self._deployed()
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        done = subprocess.run(
            command, cwd=self._project, capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()[-_SHOWN_LINES:]
            raise GraceError(
                "`prefect --no-prompt deploy --all` failed; it printed:\n" + "\n".join(lines)
            )
        steps = []
        for key, after in self._deployed().items():
            name, notes = f"deployment {after['name']}", []
            known = before.get(key, {}).get("schedules", {})
            for slug, (schedule, active, schedule_id) in after["schedules"].items():
                was_active = known.get(slug, (None, active))[1]
                if was_active != active:
                    self._client.update_deployment_schedule(
                        key, schedule_id, active=was_active, schedule=schedule
                    )
                notes.append(f"schedule {slug} is {'on' if was_active else 'off'}")
            if key not in before:
                steps.append(Step(name, "created", ", ".join(notes)))
            else:
                same = _decided(before[key]) == _decided(after)
                change: Literal["unchanged", "updated"] = "unchanged" if same else "updated"
                steps.append(Step(name, change, ", ".join(notes)))
        return steps

    def _deployed(self) -> dict[UUID, dict[str, Any]]:
        """Deployments of this project on the server, by id; its schedules by slug."""
        found = {}
        for item in self._client.read_deployments():
            if not (item.entrypoint or "").startswith("flows."):
                continue
            flow = self._client.read_flow(item.flow_id).name
            found[item.id] = {
                **{field: getattr(item, field) for field in _COMPARED},
                "name": f"{flow}/{item.name}",
                "schedules": {
                    schedule.slug or str(schedule.schedule): (
                        schedule.schedule,
                        schedule.active,
                        schedule.id,
                    )
                    for schedule in item.schedules
                },
            }
        return found


def set_up(
    project: Path,
    *,
    gpus: int | None = None,
    notify: str | None = None,
    completed: bool = False,
    deploy: bool = True,
    dry_run: bool = False,
) -> Iterator[Step]:
    """All steps in their order, each yielded when it is done.

    gpus: limit of the train queue, None to keep it; notify: block `TYPE/NAME` that messages go
    through, and completed: also about runs that completed.

    Raises GraceError when the server does not answer, or something on it cannot be used.
    """
    for needed in (Path("prefect.yaml"), _TEMPLATES):
        if not (project / needed).exists():
            raise GraceError(
                f"{project.absolute()} holds no {needed}; run this in the project's folder"
            )
    with prefect_server() as client:
        setup = Setup(client, project, dry_run=dry_run)
        block = setup.notification_block(notify) if notify else None
        for pool in (GPU_POOL, CPU_POOL):
            yield setup.pool(pool)
        yield setup.train_queue(gpus)
        for automation in standing_automations():
            yield setup.automation(automation)
        if block is not None:
            yield setup.automation(notification_automation(block, completed=completed))
        if deploy:
            yield from setup.deployments()


def _content(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(include=set(AutomationCore.model_fields) - {"enabled"})


def _decided(deployment: dict[str, Any]) -> dict[str, Any]:
    schedules = {slug: entry[0] for slug, entry in deployment["schedules"].items()}
    return {**deployment, "schedules": schedules}
