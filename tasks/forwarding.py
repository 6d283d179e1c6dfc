"""Metric events on their way to MLflow, while the stage that reports them runs.

A thread sends them, so that a slow or absent tracking server never holds up a training. What
could not be sent is kept and sent again: MLflow stores a metric once however often it is sent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from grace_core.errors import GraceError
from grace_core.events import Event

logger = logging.getLogger(__name__)

_BATCH = 1000  # metrics MLflow takes in one request
_SEND_EVERY = 2.0  # seconds


class TrackingUnavailable(GraceError):
    """MLflow did not take what was to be recorded; the stage's own result is not in danger."""


class MetricForwarder:
    """Sends events to the MLflow run that `open_run` opens when the first of them comes.

    `close_seconds`: how long `close` goes on trying before it gives up.
    """

    def __init__(self, open_run: Callable[[], str], close_seconds: float = 60.0) -> None:
        self._open_run = open_run
        self._close_seconds = close_seconds
        self._client = MlflowClient()
        self._pending: list[Metric] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._failure: Exception | None = None
        # In this context a warning of the thread belongs to the flow run's logs.
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._send_until_closed,), daemon=True
        )

    def on_event(self, event: Event) -> None:
        """Take an event; returns at once."""
        moment = round(event.time * 1000)
        metrics = [
            Metric(f"{event.kind}/{name}", value, moment, event.step)
            for name, value in event.values.items()
        ]
        with self._lock:
            self._pending += metrics
            if not self._thread.is_alive() and not self._closing.is_set():
                self._thread.start()

    def close(self) -> None:
        """Send what is left; raises TrackingUnavailable when MLflow does not take it in time."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        deadline = time.monotonic() + self._close_seconds
        while not self._send():
            if time.monotonic() > deadline:
                raise TrackingUnavailable(
                    f"MLflow did not take {len(self._pending)} metrics within "
                    f"{self._close_seconds:g} s ({self._failure}); they are kept in the stage's "
                    "metrics.jsonl; bring the tracking server back and run again"
                )
            time.sleep(min(_SEND_EVERY, self._close_seconds))

    def _send_until_closed(self) -> None:
        while not self._closing.wait(_SEND_EVERY):
            self._send()

    def _send(self) -> bool:
        """Send all that is pending; False when MLflow did not take it."""
        while True:
            with self._lock:
                batch = self._pending[:_BATCH]
            if not batch:
                return True
            try:
                self._client.log_batch(self._open_run(), metrics=batch)
            except MlflowException as error:
                if self._failure is None:
                    logger.warning("MLflow does not answer, metrics are kept: %s", error)
                self._failure = error
                return False
            self._failure = None
            with self._lock:
                del self._pending[: len(batch)]
