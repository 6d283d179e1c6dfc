"""Which files of a data set's repository hold a configuration's split.

The card says it (`configs` in the front matter of README.md); a repository without that is taken as
the Hub takes it: the split's name stands in the file's or the folder's. The same holds for a
repository that was downloaded to a folder.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from grace_core.errors import GraceError

FORMATS = (".parquet", ".tsv", ".jsonl", ".arrow")
"""Names of files that rows are read from."""

ALL_CONFIGURATIONS = "*"


def read_front_matter(card: str) -> dict[str, Any]:
    """The metadata of a README.md; empty where there are none.

    Raises GraceError where they are no mapping in YAML.
    """
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|\Z)", card, re.DOTALL)
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        raise GraceError(f"the front matter of README.md is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise GraceError("the front matter of README.md is no mapping")
    return found


def files_of_split(
    names: Sequence[str], metadata: dict[str, Any], config: str | None, split: str
) -> list[str]:
    """Files of one split, in the order in which their rows follow one another.

    Args:
        names: all files of the repository, as paths relative to it.
        metadata: as `read_front_matter` gives them.
        config: the data set's configuration; None where it has one only, "*" for every one that
            has the split, one after the other.

    Raises:
        GraceError: there is no such configuration or split; says which there are.
    """
    listed = metadata.get("configs") or []
    if not listed:
        return _by_name(names, config, split)
    known = {str(entry.get("config_name", "default")): entry.get("data_files") for entry in listed}
    if config == ALL_CONFIGURATIONS:
        chosen = list(known)
    elif config is None:
        default = [each for each in listed if each.get("default")] or listed
        chosen = ["default" if "default" in known else str(default[0].get("config_name"))]
        if chosen[0] != "default" and len(listed) > 1 and not listed[0].get("default"):
            raise GraceError(
                f"several configurations ({', '.join(known)}) and none of them is the default; "
                "set `config`"
            )
    else:
        chosen = [config]
    missing = [name for name in chosen if name not in known]
    if missing:
        raise GraceError(
            f"no configuration {missing[0]!r}; there are {', '.join(known)}: set `config`"
        )
    found: list[str] = []
    splits: set[str] = set()
    for name in chosen:
        patterns = _patterns(known[name])
        splits |= set(patterns)
        for pattern in patterns.get(split, []):
            found += sorted(each for each in names if fnmatch.fnmatchcase(each, pattern))
    if split not in splits:
        raise GraceError(f"no split {split!r}; there are {', '.join(sorted(splits))}: set `split`")
    if not found:
        raise GraceError(f"the card names files for the split {split!r}, but none of them is there")
    return found


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Split -> patterns of its files, whichever way the card writes it."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    found: dict[str, list[str]] = {}
    for entry in data_files or []:
        if isinstance(entry, str):
            found.setdefault("train", []).append(entry)
        else:
            path = entry["path"]
            found[str(entry["split"])] = [path] if isinstance(path, str) else list(path)
    return found


def _by_name(names: Sequence[str], config: str | None, split: str) -> list[str]:
    rows = [name for name in names if PurePosixPath(name).suffix in FORMATS]
    if config not in (None, ALL_CONFIGURATIONS):
        within = [name for name in rows if config in PurePosixPath(name).parts[:-1]]
        if not within and rows:
            folders = sorted({str(PurePosixPath(name).parent) for name in rows})
            raise GraceError(
                f"no folder {config!r} with rows; there are {', '.join(folders)}: set `config`"
            )
        rows = within
    exact = re.compile(rf"{re.escape(split)}(-\d{{5}}-of-\d{{5}})?")
    found = sorted(name for name in rows if exact.fullmatch(PurePosixPath(name).stem))
    found = found or sorted(name for name in rows if _names_split(name, split))
    if not found and len(rows) == 1:
        return rows  # a lone file is not called after its split
    if not found:
        shown = ", ".join(sorted(rows)[:5]) or f"no file of {', '.join(FORMATS)}"
        raise GraceError(
            f"no file of the split {split!r} (found: {shown}); set `split`, or `path` to one file"
        )
    return found


def _names_split(name: str, split: str) -> bool:
    """Whether the split is a word of the file's name, or the name of a folder above it."""
    path = PurePosixPath(name)
    return split in path.parts[:-1] or bool(
        re.search(rf"(?:^|[-_.]){re.escape(split)}(?:[-_.]|$)", path.stem)
    )
