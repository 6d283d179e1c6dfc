"""The commands that continue a flow run: the same deployment or stage with the same parameters."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from prefect import runtime

_SUBCOMMANDS = {"grace": "run"} | {
    f"grace-{name}": name
    for name in ("data", "distill", "quantize", "release", "evaluate", "publish")
}
"""What `grace` calls a flow."""

_PLAIN = re.compile(r"[A-Za-z_./][\w./ -]*")
_JSON_WORDS = ("true", "false", "null", "NaN", "Infinity")


def commands_to_continue() -> list[str]:
    """Of the flow run at work, ready for a shell; empty outside of one."""
    flow, deployment = runtime.flow_run.flow_name, runtime.deployment.name
    parameters = {
        name: value for name, value in runtime.flow_run.parameters.items() if value is not None
    }
    commands = []
    if flow and deployment:
        commands.append(prefect_command(f"{flow}/{deployment}", parameters))
    if flow in _SUBCOMMANDS and "config" in parameters:
        commands.append(grace_command(_SUBCOMMANDS[flow], parameters))
    return commands


def prefect_command(deployment: str, parameters: Mapping[str, Any]) -> str:
    """`prefect deployment run` with `parameters`, which Prefect reads as JSON where they are."""
    words = ["prefect", "deployment", "run", deployment]
    for name, value in parameters.items():
        words += ["--param", f"{name}={_as_parameter(value)}"]
    return shlex.join(words)


def grace_command(subcommand: str, parameters: Mapping[str, Any]) -> str:
    """The stage without Prefect, with the same configuration."""
    words = ["grace", subcommand, str(parameters["config"])]
    for override in parameters.get("overrides", []):
        words += ["--set", override]
    if parameters.get("publish") is False:
        words += ["--set", "publish.enabled=false"]
    for variant in parameters.get("variants", []):
        words += ["--variant", variant]
    return shlex.join(words)


def _as_parameter(value: Any) -> str:
    """JSON, and a path or a name as it is: such a text is not JSON, and Prefect takes it whole."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value not in _JSON_WORDS
    return str(value) if plain else json.dumps(value)
