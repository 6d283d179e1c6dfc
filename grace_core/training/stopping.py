"""Being told to stop: SIGTERM sets a flag, the loop looks at it after each step."""

from __future__ import annotations

import signal
import time
from types import FrameType

STOPPED = 143
"""Exit code of a rank that was told to stop, as a shell would report SIGTERM."""

_MARGIN = 1.5
"""How much longer than measured a checkpoint may take before it is not worth starting."""


class StopSignal:
    """The SIGTERM of this process."""

    def __init__(self) -> None:
        self.write_seconds = float("inf")
        """Seconds a checkpoint takes, as last measured; until then none fits."""
        self._received_at: float | None = None

    def listen(self) -> None:
        """Install the handler; call it in the main thread."""
        signal.signal(signal.SIGTERM, self._receive)

    @property
    def requested(self) -> bool:
        return self._received_at is not None

    def write_fits(self, grace_seconds: float) -> bool:
        """Whether a checkpoint can be written before SIGKILL comes."""
        waited = 0.0 if self._received_at is None else time.monotonic() - self._received_at
        return waited + _MARGIN * self.write_seconds < grace_seconds

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        if self._received_at is None:
            self._received_at = time.monotonic()
