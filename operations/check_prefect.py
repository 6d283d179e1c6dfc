"""Whether Prefect's server is there and set up: version, pools, workers, zombie automation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from grace_core.doctor.findings import Finding, information, ok, problem, unchecked, warning
from grace_core.errors import GraceError
from operations.servers import SECONDS, away, shown_address

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

AREA = "prefect"

_SET_UP = "run `grace setup`"


def check_prefect() -> Iterator[Finding]:
    """The server at PREFECT_API_URL; what it lacks for unattended runs is a warning.

    A flow that is called directly needs neither pools nor workers.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    address = PREFECT_API_URL.value()
    if not address:
        yield information(
            AREA, "not configured: PREFECT_API_URL is not set; a flow starts a server of its own"
        )
        return
    shown = shown_address(address)
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": SECONDS}, sync_client=True) as client,
        ):
            yield from _server(shown, client)
            yield from _set_up(client)
            yield from _heartbeat(client)
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            yield problem(
                AREA,
                f"{shown} refuses the credentials ({status})",
                "export PREFECT_API_AUTH_STRING or PREFECT_API_KEY",
            )
        elif status >= 500:
            yield away(AREA, f"{shown} answers {status}", "look at the server's log")
        else:
            yield _no_api(shown, str(status))
    except ValueError as error:  # JSON or schema
        yield _no_api(shown, type(error).__name__)
    except httpx.TransportError as error:
        yield away(
            AREA,
            f"{shown} does not answer ({type(error).__name__})",
            "start the server (`make ui` for a local one), or mend PREFECT_API_URL",
        )


def _no_api(shown: str, why: str) -> Finding:
    return problem(
        AREA,
        f"{shown} does not answer as a Prefect API ({why})",
        "mend PREFECT_API_URL, which ends in /api, or install the server's version",
    )


def _server(shown: str, client: SyncPrefectClient) -> Iterator[Finding]:
    theirs, ours = client.api_version(), client.client_version()
    if theirs != ours:
        yield warning(
            AREA,
            f"{shown} is Prefect {theirs}, this is {ours}",
            "install the same version on both sides",
        )
    else:
        yield ok(AREA, f"{shown} answers, Prefect {theirs}")


def _set_up(client: SyncPrefectClient) -> Iterator[Finding]:
    """What `grace setup` would still change."""
    from operations.automations import standing_automations
    from operations.prefect_setup import CPU_POOL, GPU_POOL, Setup

    setup = Setup(client, Path.cwd(), dry_run=True)
    try:
        steps = [
            setup.pool(GPU_POOL),
            setup.pool(CPU_POOL),
            setup.train_queue(None),
            *map(setup.automation, standing_automations()),
        ]
    except FileNotFoundError as error:
        yield unchecked(
            AREA, f"pools and automations: there is no {error.filename}", "run this in the checkout"
        )
        return
    except GraceError as error:
        yield warning(AREA, str(error), _SET_UP)
        return
    for step in steps:
        if step.change == "created":
            yield warning(AREA, f"{step.what} is missing", _SET_UP)
        elif step.change == "updated":
            yield warning(AREA, f"{step.what} is not that of this version", _SET_UP)
        elif "switched off" in step.note:
            yield warning(
                AREA, f"{step.what} is switched off", "switch it on under Automations in Prefect"
            )
    if all(step.change == "unchanged" for step in steps):
        yield ok(AREA, "work pools, queue and automations are set up")
    for pool, step in zip((GPU_POOL, CPU_POOL), steps, strict=False):
        if step.change != "created":
            yield from _workers(client, pool)


def _workers(client: SyncPrefectClient, pool: str) -> Iterator[Finding]:
    from prefect.client.schemas.objects import WorkerStatus

    online = [
        worker
        for worker in client.read_workers_for_work_pool(pool)
        if worker.status == WorkerStatus.ONLINE
    ]
    if online:
        names = ", ".join(worker.name for worker in online)
        yield ok(AREA, f"work pool {pool} has {len(online)} worker(s) online: {names}")
    else:
        yield warning(
            AREA,
            f"work pool {pool} has no worker online",
            f"start one where it is to run: prefect worker start --pool {pool}",
        )


def _heartbeat(client: SyncPrefectClient) -> Iterator[Finding]:
    """The automation ends runs whose heartbeats are too far apart as if they were dead."""
    from prefect.settings import get_current_settings

    from operations.automations import HEARTBEAT_SECONDS, ZOMBIE_AFTER, ZOMBIES

    frequency = get_current_settings().flows.heartbeat_frequency
    active = any(found.enabled for found in client.read_automations_by_name(ZOMBIES))
    limit = ZOMBIE_AFTER.total_seconds()
    remedy = f"export PREFECT_FLOWS_HEARTBEAT_FREQUENCY={HEARTBEAT_SECONDS}, as the pools do"
    if frequency is None:
        yield warning(
            AREA, "flows started here send no heartbeats, so nobody sees them die", remedy
        )
    elif active and 2 * frequency > limit:
        yield warning(
            AREA,
            f"flows started here send a heartbeat every {frequency} s, and {ZOMBIES!r} takes them "
            f"for dead after {limit:g} s",
            remedy,
        )
    elif active:
        yield ok(AREA, f"heartbeats every {frequency} s; a run without them ends after {limit:g} s")
