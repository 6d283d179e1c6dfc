"""Flows of this very process against a server that a test started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings


@contextmanager
def prefect_at(api: str) -> Iterator[None]:
    """Use the server at `api` (ending in /api) inside; it has been told everything afterwards.

    What is still untold when a server ends would be tried for minutes.
    """
    with temporary_settings({PREFECT_API_URL: api}):
        try:
            yield
        finally:
            APILogWorker.drain_all()
            EventsWorker.drain_all()
