"""How many records may be left out before it is taken for a mistake.

A few bad records are in all public data. Many of them, or most of one folder's, mean that pictures
are not where they should be, and training on the rest would be training on other data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from grace_core.data.sharegpt4v import UnusableRecord
from grace_core.errors import GraceError

SMALLEST_FOLDER = 100
"""Records; in a folder of fewer, one bad picture would be a large share."""

_SHOWN = 8  # folders, and reasons with an example


def top_folder(picture: str) -> str:
    """The folder of the root that a picture is in: `coco` of `coco/train2017/1.jpg`."""
    parts = PurePosixPath(picture).parts
    return parts[0] if len(parts) > 1 else "."


class Quarantined:
    """Counts of records, those in quarantine by reason and by folder of their pictures."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._all: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()

    def count(
        self, index: int, pictures: Sequence[str], error: UnusableRecord | None = None
    ) -> None:
        """One record: its pictures, as far as they are known, and why it cannot be used."""
        folders = {top_folder(picture) for picture in pictures}
        self._all.update(folders)
        if error is not None:
            self.reasons[error.reason.value] += 1
            self._examples.setdefault(error.reason.value, f"record {index}: {error.detail}")
            self._bad.update(folders)

    def require_at_most(self, share: float, records: int, root: Path) -> None:
        """Raise GraceError where more than `share` is in quarantine, of all or of a folder's."""
        quarantined = self.reasons.total()
        folders = over(share, self._all, self._bad)
        if quarantined <= share * records and not folders:
            return
        reasons = "; ".join(
            f"{count:,} x {reason} ({self._examples[reason]})"
            for reason, count in self.reasons.most_common(_SHOWN)
        )
        where = described(folders, self._all, self._bad, root)
        raise GraceError(
            f"{quarantined:,} of {records:,} records cannot be used, and "
            f"data.max_quarantined_share is {share:g}: {reasons}"
            f"{f'; below {root}: {where}' if where else ''}. Bring missing pictures to their "
            "places, take these records out of the annotation files, or raise "
            "data.max_quarantined_share to train without them"
        )


def over(share: float, every: Mapping[str, int], bad: Mapping[str, int]) -> list[str]:
    """The folders with more than `share` of their records in quarantine, most records first."""
    found = [
        folder
        for folder, count in bad.items()
        if every[folder] >= SMALLEST_FOLDER and count > share * every[folder]
    ]
    return sorted(found, key=lambda folder: (-bad[folder], folder))


def described(
    folders: Iterable[str], every: Mapping[str, int], bad: Mapping[str, int], root: Path
) -> str:
    """`coco 12 of 12 (there is no such folder), sam 3 of 100`."""
    listed = [
        f"{folder} {bad[folder]:,} of {every[folder]:,}"
        f"{'' if (root / folder).is_dir() else ' (there is no such folder)'}"
        for folder in folders
    ]
    return ", ".join([*listed[:_SHOWN], *(["..."] if len(listed) > _SHOWN else [])])
