"""The training data: the files are here, their first records are sound, their pictures in place."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from grace_core.config.data import ShareGPT4VData
from grace_core.config.load import require_environment
from grace_core.config.tree import GraceConfig
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.doctor.findings import Finding, ok, problem, problems, warning
from grace_core.errors import GraceError

if TYPE_CHECKING:
    from grace_core.data.sharegpt4v import RawRecord

AREA = "data"
SAMPLE = 20
"""Records that are looked at, of each annotation file."""

_PLACES, _PLACE_BYTES = 400, 1 << 16
"""Of each annotation file: where pictures' names are read, and how much there. A file as large as
ShareGPT4V's would take half a minute to be read whole."""

_LOOK_UPS = 2000
"""Pictures that are looked for, of each annotation file; over a network a second or two."""

_LEAST = 10  # of them of each folder, however small a part of all it is
_CHANCE = 0.001  # of a problem where the whole file has none

_TEXT = r'"(?:[^"\\]|\\.)*"'
_PICTURE_FIELD = re.compile(rf'"images?"\s*:\s*({_TEXT}|\[\s*{_TEXT}(?:\s*,\s*{_TEXT})*\s*\])')
"""Within a turn's text every quotation mark has a backslash, so this matches there never."""

_SHOWN = 3


def picture_misfits(config: GraceConfig, student: Checkpoint) -> Iterator[Finding]:
    """Pictures that no machine can fit into a sample."""
    area = student.pixels_per_token
    if area is not None and config.data.min_pixels // area >= config.data.max_tokens:
        yield problem(
            AREA,
            f"data.min_pixels ({config.data.min_pixels}) makes at least "
            f"{config.data.min_pixels // area} tokens of every picture, which is all of "
            f"data.max_tokens ({config.data.max_tokens}) or more",
            "lower the one or raise the other",
        )


def missing_data(config: GraceConfig) -> Iterator[Finding]:
    """Data root and annotation files that are not here, or that this user may not read."""
    source = config.data.source
    if not isinstance(source, ShareGPT4VData):
        return
    root, files = _places(source)
    missing = [str(path) for path in (root, *files) if not os.path.exists(path)]
    if missing:
        shown = missing[0] if not root.exists() else ", ".join(missing)
        yield problem(
            AREA,
            f"data.source: not on this machine: {shown}",
            "set data.source.root or GRACE_DATA_ROOT",
        )
    closed = [str(p) for p in (root, *files) if os.path.exists(p) and not os.access(p, os.R_OK)]
    if closed:
        yield problem(AREA, f"data.source: not readable: {', '.join(closed)}", "mend their rights")


def unfitting_pictures(config: GraceConfig, student: Checkpoint) -> Iterator[Finding]:
    """Pictures that are accepted, and then make their record too long."""
    area = student.pixels_per_token
    if area is not None and config.data.max_pixels // area >= config.data.max_tokens:
        yield warning(
            AREA,
            f"data.max_pixels: a picture of {config.data.max_pixels} pixels makes "
            f"{config.data.max_pixels // area} tokens, and with data.max_tokens "
            f"{config.data.max_tokens} its record goes to quarantine",
            "lower the one or raise the other",
        )


def check_data(config: GraceConfig, student: Checkpoint) -> Iterator[Finding]:
    """Root and annotation files are here, their first records sound, and pictures in place."""
    yield from picture_misfits(config, student)
    yield from unfitting_pictures(config, student)
    source = config.data.source
    if not isinstance(source, ShareGPT4VData):
        yield ok(AREA, f"{source.records:,} records are generated")
        return
    missing = [*missing_data(config)]
    yield from missing
    if not missing:
        yield from _sample(source, config.data.max_quarantined_share)


def _places(source: ShareGPT4VData) -> tuple[Path, list[Path]]:
    require_environment(source.root, "data.source.root")
    root = Path(source.root).expanduser()
    return root, [root / name for name in source.annotations]


def _sample(source: ShareGPT4VData, most: float) -> Iterator[Finding]:
    root, files = _places(source)
    for file in files:
        try:
            found = list(_first(root, file))
            # Where the first ones are unusable, others say nothing new; of a file that is not used
            # whole, many are others than those that count.
            if not problems(found) and source.limit is None:
                found += _spread(root, file, most)
        except OSError as error:
            yield problem(
                AREA,
                f"{file}: a picture cannot be looked up ({error})",
                f"see to the storage that holds {root}",
            )
        else:
            yield from found


def _first(root: Path, file: Path) -> Iterator[Finding]:
    """Whether the first records can be used. Raises OSError where the storage fails."""
    from grace_core.data.pictures import resolve_picture
    from grace_core.data.sharegpt4v import UnusableRecord, parse_record, read_records

    seen, reasons = 0, []
    try:
        for raw in islice(read_records([file]), SAMPLE):
            seen += 1
            try:
                for picture in parse_record(raw).images:
                    resolve_picture(root, picture)
            except UnusableRecord as error:
                reasons.append(f"record {raw.index}: {error}")
    except GraceError as error:
        yield problem(AREA, str(error), "mend the file, or name another one")
        return
    if not seen:
        yield problem(AREA, f"{file} holds no record", "name another annotation file")
    elif len(reasons) == seen:
        yield problem(
            AREA,
            f"{file}: none of the first {seen} records can be used ({reasons[0]})",
            "check data.source.root, below which the pictures must lie, and the file's schema",
        )
    elif reasons:
        yield warning(
            AREA,
            f"{file}: {len(reasons)} of the first {seen} records go to quarantine "
            f"({'; '.join(reasons[:_SHOWN])})",
            "look at these records before a long run",
        )
    else:
        yield ok(AREA, f"{file}: the first {seen} records and their pictures are sound")


