"""Which rank of a training over several nodes failed first, and what it wrote.

Every node's agent leaves the first failure of its own ranks beside their output; when one rank
fails, those of other nodes fail after it, because they lost their peer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from grace_core.launch.output import attempt_folder, last_attempt
from grace_core.whole_files import write_whole

_FILE = "failure.json"


@dataclass(frozen=True, order=True)
class NodeFailure:
    """The first rank of a node that failed; failures compare by time.

    time: seconds since the epoch; exit_code: negative for a signal.
    """

    time: float
    node: int
    rank: int
    local_rank: int
    exit_code: int


def node_folder(logs: Path, attempt: int, node: int) -> Path:
    """Folder for the output of a node's ranks in one start."""
    return attempt_folder(logs, attempt) / f"node-{node}"


def record_failure(ranks: Path, failure: NodeFailure) -> None:
    """ranks: the node's folder."""
    ranks.mkdir(parents=True, exist_ok=True)
    write_whole(ranks / _FILE, json.dumps(asdict(failure)))


def first_node_failure(logs: Path) -> tuple[NodeFailure, list[str]] | None:
    """The earliest failure of the last start, and all error output of that rank."""
    folder = attempt_folder(logs, last_attempt(logs))
    found = [
        NodeFailure(**json.loads(file.read_text(encoding="utf-8")))
        for file in folder.glob(f"node-*/{_FILE}")
    ]
    if not found:
        return None
    first = min(found)
    ranks = node_folder(logs, last_attempt(logs), first.node)
    lines = [
        line
        for file in sorted(ranks.glob(f"*/attempt_*/{first.local_rank}/stderr.log"))
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return first, lines
