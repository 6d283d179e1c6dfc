"""Rows of parquet, TSV, JSON Lines and Arrow files, one at a time and as they are."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grace_core.errors import GraceError
from grace_core.evaluation.loading.data_files import FORMATS

_BATCH_ROWS = 32
"""Rows decoded at once: enough to be fast, few enough that their pictures fit in memory."""


@dataclass(frozen=True)
class RawRow:
    """One row before its values are checked."""

    where: str
    """File, and line or row, for messages."""

    values: dict[str, Any]
    sparse: bool = False
    """Whether keys without a value may be left out, as in JSON Lines."""


def read_rows(file: Path, columns: Collection[str]) -> Iterator[RawRow]:
    """The rows of a file; its form is told by its name.

    Args:
        columns: read these alone, as far as the file has them.

    Raises:
        GraceError: the file cannot be read, naming line or row where that is known.
    """
    readers = {
        ".parquet": _read_parquet,
        ".tsv": _read_tsv,
        ".jsonl": _read_jsonl,
        ".arrow": _read_arrow,
    }
    if file.suffix not in readers:
        raise GraceError(f"{file}: no benchmark rows; expected one of {', '.join(FORMATS)}")
    try:
        yield from readers[file.suffix](file, columns)
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise GraceError(
            f"{file} cannot be read ({type(error).__name__}: {error}); download it again"
        ) from error


def _read_parquet(file: Path, columns: Collection[str]) -> Iterator[RawRow]:
    with pq.ParquetFile(file) as table:
        wanted = [name for name in table.schema_arrow.names if name in columns]
        batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted)
        yield from _rows_of(file, batches)


def _read_arrow(file: Path, columns: Collection[str]) -> Iterator[RawRow]:
    """Arrow's stream form, as `datasets.Dataset.save_to_disk` writes it."""
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as reader:
        wanted = [name for name in reader.schema.names if name in columns]
        small = (
            batch.select(wanted).slice(start, _BATCH_ROWS)
            for batch in reader
            for start in range(0, batch.num_rows, _BATCH_ROWS)
        )
        yield from _rows_of(file, small)


def _rows_of(file: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield RawRow(f"{file.name} row {number}", values)


def _read_tsv(file: Path, columns: Collection[str]) -> Iterator[RawRow]:
    """Every value is text, "None", "NA" and "nan" too; an empty cell is "".

    Cells may be quoted, and hold line breaks and pictures of several megabytes.
    """
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t")
        for values in reader:
            where = f"{file.name}:{reader.line_num}"
            if None in values or None in values.values():
                raise GraceError(
                    f"{where}: the number of cells is not that of the header "
                    f"({len(reader.fieldnames or [])}); mend or download the file again"
                )
            kept = {name: values[name] for name in values if name in columns}
            yield RawRow(where, kept)


def _read_jsonl(file: Path, columns: Collection[str]) -> Iterator[RawRow]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file.name}:{number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise GraceError(f"{where}: not JSON: {error}; mend or remove the line") from error
            if not isinstance(values, dict):
                raise GraceError(f"{where}: not a JSON object; mend or remove the line")
            kept = {name: values[name] for name in values if name in columns}
            yield RawRow(where, kept, sparse=True)
