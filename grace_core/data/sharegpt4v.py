"""ShareGPT4V annotations: reading the files, and deciding which records can be used.

A record is `{"id", "image": path | [paths] | null, "conversations": [{"from", "value"}, ...]}`. The
`messages` / `images` schema (`role`, `content`; `user`, `assistant`) is read as well. Files are
JSON arrays or JSON Lines; both are streamed, since the published array is 1.2 GB.

Policy, where public files leave a choice:

- A record is known by its *index*, its position over all files in the order given: ids are absent
  in some files, numbers in others, and repeat. An id that is neither a string nor an integer, or
  that UTF-8 cannot carry, counts as absent.
- Roles alternate strictly, a human begins and an answer ends. Nothing is cut or joined to that end.
- `<image>` tags stand in human turns only and are as many as the pictures. No tag is inserted and
  no picture is dropped.
- Every turn has text other than white space (a tag counts as text). Text is kept as it is, with
  control and invisible characters; a lone surrogate makes the record unusable.
- Picture names are relative paths. Addresses (`https:`, `file:`, `data:`) are never followed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TextIO

from grace_core.errors import GraceError

IMAGE_TAG = "<image>"

Role = Literal["user", "assistant"]

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_CHUNK_CHARACTERS = 1 << 20
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:|file:")


class Reason(StrEnum):
    """Why a record cannot be used. The values are what quarantine files and reports show."""

    NOT_AN_OBJECT = "record is not an object"
    BAD_CONVERSATION = "bad conversation"
    UNKNOWN_ROLE = "unknown role"
    BAD_ROLE_ORDER = "bad role order"
    BAD_TURN_TEXT = "bad turn text"
    BAD_IMAGE_FIELD = "bad image field"
    IMAGE_COUNT = "image count differs from <image> tags"
    DUPLICATE = "duplicate"
    OUTSIDE_ROOT = "path outside the image root"
    PICTURE_MISSING = "picture file missing"
    PICTURE_UNREADABLE = "unreadable picture"
    PICTURE_TOO_LARGE = "picture too large"
    ASPECT_RATIO = "extreme aspect ratio"
    CONTROL_TOKEN = "control token in the text"
    TEMPLATE_CHANGES_TEXT = "chat template changes the text"
    TOO_LONG = "text too long"


class UnusableRecord(Exception):
    """A record that goes to quarantine; never a reason to stop."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason.value}: {detail}")


@dataclass(frozen=True)
class RawRecord:
    """One element of an annotation file, as JSON gave it."""

    index: int
    """Position over all files, from 0."""
    source_file: str
    """Name of the file, without its folder."""
    value: Any
    bytes_read: int = field(default=0, compare=False)
    """Of all files by now, to the megabyte: how far the reading is."""


