"""Checkpoints as they lie on disk: finding the newest whole one.

No torch in here, so that whoever starts a training can look before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_core.artifacts import sha256_of
from grace_core.errors import GraceError

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
STEP_PREFIX = "step-"


@dataclass(frozen=True)
class Layout:
    """What must be equal for a checkpoint to be continued."""

    processes: int
    zero_stage: int


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    controller: Mapping[str, float | None]


def with_checksum(state: Mapping[str, Any]) -> str:
    """The text of a state file: the state, and the SHA-256 of its JSON, keys in order.

    Nothing else would notice a flipped bit in a step or in beta.
    """
    return json.dumps({**state, "checksum": _checksum(state)}, indent=1)


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def latest_checkpoint(folder: Path, layout: Layout) -> Saved | None:
    """The newest whole checkpoint, or None. Damaged ones are reported and passed over.

    Raises GraceError when the newest whole one was written by another layout.
    """
    found = sorted(
        (path for path in folder.glob(f"{STEP_PREFIX}*") if path.is_dir()),
        key=lambda path: path.name,
        reverse=True,
    )
    for path in found:
        state = _read_state(path)
        if state is None:
            continue
        written_by = Layout(**state["layout"])
        if written_by != layout:
            raise GraceError(
                f"{path} was written by {written_by.processes} processes under ZeRO-"
                f"{written_by.zero_stage}, this run has {layout.processes} under ZeRO-"
                f"{layout.zero_stage}; continue with the former, or delete {folder} to start anew"
            )
        return Saved(path, int(state["step"]), state["controller"])
    return None


def newest_written(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint and its step, without reading its tensors; None where there is none.

    Quick, for a report on a failure; a resume compares digests as well (`latest_checkpoint`).
    """
    found = max(folder.glob(f"{STEP_PREFIX}*/{STATE_FILE}"), default=None)
    return (
        None if found is None else (found.parent, int(found.parent.name.removeprefix(STEP_PREFIX)))
    )


def _read_state(path: Path) -> dict[str, Any] | None:
    """The state of a checkpoint whose files all have their recorded digests, else None."""
    try:
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if state.pop("checksum") != _checksum(state):
            raise ValueError(f"{STATE_FILE} is not what was written")
        digests = state["sha256"]
        damaged = [name for name, digest in digests.items() if sha256_of(path / name) != digest]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        log.warning("%s is damaged (%s); passed over for the one before", path, error)
        return None
    if damaged:
        log.warning("%s is damaged (%s); passed over for the one before", path, ", ".join(damaged))
        return None
    return state
