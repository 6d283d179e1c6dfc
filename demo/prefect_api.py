"""The few questions asked of the Prefect server, over its REST API.

Importing Prefect's own client takes seconds; this program only watches.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})


@dataclass(frozen=True)
class RunState:
    """State of a flow run or task run."""

    id: str
    name: str
    type: str
    """Prefect's state type, such as RUNNING."""
    state: str
    """Name of the state, such as Cached."""
    message: str
    start: str
    """ISO 8601, empty before the start."""
    seconds: float

    @property
    def is_final(self) -> bool:
        return self.type in FINAL


class PrefectApi:
    """Talks to the server at `address` (ending in /api)."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ensure_work_pool(self, name: str, template: dict[str, Any]) -> None:
        """Create a process work pool with this base job template unless the pool exists."""
        body = {"name": name, "type": "process", "base_job_template": template}
        try:
            self._call("POST", "/work_pools/", body)
        except urllib.error.HTTPError as error:
            if error.code != 409:  # exists
                raise

    def flow_run(self, run_id: str) -> RunState:
        return _run_state(self._call("GET", f"/flow_runs/{run_id}"))

    def task_runs(self, flow_run_id: str) -> list[RunState]:
        """Task runs of a flow run, in the order they started."""
        body = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
        runs = [_run_state(fields) for fields in self._call("POST", "/task_runs/filter", body)]
        return sorted(runs, key=lambda run: (run.start or "~", run.name))

    def error_logs(self, flow_run_id: str, limit: int = 5) -> list[str]:
        """The last error messages that a flow run logged."""
        body = {
            "logs": {"flow_run_id": {"any_": [flow_run_id]}, "level": {"ge_": 40}},
            "sort": "TIMESTAMP_DESC",
            "limit": limit,
        }
        return [
            str(entry["message"]) for entry in reversed(self._call("POST", "/logs/filter", body))
        ]

    def cancel(self, flow_run_id: str) -> None:
        """Ask for a cancellation; the worker then ends the run and says so."""
        body = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        self._call("POST", f"/flow_runs/{flow_run_id}/set_state", body)

    def mark_cancelled(self, flow_run_id: str) -> None:
        """Record that a run is over when its worker will not be there to do so."""
        body = {"state": {"type": "CANCELLED", "name": "Cancelled"}, "force": True}
        self._call("POST", f"/flow_runs/{flow_run_id}/set_state", body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self._address + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")


def _run_state(fields: dict[str, Any]) -> RunState:
    state = fields.get("state") or {}
    return RunState(
        id=fields["id"],
        name=fields["name"],
        type=state.get("type") or "PENDING",
        state=state.get("name") or "Pending",
        message=state.get("message") or "",
        start=fields.get("start_time") or "",
        seconds=float(fields.get("estimated_run_time") or 0.0),
    )
