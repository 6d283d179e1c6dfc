"""A row's values: checked against the declared columns, and brought into one form.

The same column comes in different clothes. A whole number is text in a TSV; a list is a list in
parquet and text that looks like one in MMMU; a picture is bytes, `{bytes, path}`, base64, a path
below a root, or, in VLMEvalKit's tables, the index of the row that holds it.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from grace_core.data.pictures import resolve_picture
from grace_core.data.sharegpt4v import UnusableRecord
from grace_core.evaluation.declaration import Column
from grace_core.evaluation.items import Picture

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
_LONGEST_REFERENCE = 64
"""Characters; VLMEvalKit takes a longer cell for a picture, since none is encoded in so few."""

EXPECTED = {
    "text": "text",
    "texts": "a list of texts",
    "integer": "a whole number",
    "identifier": "text or a whole number",
    "picture": "a picture",
    "pictures": "a list of pictures",
    "record": "an object",
    "records": "a list of objects",
}
"""Column type -> what it is called in messages."""


@dataclass(frozen=True)
class Reference:
    """Stands for the picture of another row until that is known."""

    row: str


class PictureStore(Protocol):
    """Where pictures are kept while a benchmark is read."""

    def of_bytes(self, data: bytes) -> Picture: ...

    def of_file(self, file: Path) -> Picture: ...


class AsFound:
    """Pictures stay where they are: files as paths, others in memory, encoded."""

    def of_bytes(self, data: bytes) -> Picture:
        return Picture(data)

    def of_file(self, file: Path) -> Picture:
        return Picture(file)


def read_cell(value: Any, column: Column) -> Any:
    """A value of any column but pictures. Raises ValueError saying what was expected."""
    if value is None or (value == "" and column.type != "text"):
        if column.nullable:
            return None
        raise ValueError(f"should hold {EXPECTED[column.type]}, but is empty")
    return _READERS[column.type](value)


def read_pictures(value: Any, column: Column, root: Path, store: PictureStore) -> Any:
    """A cell of a `picture` or `pictures` column: Picture, Reference or None, or a list of them.

    root: folder below which every picture that is given as a path must lie.

    Raises ValueError for what is no picture, and where a file is missing or outside of the root.
    """
    if column.type == "picture":
        found = _read_picture(value, root, store)
        if found is None and not column.nullable:
            raise ValueError("should hold a picture, but is empty")
        return found
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _list_of(value)
    cells = value if isinstance(value, list) else [] if value in (None, "") else [value]
    read = [_read_picture(cell, root, store) for cell in cells]
    if None in read or not (read or column.nullable):
        raise ValueError("should hold a list of pictures, but is empty or holds an empty one")
    return read


def _read_picture(value: Any, root: Path, store: PictureStore) -> Picture | Reference | None:
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        # The form of `datasets.Image`; the path only names what the bytes hold.
        value = value.get("bytes") or value.get("path")
    if value is None or value == "" or value == b"":
        return None
    if isinstance(value, bytes):
        return store.of_bytes(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Reference(str(value))
    if not isinstance(value, str):
        raise ValueError(f"should hold a picture, but holds {_found(value)}")
    url = _DATA_URL.match(value)
    if url:
        return store.of_bytes(_decoded(value[url.end() :]))
    if len(value) > _LONGEST_REFERENCE and _BASE64.fullmatch(value):
        return store.of_bytes(_decoded(value))
    if re.fullmatch(r"[A-Za-z0-9]+", value) and not (root / value).is_file():
        return Reference(value)
    try:
        return store.of_file(resolve_picture(root, value))
    except UnusableRecord as error:
        raise ValueError(
            f"names a picture that cannot be used: {error.detail} (below {root}); set `pictures` "
            "to its folder"
        ) from None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"should hold a picture in base64, but {error}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(_wrong("text", value))
    return value


def _identifier(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(_wrong("identifier", value))
    return str(value)


def _integer(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(_wrong("integer", value))
    return value


def _texts(value: Any) -> list[str]:
    items = _list_of(value) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(each, str) for each in items):
        raise ValueError(_wrong("texts", value))
    return list(items)


def _record(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _nested(value)
    if not isinstance(value, dict):
        raise ValueError(_wrong("record", value))
    return value


def _records(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = _nested(value)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(_wrong("records", value))
    return value


def _nested(text: str) -> Any:
    """A list or an object that a table of text holds as JSON, or as Python writes it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return _list_of(text)


def _list_of(text: str) -> Any:
    """What a text form of a list stands for; the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


_READERS: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "identifier": _identifier,
    "integer": _integer,
    "texts": _texts,
    "record": _record,
    "records": _records,
}


def _wrong(expected: str, value: Any) -> str:
    return f"should hold {EXPECTED[expected]}, but holds {_found(value)}"


def _found(value: Any) -> str:
    kind = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        list: "a list",
        dict: "an object",
        bytes: "bytes",
    }.get(type(value), type(value).__name__)
    if isinstance(value, bytes):
        return kind
    shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
