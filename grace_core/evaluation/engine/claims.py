"""Which process answers which batch: whoever locks it first.

A lock is one byte of a file (POSIX record locks, which network file systems have, too). The kernel
drops the locks of a process that ends, however it ends, and its batch is free for the others.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

from grace_core.errors import GraceError


class Claims:
    """Locks of batches, by their number, held by this process.

    One object a process and file: closing any descriptor of the file drops all of the process's
    locks on it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._held: set[int] = set()

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._stream)

    def take(self, number: int) -> bool:
        """Whether the batch is this process's now; it was nobody's before.

        Raises GraceError where the file system has no locks.
        """
        if number in self._held:
            return False
        try:
            fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise GraceError(
                f"the file system of {self._file} has no file locks ({error.strerror}); mount it "
                "with them (Lustre: -o flock; NFS: version 4), or put run_dir elsewhere"
            ) from error
        self._held.add(number)
        return True

    def give(self, number: int) -> None:
        """The batch is free again."""
        fcntl.lockf(self._stream, fcntl.LOCK_UN, 1, number)
        self._held.discard(number)
