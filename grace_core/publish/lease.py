"""The lease of a publication under way: `publishing.json`, renewed for as long as its writer lives.

Files of a model are sent and downloaded whole, which may take longer than a lease lasts; so a
thread renews it beside that work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from grace_core.errors import GraceError
from grace_core.publish.hub_repository import HubRepository
from grace_core.publish.index import JOURNAL, RENEWED_AFTER, Publication, now


class Lease:
    """One writer's, in the index repository; every commit there is on top of its last one."""

    def __init__(self, index: HubRepository) -> None:
        self._index = index
        self._writing = threading.RLock()
        self._failure: Exception | None = None
        self._journal: Publication | None = None
        self.head = ""
        """Last commit of the index repository that this writer knows."""

    def write(self, journal: Publication, message: str) -> Publication:
        """Say how far the publication is; the returned one has this moment as sign of life.

        Raises GraceError when another writer took over.
        """
        with self._writing:
            self.require_renewed()
            renewed = journal.model_copy(update={"renewed": now()})
            files = {JOURNAL: renewed.to_text().encode()}
            self.head = self._index.write(files, self.head, message)
            self._journal = renewed
            return renewed

    def end(self, files: Mapping[str, bytes], message: str) -> None:
        """Write these files of the index repository, and give the lease back, in one commit."""
        with self._writing:
            self.head = self._index.write({**files, JOURNAL: None}, self.head, message)

    def require(self) -> None:
        """Raise GraceError when another writer took over."""
        with self._writing:
            if self._index.head() != self.head:
                raise GraceError(
                    f"another publication to {self._index.name} took over; this one changes "
                    "nothing more. Let it end, then publish again"
                )

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew it every now and then, beside what happens within."""
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(ended,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        self.require_renewed()

    def require_renewed(self) -> None:
        """Raise what the thread met: the lease was lost, or the Hub cannot be reached."""
        if self._failure is not None:
            raise self._failure

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(RENEWED_AFTER.total_seconds()):
            with self._writing:
                assert self._journal is not None
                try:
                    self.write(self._journal, "Still publishing")
                except Exception as error:  # is raised where the files are sent
                    self._failure = error
                    return