@dataclass(frozen=True)
class Turn:
    """One turn; `text` of a user turn holds an `<image>` tag where each picture stands."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """A record whose annotation is sound; its pictures have not been looked at."""

    record_id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def read_records(files: Sequence[Path]) -> Iterator[RawRecord]:
    """Stream the elements of annotation files, in order.

    `.jsonl` files, and others whose first character is `{`, are read as JSON Lines (blank lines
    are skipped); everything else must be one JSON array. No more than about two elements and a
    megabyte of text are held at a time.

    Raises:
        GraceError: a file is missing, not UTF-8, empty, damaged or cut off; with the position.
            Damage of a file is not quarantined, because what follows it cannot be trusted.
    """
    index = before = 0
    for file in files:
        try:
            # A byte order mark is legal in front of either format.
            with file.open(encoding="utf-8-sig") as stream:
                for value in _elements(stream, file):
                    position = os.lseek(stream.fileno(), 0, os.SEEK_CUR)
                    yield RawRecord(index, file.name, value, before + position)
                    index += 1
                before += file.stat().st_size
        except UnicodeDecodeError as error:
            raise GraceError(
                f"{file}: not UTF-8 ({error.reason}, after about {index} records); "
                "convert the file to UTF-8 or fetch it again"
            ) from error
        except OSError as error:
            raise GraceError(f"{file}: cannot be read ({error.strerror}); check the path") from None


def parse_record(raw: RawRecord) -> Record:
    """Check one element and bring it into the one internal form.

    Raises:
        UnusableRecord: with the first reason found, in the order object, roles, text, picture
            field, tag count.
    """
    value = raw.value
    if not isinstance(value, dict):
        raise UnusableRecord(Reason.NOT_AN_OBJECT, f"the element is {_json_type(value)}")
    turns = _parse_turns(value)
    images = _parse_images(value)
    if any(IMAGE_TAG in turn.text for turn in turns if turn.role == "assistant"):
        raise UnusableRecord(Reason.IMAGE_COUNT, f"an answer contains {IMAGE_TAG}")
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if tags != len(images):
        raise UnusableRecord(Reason.IMAGE_COUNT, f"{len(images)} pictures, {tags} tags")
    return Record(_record_id(raw), images, turns)


def given_id(value: Any) -> str | int | None:
    """The id an element carries, or None where it has none that can be used."""
    given = value.get("id") if isinstance(value, dict) else None
    if isinstance(given, bool) or not isinstance(given, str | int):
        return None
    if isinstance(given, str) and not _is_unicode(given):
        return None
    return given


def _record_id(raw: RawRecord) -> str:
    given = given_id(raw.value)
    return f"#{raw.index}" if given is None else str(given)


def _parse_turns(value: dict[str, Any]) -> tuple[Turn, ...]:
    keys = [key for key in ("conversations", "messages") if value.get(key) is not None]
    if len(keys) != 1:
        found = "both `conversations` and `messages`" if keys else "no `conversations`"
        raise UnusableRecord(Reason.BAD_CONVERSATION, f"the record has {found}")
    turns = value[keys[0]]
    role_key, text_key = ("from", "value") if keys[0] == "conversations" else ("role", "content")
    if not isinstance(turns, list):
        raise UnusableRecord(Reason.BAD_CONVERSATION, f"`{keys[0]}` is {_json_type(turns)}")
    if not turns:
        raise UnusableRecord(Reason.BAD_CONVERSATION, "there are no turns")
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise UnusableRecord(
                Reason.BAD_CONVERSATION, f"turn {position} is {_json_type(turn)}, not an object"
            )

    roles = [_parse_role(turn.get(role_key), position) for position, turn in enumerate(turns)]
    if "assistant" not in roles:
        raise UnusableRecord(Reason.BAD_CONVERSATION, "there is no answer to learn from")
    for position, role in enumerate(roles):
        expected = "assistant" if position % 2 else "user"
        if role != expected:
            raise UnusableRecord(
                Reason.BAD_ROLE_ORDER, f"turn {position} is by the {role}, not the {expected}"
            )
    if roles[-1] != "assistant":
        raise UnusableRecord(Reason.BAD_ROLE_ORDER, "the last turn is a question")

    return tuple(
        Turn(role, _parse_text(turn.get(text_key), position))
        for position, (role, turn) in enumerate(zip(roles, turns, strict=True))
    )


def _parse_role(given: Any, position: int) -> Role:
    if not isinstance(given, str) or given not in _ROLES:
        # Only the length limit keeps a whole misplaced text out of the report.
        shown = _json_type(given) if not isinstance(given, str) else repr(given[:40])
        raise UnusableRecord(Reason.UNKNOWN_ROLE, f"the role of turn {position} is {shown}")
    return _ROLES[given]


def _parse_text(given: Any, position: int) -> str:
    if not isinstance(given, str):
        problem = _json_type(given)
    elif not given.strip():
        problem = "empty"
    elif not _is_unicode(given):
        problem = "not Unicode (a lone surrogate)"
    else:
        return given
    raise UnusableRecord(Reason.BAD_TURN_TEXT, f"the text of turn {position} is {problem}")


def _parse_images(value: dict[str, Any]) -> tuple[str, ...]:
    keys = [key for key in ("image", "images") if value.get(key) is not None]
    if not keys:
        return ()
    if len(keys) == 2:
        raise UnusableRecord(Reason.BAD_IMAGE_FIELD, "the record has both `image` and `images`")
    given = value[keys[0]]
    paths = [given] if isinstance(given, str) else given
    if not isinstance(paths, list):
        raise UnusableRecord(Reason.BAD_IMAGE_FIELD, f"`{keys[0]}` is {_json_type(given)}")
    for path in paths:
        if not isinstance(path, str):
            raise UnusableRecord(Reason.BAD_IMAGE_FIELD, f"a picture's path is {_json_type(path)}")
        if not path.strip():
            raise UnusableRecord(Reason.BAD_IMAGE_FIELD, "a picture's path is empty")
        if _ADDRESS.match(path):
            raise UnusableRecord(
                Reason.BAD_IMAGE_FIELD, f"{path[:80]!r} is an address, not a relative path"
            )
        if "\0" in path or not _is_unicode(path):
            raise UnusableRecord(Reason.BAD_IMAGE_FIELD, "a picture's path is no file name")
    return tuple(paths)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    if value is None:
        return "null or missing"
    return names.get(type(value), "a number")


def _elements(stream: TextIO, file: Path) -> Iterator[Any]:
    if file.suffix.lower() == ".jsonl":
        return _lines(stream, file)
    start = stream.tell()
    first = ""
    while not first.strip():
        first = stream.read(4096)
        if not first:
            raise GraceError(f"{file}: the file is empty; fetch it again or leave it out")
    stream.seek(start)
    first = first.lstrip()[0]
    if first == "[":
        return _ArrayReader(stream, file).elements()
    if first == "{":
        return _lines(stream, file)
    raise GraceError(
        f"{file}: begins with {first!r}; annotations must be a JSON array or JSON Lines"
    )


def _lines(stream: TextIO, file: Path) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GraceError(
                f"{file}: line {number} is not valid JSON ({error}); annotations must be a JSON "
                "array or one JSON object per line. Mend the line or fetch the file again"
            ) from error
        yield value


_DECODER = json.JSONDecoder()


class _ArrayReader:
    """Elements of one JSON array, decoded one by one from a growing window of the text.

    `_text[_at:]` is what has been read and not yet decoded; `_before` characters of the file lie
    ahead of `_text`.
    """

    def __init__(self, stream: TextIO, file: Path) -> None:
        self._stream = stream
        self._file = file
        self._text = ""
        self._at = 0
        self._before = 0
        self._ended = False
        self._count = 0

    def elements(self) -> Iterator[Any]:
        opening = self._next_character()
        assert opening == "["
        self._at += 1
        if self._next_character() == "]":
            self._at += 1
        else:
            while True:
                yield self._element()
                self._count += 1
                separator = self._next_character()
                if separator not in (",", "]"):
                    raise self._error("expected ',' or ']'", self._at)
                self._at += 1
                if separator == "]":
                    break
        if self._next_character():
            raise self._error("text after the end of the array", self._at)

    def _element(self) -> Any:
        self._next_character()  # skips white space
        wanted = _CHUNK_CHARACTERS
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    raise self._error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._error(str(error), self._at) from error
            else:
                # A number near the end of the window may go on behind it: 1 of "1e-" of "1e-5".
                if end + 2 < len(self._text) or self._ended:
                    self._at = end
                    return value
            self._grow(wanted)
            wanted *= 2  # so that a huge element is not decoded again for every megabyte

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the end of the window, rather than the file, can explain the error.

        A cut string is reported at its beginning; anything else that is cut (a literal, an escape,
        a missing delimiter) within a few characters of the end.
        """
        longest_literal = len("\\ud83d\\ude42-Infinity")
        return (
            error.msg.startswith("Unterminated string")
            or error.pos >= len(self._text) - longest_literal
        )

    def _next_character(self) -> str:
        """The next character that is not white space, left in place; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\n\r":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._grow(_CHUNK_CHARACTERS)

    def _grow(self, characters: int) -> None:
        chunk = self._stream.read(characters)
        self._ended = not chunk
        self._before += self._at
        self._text = self._text[self._at :] + chunk
        self._at = 0

    def _error(self, problem: str, at: int) -> GraceError:
        return GraceError(
            f"{self._file}: not a valid JSON array at character {self._before + at}, in or after "
            f"record {self._count} ({problem}); mend the file or fetch it again"
        )
