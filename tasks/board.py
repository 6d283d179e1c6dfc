"""Two Prefect artifacts of a flow run, kept up to date from a thread of their own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast
from uuid import UUID

from prefect import get_client, runtime
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.actions import ArtifactUpdate

from operations.flow_run_states import STAGE_LABEL

logger = logging.getLogger(__name__)

_UPDATE_SECONDS = 10.0


@dataclass(frozen=True)
class Drawing:
    """What is shown: per cent of the run, its position in words, current numbers as Markdown."""

    percent: float
    words: str
    numbers: str
    stage: str | None = None
    """The stage at work; None between stages."""


class Board:
    """Shows what `draw` returns as artifacts `progress` and `numbers`, now and then.

    The stage at work is a label of the flow run too, for messages about its end.
    """

    def __init__(self, draw: Callable[[], Drawing]) -> None:
        self._draw = draw
        self._progress: UUID | None = None
        self._numbers: UUID | None = None
        self._labelled: str | None = None
        self._shown: Drawing | None = None
        self._told = False
        self._closing = threading.Event()
        # Artifacts belong to the flow run of the context that they are made in.
        self._thread = threading.Thread(target=copy_context().run, args=(self._keep,), daemon=True)

    def start(self) -> None:
        """Begin; outside of a flow run there is nowhere to show anything."""
        if runtime.flow_run.id is not None:
            self._thread.start()

    def close(self, seconds: float) -> None:
        """Show the last drawing, unless the server takes longer than `seconds`."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _keep(self) -> None:
        self._show()
        while not self._closing.wait(_UPDATE_SECONDS):
            self._show()
        self._show()

    def _show(self) -> None:
        drawing = self._draw()
        if drawing == self._shown:
            return
        try:
            self._send(drawing)
        except Exception as error:  # whatever it is, a picture of a run must not end the run
            if not self._told:
                logger.warning("Prefect does not take the progress, the run goes on: %s", error)
            self._told = True
        else:
            self._shown, self._told = drawing, False

    def _send(self, drawing: Drawing) -> None:
        if drawing.stage is not None and drawing.stage != self._labelled:
            with get_client(sync_client=True) as client:
                client.update_flow_run_labels(runtime.flow_run.id, {STAGE_LABEL: drawing.stage})
            self._labelled = drawing.stage
        percent, words = drawing.percent, drawing.words
        numbers = f"{drawing.numbers}\n\nAs of {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC."
        if self._progress is None:
            begun = create_progress_artifact(percent, key="progress", description=words)
            self._progress = cast(UUID, begun)
        else:
            update_progress_artifact(self._progress, percent, description=words)
        if self._numbers is None:
            made = create_markdown_artifact(numbers, key="numbers", description=words)
            self._numbers = cast(UUID, made)
        else:
            with get_client(sync_client=True) as client:
                update = ArtifactUpdate(data=numbers, description=words)
                client.update_artifact(self._numbers, update)
