"""What has been answered so far, in files that survive whatever happens to their writers.

Each process appends to a file of its own, one line an item, and all read one another's. Lines of a
batch are on disk before the batch counts as answered. A process that was killed while it wrote
leaves a last line without its end, which nobody reads.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from grace_core.errors import GraceError
from grace_core.evaluation.items import Prediction


class Journal:
    """Predictions of one benchmark in a folder that all its processes share."""

    def __init__(self, folder: Path) -> None:
        """Read what the folder holds; it is made where it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # A file of a process that died may end in half a line, so nobody goes on with another's.
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._own = folder / name
        self._stream: int | None = None
        self._offsets: dict[Path, int] = {}
        self.predictions: dict[str, Prediction] = {}
        """By item; where two processes answered one, the answer that was read first."""
        self.refresh()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            os.close(self._stream)
            self._stream = None

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Write predictions; they are on disk when this returns.

        Raises OSError where they cannot be.
        """
        if self._stream is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._stream = os.open(self._own, flags, 0o644)
        predictions = list(predictions)
        text = "".join(f"{json.dumps(asdict(one))}\n" for one in predictions).encode()
        while text:
            text = text[os.write(self._stream, text) :]
        os.fsync(self._stream)
        for prediction in predictions:
            self.predictions.setdefault(prediction.item_id, prediction)

    def refresh(self) -> None:
        """Read what other processes have written meanwhile.

        Raises GraceError for a whole line that is no prediction.
        """
        for file in sorted(self._folder.glob("*.jsonl")):
            if file == self._own:
                continue
            with file.open("rb") as stream:
                stream.seek(self._offsets.get(file, 0))
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offsets[file] = self._offsets.get(file, 0) + len(whole)
            for line in whole.splitlines():
                prediction = _read(line, file)
                self.predictions.setdefault(prediction.item_id, prediction)

    def holds(self, item_ids: Iterable[str]) -> bool:
        """Whether all these items have predictions."""
        return all(item_id in self.predictions for item_id in item_ids)

    def in_order(self, item_ids: Sequence[str]) -> list[Prediction]:
        """Predictions of these items, in the given order; each is held."""
        return [self.predictions[item_id] for item_id in item_ids]


def _read(line: bytes, file: Path) -> Prediction:
    try:
        return Prediction(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise GraceError(
            f"{file} holds a line that is no answer ({error}); remove the file, and its questions "
            "are asked again"
        ) from None
