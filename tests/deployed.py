"""Driving deployments on a server that a test started, over its REST API, as the UI does."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

from demo.prefect_api import FINAL

Fields = dict[str, Any]


class Deployed:
    """Talks to the server at `api` (ending in /api)."""

    def __init__(self, api: str) -> None:
        self.api = api

    def call(self, method: str, path: str, body: Fields | None = None) -> Any:
        request = urllib.request.Request(
            self.api + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        for attempt in range(10):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or attempt == 9:  # SQLite's one writer was busy for long
                    raise
                time.sleep(1.0)
        raise AssertionError("the last attempt returns or raises")

    def use_stand_in_stages(self) -> None:
        """Point every deployment at the same flow with stand-in stages."""
        for item in self.call("POST", "/deployments/filter", {}):
            assert item["entrypoint"].startswith("flows."), item["entrypoint"]
            flow = item["entrypoint"].rsplit(".", 1)[1]
            entrypoint = {"entrypoint": f"tests.stand_in_flows.{flow}"}
            self.call("PATCH", f"/deployments/{item['id']}", entrypoint)

    def start(self, deployment: str, **parameters: object) -> str:
        """Id of a new run of the deployment `flow/name`."""
        found = self.call("GET", f"/deployments/name/{deployment}")
        body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
        return str(self.call("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> Fields:
        found: Fields = self.call("GET", f"/flow_runs/{run_id}")
        return found

    def wait(self, run_id: str, *, until: str = "", seconds: float = 240) -> Fields:
        """The run once it has ended, or is in the state type `until` before that."""
        deadline = time.monotonic() + seconds
        while True:
            run = self.run(run_id)
            kind = run["state"]["type"]
            if kind == until or kind in FINAL:
                assert not until or kind == until, self.explain(run)
                return run
            assert time.monotonic() < deadline, self.explain(run)
            time.sleep(0.3)

    def explain(self, run: Fields) -> str:
        body = {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "limit": 200}
        lines = [entry["message"] for entry in self.call("POST", "/logs/filter", body)]
        return "\n".join([f"{run['name']}: {run['state']}", *lines[-30:]])

    def resume(self, run_id: str, **answer: object) -> Fields:
        """Answer the form of a paused run, as the UI's button does."""
        found: Fields = self.call("POST", f"/flow_runs/{run_id}/resume", {"run_input": answer})
        return found

    def artifact(self, run_id: str, key: str) -> str:
        body = {"artifacts": {"flow_run_id": {"any_": [run_id]}, "key": {"any_": [key]}}}
        (found,) = self.call("POST", "/artifacts/filter", body)
        return str(found["data"])


def until(condition: Any, what: str, seconds: float = 120) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.3)
    return found
