"""Whether the pictures below a folder may have changed, told without reading them.

A digest over every file's path, size and time of modification, so that 100,000 pictures take
seconds and none is opened. It may tell of a change where there is none (a copy with new times):
the data are then prepared again, their content digest comes out the same, and nothing that was
trained on them is trained again. The content of a picture that was replaced by one of equal size
changes its time, and is seen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from grace_core.errors import GraceError


def listing_digest(root: Path, leave_out: Path) -> str:
    """SHA-256 (hex) over the files below `root`, in an order of its own.

    Links are not followed: where they point is part of the digest, and what they point to counts
    where it lies, because pictures outside of `root` are never used.

    leave_out: a folder that is passed over, such as the run's own where it lies below `root`.

    Raises:
        GraceError: something changed or failed while it was listed.
    """
    digest = hashlib.sha256()
    for line in _lines(root, leave_out.resolve()):
        digest.update(line)
    return digest.hexdigest()


def _lines(root: Path, leave_out: Path) -> Iterator[bytes]:
    top = root.resolve()
    pending = [top]
    while pending:
        folder = pending.pop()
        if folder == leave_out:
            continue
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            for entry in entries:
                # Names may be no UTF-8; a name's length keeps two lines from reading alike.
                name = os.fsencode(os.path.relpath(entry.path, top))
                if entry.is_symlink():
                    target = os.fsencode(os.readlink(entry.path))
                    yield b"link %d %s %d %s\n" % (len(name), name, len(target), target)
                elif entry.is_dir():
                    pending.append(Path(entry.path))
                else:
                    status = entry.stat()
                    yield b"file %d %s %d %d\n" % (
                        len(name),
                        name,
                        status.st_size,
                        status.st_mtime_ns,
                    )
        except PermissionError:
            # Such as lost+found of a disk; a picture in it has its record quarantined.
            yield b"closed %s\n" % os.fsencode(os.path.relpath(folder, top))
        except OSError as error:
            raise GraceError(
                f"{folder} cannot be listed ({error.strerror}); start again when "
                "nothing changes the pictures any more"
            ) from error
