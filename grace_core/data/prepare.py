"""From annotation records to the Arrow data set that training reads.

Every record ends in exactly one place: `train`, `held_out` or `quarantine.jsonl`. Equal input gives
equal bytes, so the content digest of the result says whether two preparations are the same: nothing
written here holds a time, a random number, a memory address or a path of the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from datasets import DatasetInfo, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image

from grace_core.data.chat import ConversationEncoder
from grace_core.data.pictures import open_picture, read_picture
from grace_core.data.quarantine import Quarantined
from grace_core.data.sharegpt4v import (
    RawRecord,
    Reason,
    Record,
    UnusableRecord,
    given_id,
    parse_record,
)
from grace_core.errors import GraceError

PictureTokens = Callable[[Image.Image], tuple[tuple[int, int, int], int]]
"""Of an RGB picture: its grid (patches in time, height, width, before merging) and the number of
image tokens it takes in the sequence, by the rule of the model's image processor."""

FEATURES = Features(
    {
        "record_id": Value("string"),
        "record_index": Value("int64"),
        "input_ids": List(Value("int32")),
        "labels_mask": List(Value("bool")),
        "images": List(Value("binary")),
        "image_grids": List(List(Value("int32"))),
        "num_tokens": Value("int32"),
        "num_supervised": Value("int32"),
    }
)
"""`input_ids` with image placeholders expanded, `labels_mask` true for supervised tokens, `images`
encoded as found, `image_grids` (t, h, w) of each."""

TRAIN, HELD_OUT, QUARANTINE = "train", "held_out", "quarantine.jsonl"

_ROWS_PER_BATCH = 1000
_BYTES_PER_BATCH = 64 << 20
_BYTES_PER_SHARD = 500 << 20
_RECORDS_PER_REPORT = 100


