"""A benchmark as all models of a run are asked it: questions, golds and pictures in two files.

`items.jsonl` has one line an item. `pictures.tar` has every distinct picture once, under its
SHA-256, as it was found; a line names a picture by place, so that reading one takes one seek and
nothing of the others is in memory. What was evaluated is therefore known by content, and stays
there to be looked at when the data set does not.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.items import FileSlice, Gold, Item, Picture, Question

ITEMS_FILE = "items.jsonl"
PICTURES_FILE = "pictures.tar"


class PicturePack(AbstractContextManager["PicturePack"]):
    """Writes `pictures.tar`; equal pictures become one."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / PICTURES_FILE
        self._stream = self._file.open("wb")
        self._tar = tarfile.open(fileobj=self._stream, mode="w", format=tarfile.USTAR_FORMAT)
        self._known: dict[str, Picture] = {}

    def of_bytes(self, data: bytes) -> Picture:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._known:
            member = tarfile.TarInfo(key)
            member.size = len(data)
            start = self._stream.tell() + tarfile.BLOCKSIZE
            self._tar.addfile(member, io.BytesIO(data))
            self._known[key] = Picture(FileSlice(self._file, start, len(data), key))
        return self._known[key]

    def of_file(self, file: Path) -> Picture:
        return self.of_bytes(file.read_bytes())

    @property
    def count(self) -> int:
        """Distinct pictures so far."""
        return len(self._known)

    def __exit__(self, *_: object) -> None:
        self._tar.close()
        self._stream.close()


def write_items(items: Sequence[Item], folder: Path) -> None:
    """Write `items.jsonl`; the pictures must be those of a `PicturePack` of the same folder."""
    with (folder / ITEMS_FILE).open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(_plain(item), ensure_ascii=False) + "\n")


def read_items(folder: Path) -> list[Item]:
    """The items that `write_items` wrote, in order; pictures are read when they are opened.

    Raises GraceError where the file is not there or not whole.
    """
    file = folder / ITEMS_FILE
    try:
        with file.open(encoding="utf-8") as lines:
            return [_item(json.loads(line), folder / PICTURES_FILE) for line in lines]
    except (OSError, ValueError, KeyError) as error:
        raise GraceError(
            f"{file} is damaged ({type(error).__name__}); delete its folder and evaluate again"
        ) from error


def _plain(item: Item) -> dict[str, Any]:
    content: list[Any] = []
    for part in item.question.content:
        if isinstance(part, str):
            content.append(part)
        else:
            place = part.source
            assert isinstance(place, FileSlice), "pictures are packed before items are written"
            content.append([place.offset, place.size, place.sha256])
    gold = item.gold
    return {
        "id": item.id,
        "kind": gold.kind,
        "content": content,
        "choices": None if gold.choices is None else dict(gold.choices),
        "answers": list(gold.answers),
        "fields": dict(gold.fields),
    }


def _item(line: dict[str, Any], pictures: Path) -> Item:
    content = tuple(
        part if isinstance(part, str) else Picture(FileSlice(pictures, *part))
        for part in line["content"]
    )
    gold = Gold(
        line["id"], line["kind"], line["choices"], tuple(line["answers"]), dict(line["fields"])
    )
    return Item(Question(line["id"], line["kind"], content), gold)
