"""One process at a time makes an artifact; the ranks of a training outlive none of it unnoticed.

A flow run that was given up for dead may still be at work when the next one starts. Both would
write into one folder. So whoever makes an artifact holds its lock file, and every rank of a
training holds a shared lock on its work folder. Locks are `flock`s: the kernel drops them when
their process ends, however it ends, and a lock file that lies around locks nothing.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from grace_core.errors import GraceError

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_RANKS_LOCK = "ranks.lock"


@contextmanager
def sole_maker(artifact: Path) -> Iterator[None]:
    """Hold the right to make the artifact of that folder; waits while another process has it."""
    artifact.parent.mkdir(parents=True, exist_ok=True)
    with (artifact.parent / f".{artifact.name}.lock").open("a+") as stream:
        _wait_for(stream, fcntl.LOCK_EX, f"another process to finish {artifact.name}")
        stream.seek(0)
        stream.truncate()
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


def wait_for_ranks(work: Path) -> None:
    """Wait until no rank of an earlier attempt is at work in this folder."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / _RANKS_LOCK).open("a+") as stream:
        _wait_for(stream, fcntl.LOCK_EX, f"the ranks of an earlier attempt in {work} to end")


def join_ranks(work: Path) -> IO[str]:
    """Mark this process as a rank at work in this folder, until the result is closed."""
    stream = (work / _RANKS_LOCK).open("a+")
    _wait_for(stream, fcntl.LOCK_SH, f"{work} to be free")
    return stream


def _wait_for(stream: IO[str], kind: int, what: str) -> None:
    told = False
    while True:
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                told = True
                stream.seek(0)
                holder = stream.read() or "unknown"
                logger.warning("waiting for %s (held by: %s)", what, holder)
            time.sleep(_LOOK_SECONDS)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            raise GraceError(
                f"the file system of {stream.name} has no file locks ({error.strerror}); mount it "
                "with them (Lustre: -o flock; NFS: version 4), or put run_dir elsewhere"
            ) from error
