"""The training data: the files are here, and their first records are sound."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from grace_core.config.data import ShareGPT4VData
from grace_core.config.load import require_environment
from grace_core.config.tree import GraceConfig
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.doctor.findings import Finding, ok, problem, warning
from grace_core.errors import GraceError

if TYPE_CHECKING:
    from grace_core.data.sharegpt4v import RawRecord

AREA = "data"
SAMPLE = 20
"""Records that are looked at, of each annotation file."""

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
    """Root and annotation files are here, their first records sound and with their pictures."""
    yield from picture_misfits(config, student)
    yield from unfitting_pictures(config, student)
    source = config.data.source
    if not isinstance(source, ShareGPT4VData):
        yield ok(AREA, f"{source.records:,} records are generated")
        return
    missing = [*missing_data(config)]
    yield from missing
    if not missing:
        yield from _sample(source)


def _places(source: ShareGPT4VData) -> tuple[Path, list[Path]]:
    require_environment(source.root, "data.source.root")
    root = Path(source.root).expanduser()
    return root, [root / name for name in source.annotations]


def _sample(source: ShareGPT4VData) -> Iterator[Finding]:
    from grace_core.data.pictures import resolve_picture
    from grace_core.data.sharegpt4v import UnusableRecord, parse_record, read_records

    root, files = _places(source)
    for file in files:
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
            continue
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
