"""What the checks of Prefect and of MLflow share: addresses without secrets, and servers away."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from grace_core.doctor.findings import Finding, Severity

SECONDS = 5.0
"""How long a server may take to answer a check."""


@dataclass(frozen=True)
class ServerAway(Finding):
    """A server that does not answer: a problem that may pass by itself."""


def away(area: str, text: str, remedy: str) -> ServerAway:
    return ServerAway(area, Severity.PROBLEM, text, remedy)


def shown_address(address: str) -> str:
    """An address without user, password, query and fragment, for messages.

    Made of the parts that hold no secret; whatever does not look like an address is not repeated.
    """
    parts = urlsplit(address)
    if not parts.netloc and "@" in address:
        return "(an address of an unknown form)"
    if not parts.scheme:
        return address
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