def _spread(root: Path, file: Path, most: float) -> Iterator[Finding]:
    """Whether pictures are there that records name all over a file.

    Where more than `most` are missing beyond chance, of all or of a folder's, the preparation would
    end with that.

    Raises OSError where the storage fails.
    """
    from grace_core.data.pictures import resolve_picture
    from grace_core.data.quarantine import SMALLEST_FOLDER, described, top_folder
    from grace_core.data.sharegpt4v import UnusableRecord

    names, read = _named_pictures(file)
    step = math.ceil(len(names) / _LOOK_UPS)
    named, every, missing = Counter[str](), Counter[str](), Counter[str]()
    first = ""
    for name in names:
        folder = top_folder(name)
        named[folder] += 1
        if named[folder] > _LEAST and named[folder] % step:
            continue
        every[folder] += 1
        try:
            resolve_picture(root, name)
        except UnusableRecord as error:
            missing[folder] += 1
            first = first or str(error)
    if not missing:
        if every:
            yield ok(AREA, f"{file}: {every.total():,} pictures named all over it are in place")
        return
    folders = [
        folder
        for folder, count in missing.most_common()
        if named[folder] / read >= SMALLEST_FOLDER and _is_more(count, every[folder], most)
    ]
    shown = described(folders or [name for name, _ in missing.most_common()], every, missing, root)
    text = (
        f"{file}: {missing.total():,} of {every.total():,} pictures named all over it cannot be "
        f"used ({first}); below {root}: {shown}"
    )
    if folders or _is_more(missing.total(), every.total(), most):
        yield problem(
            AREA,
            f"{text}; data.max_quarantined_share is {most:g}",
            "bring the pictures to their places, take these records out of the file, or raise "
            "data.max_quarantined_share to train without them",
        )
    else:
        yield warning(AREA, text, "their records go to quarantine; look at them before a long run")


def _is_more(found: int, looked_at: int, share: float) -> bool:
    """Whether a sample shows more than `share`, by the upper tail of its binomial distribution."""
    if share == 0 or found <= share * looked_at:
        return share == 0 and found > 0
    tail = (
        math.lgamma(looked_at + 1)
        - math.lgamma(count + 1)
        - math.lgamma(looked_at - count + 1)
        + count * math.log(share)
        + (looked_at - count) * math.log1p(-share)
        for count in range(found, looked_at + 1)
    )
    return sum(map(math.exp, tail)) < _CHANCE


def _named_pictures(file: Path) -> tuple[list[str], float]:
    """Pictures that records name in evenly spaced places of the file, in order; and the part of
    it that was read, in (0, 1]."""
    names: dict[str, None] = {}
    size = file.stat().st_size
    step = max(_PLACE_BYTES, size // _PLACES)
    with file.open("rb") as stream:
        for start in range(0, size, step):
            stream.seek(start)
            text = stream.read(_PLACE_BYTES).decode("utf-8", errors="replace")
            for match in _PICTURE_FIELD.finditer(text):
                value = json.loads(match[1], strict=False)
                names.update(dict.fromkeys([value] if isinstance(value, str) else value))
    return list(names), _PLACE_BYTES / step


def estimated_size(source: ShareGPT4VData) -> float:
    """Bytes of the prepared data, from the first records of each file: the pictures as they are,
    and about as much for tokens and labels as twice the text. 0 where nothing can be read."""
    from grace_core.data.pictures import resolve_picture
    from grace_core.data.sharegpt4v import UnusableRecord, parse_record

    root, _ = _places(source)
    size = 0.0
    for records, sample in _first_records(source):
        texts, pictures = 0, 0
        for raw in sample:
            texts += _text_bytes(raw)
            try:
                paths = [resolve_picture(root, name) for name in parse_record(raw).images]
            except UnusableRecord:
                continue  # goes to quarantine, which is text alone
            pictures += sum(path.stat().st_size for path in paths)
        size += records * (pictures + 2 * texts) / len(sample)
    return size


def estimated_text(source: ShareGPT4VData) -> tuple[float, float]:
    """Records, and bytes of their text, likewise."""
    amounts = [
        (records, records * sum(map(_text_bytes, sample)) / len(sample))
        for records, sample in _first_records(source)
    ]
    return sum(records for records, _ in amounts), sum(text for _, text in amounts)


def _first_records(source: ShareGPT4VData) -> Iterator[tuple[float, list[RawRecord]]]:
    """Of each file that can be read (`check_data` tells of others): about how many records are
    used of it, and the first ones."""
    from grace_core.data.sharegpt4v import read_records

    left = float("inf") if source.limit is None else float(source.limit)
    for file in _places(source)[1]:
        try:
            sample = list(islice(read_records([file]), SAMPLE))
        except GraceError:
            continue
        if sample:
            mean = sum(map(_text_bytes, sample)) / len(sample)
            records = min(left, file.stat().st_size / mean)
            left -= records
            yield records, sample


def _text_bytes(raw: RawRecord) -> int:
    return len(json.dumps(raw.value, ensure_ascii=False).encode())
