"""Small text files that are whole, or as they were before: written aside, flushed, renamed."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write `text` as `file`; its folder must be there. Raises OSError where that fails.

    Of several that write it at the same time, one is the last, and its text is whole.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