@dataclass(frozen=True)
class PreparationReport:
    """Counts of a preparation, finished or under way."""

    records: int = 0
    """All that were read: `used + quarantined`."""
    used: int = 0
    """Written to `train` or `held_out`."""
    quarantined: int = 0
    held_out: int = 0
    """Those of `used` that are kept from training."""
    tokens: int = 0
    """Of all used records, image tokens included."""
    supervised_tokens: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Quarantined records by reason."""


def prepare(
    records: Iterable[RawRecord],
    *,
    root: Path,
    tokenizer: Any,
    image_token_id: int,
    picture_tokens: PictureTokens,
    max_tokens: int,
    max_decoded_pixels: int,
    max_quarantined_share: float,
    held_out_share: float,
    seed: int,
    out: Path,
    on_progress: Callable[[PreparationReport], None] | None = None,
) -> PreparationReport:
    """Write `out/train` and `out/held_out` (`datasets.load_from_disk`) and `out/quarantine.jsonl`.

    A record goes to `held_out` by a hash of `seed` and its first picture's path (its index without
    one), whatever else is in the data: records with the same first path stay on one side. The same
    picture under another path, or as a later one of a record, may be on both. Two elements that
    are equal as JSON, id included, are one record: the later is quarantined. A record
    of more than `max_tokens` tokens is quarantined and never cut, since a cut could part a picture
    from its text.

    Args:
        records: from `read_records`.
        root: folder below which every picture must lie.
        tokenizer: of the checkpoint, with its chat template.
        image_token_id: from the model's configuration.
        picture_tokens: rule of the model's image processor.
        max_decoded_pixels: width x height of the largest picture that is decoded.
        max_quarantined_share: in [0, 1], of all records and of those of each folder of `root`.
        held_out_share: in [0, 1).
        out: an existing folder without these names in it; the caller gives it its final name.
        on_progress: called with the counts so far every 100 records, and at the end.

    Raises:
        GraceError: the root is missing, the template does not fit, a file is damaged, the storage
            fails, more is quarantined than may be, or nothing is left to train on.
    """
    if not root.is_dir():
        raise GraceError(f"picture root {root} is no folder; set data.source.root")
    encoder = ConversationEncoder(tokenizer, image_token_id)
    seen: set[bytes] = set()
    counts: Counter[str] = Counter()
    quarantined = Quarantined()

    def report() -> PreparationReport:
        return PreparationReport(**counts, reasons=dict(sorted(quarantined.reasons.items())))

    with (
        _ArrowFolder(out / TRAIN) as train,
        _ArrowFolder(out / HELD_OUT) as held_out,
        (out / QUARANTINE).open("x", encoding="ascii") as quarantine,
    ):
        for raw in records:
            counts["records"] += 1
            pictures: tuple[str, ...] = ()
            try:
                record = parse_record(raw)
                pictures = record.images
                _refuse_duplicate(raw, seen)
                row = _row(
                    raw.index, record, root, encoder, picture_tokens, max_tokens, max_decoded_pixels
                )
            except UnusableRecord as error:
                counts["quarantined"] += 1
                quarantined.count(raw.index, pictures, error)
                quarantine.write(json.dumps(_quarantine_entry(raw, error)) + "\n")
            else:
                quarantined.count(raw.index, pictures)
                is_held_out = _draw(seed, _drawn_by(raw.index, record)) < held_out_share
                (held_out if is_held_out else train).write(row)
                counts["used"] += 1
                counts["held_out"] += is_held_out
                counts["tokens"] += row["num_tokens"]
                counts["supervised_tokens"] += row["num_supervised"]
            if on_progress is not None and counts["records"] % _RECORDS_PER_REPORT == 0:
                on_progress(report())

    final = report()
    if final.used == final.held_out:
        reasons = quarantined.reasons.most_common()
        listed = ", ".join(f"{count} x {reason}" for reason, count in reasons)
        raise GraceError(
            f"none of {final.records} records is left for training ({final.held_out} held out; "
            f"quarantined: {listed or 'none'}); check data.source and data.held_out_share"
        )
    quarantined.require_at_most(max_quarantined_share, final.records, root)
    if on_progress is not None:
        on_progress(final)
    return final


def _row(
    index: int,
    record: Record,
    root: Path,
    encoder: ConversationEncoder,
    picture_tokens: PictureTokens,
    max_tokens: int,
    max_decoded_pixels: int,
) -> dict[str, Any]:
    images: list[bytes] = []
    grids: list[list[int]] = []
    token_counts: list[int] = []
    for name in record.images:
        try:
            content = read_picture(root, name, max_decoded_pixels)
        except OSError as error:
            raise GraceError(
                f"picture {name[:120]!r} of record {index} cannot be read, through no fault of its "
                f"own ({error.strerror}); see to the storage that holds {root} and start again"
            ) from error
        try:
            grid, count = picture_tokens(open_picture(content, max_decoded_pixels))
        except UnusableRecord as error:
            raise UnusableRecord(error.reason, f"{name[:120]!r}: {error.detail}") from error
        images.append(content)
        grids.append(list(grid))
        token_counts.append(count)
    encoded = encoder.encode(record.turns, token_counts)
    num_tokens = len(encoded.input_ids)
    if num_tokens > max_tokens:
        raise UnusableRecord(Reason.TOO_LONG, f"{num_tokens} tokens, at most {max_tokens}")
    num_supervised = sum(encoded.labels_mask)
    assert num_supervised > 0, "an answer has text, so it has tokens"
    return {
        "record_id": record.record_id,
        "record_index": index,
        "input_ids": encoded.input_ids,
        "labels_mask": encoded.labels_mask,
        "images": images,
        "image_grids": grids,
        "num_tokens": num_tokens,
        "num_supervised": num_supervised,
    }


def _refuse_duplicate(raw: RawRecord, seen: set[bytes]) -> None:
    # Half a SHA-256: 16 bytes a record, and no two of 10^9 records meet by chance.
    text = json.dumps(raw.value, sort_keys=True)
    digest = hashlib.sha256(text.encode("ascii")).digest()[:16]
    if digest in seen:
        raise UnusableRecord(Reason.DUPLICATE, "equal to an earlier record in every field")
    seen.add(digest)


def _quarantine_entry(raw: RawRecord, error: UnusableRecord) -> dict[str, Any]:
    return {
        "index": raw.index,
        "id": given_id(raw.value),
        "source": raw.source_file,
        "reason_class": error.reason.value,
        "detail": error.detail,
    }


def _drawn_by(index: int, record: Record) -> str:
    """What decides on which side a record falls: its first picture, or its index without one."""
    return record.images[0] if record.images else f"#{index}"


def _draw(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}:{key}".encode(errors="surrogatepass")).digest()
    # 53 bits: every value is a float exactly, and none rounds up to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


class _ArrowFolder:
    """A folder in the layout of `Dataset.save_to_disk`, written row by row.

    `datasets` itself would first collect the rows in its cache and give the result a fingerprint
    that depends on it; here the fingerprint is the digest of the rows.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._shards: list[Path] = []
        self._writer: ArrowWriter | None = None
        self._shard_bytes = 0
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        # Five bytes a token: an int32 and a truth value.
        self._bytes += sum(map(len, row["images"])) + 5 * row["num_tokens"]
        if len(self._rows) >= _ROWS_PER_BATCH or self._bytes >= _BYTES_PER_BATCH:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()
        elif self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        if self._writer is None:
            shard = self._folder / f"{len(self._shards)}.partial"
            self._shards.append(shard)
            self._writer = ArrowWriter(features=FEATURES, path=str(shard))
        columns = {name: [row[name] for row in self._rows] for name in FEATURES}
        self._writer.write_batch(columns)
        self._shard_bytes += self._bytes
        self._rows, self._bytes = [], 0
        if self._shard_bytes >= _BYTES_PER_SHARD:
            self._end_shard()

    def _end_shard(self) -> None:
        assert self._writer is not None
        self._writer.finalize()
        self._writer.close()
        self._writer, self._shard_bytes = None, 0

    def _finish(self) -> None:
        if self._rows or not self._shards:
            self._flush()
        if self._writer is not None:
            self._end_shard()
        digest = hashlib.sha256()
        names = []
        for number, shard in enumerate(self._shards):
            with shard.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            names.append(f"data-{number:05d}-of-{len(self._shards):05d}.arrow")
            os.replace(shard, self._folder / names[-1])
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        _write_json(self._folder / "dataset_info.json", asdict(DatasetInfo(features=FEATURES)))
        _write_json(self._folder / "state.json", state)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    # Keys are not sorted: the order of the features is that of the columns.
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
