"""The release index, and the record of a publication under way.

Several repositories (BF16, W8, W4, ...) make one release, but a commit changes one of them. What
users can rely on is the *index*: `releases.json` names the commit of every model of a release that
is whole. It is written last, in one commit, and that commit is the switch from the old release to
the new one.

While a publication is under way, `publishing.json` stands beside it, on the same branch. It is the
writer's lease: every commit there is made on top of the one before, so a writer whose lease another
one took over cannot write any more, the index included. It also says which commits were on the main
branches before and what was staged, so that the next run can complete the publication or undo it.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field

INDEX = "releases.json"
JOURNAL = "publishing.json"

LEASE = timedelta(hours=1)
"""Without a sign of life for this long, a writer is given up for dead. Clocks need not agree to
keep the index right, only to be polite: whoever lost the lease cannot write the index."""

RENEWED_AFTER = LEASE / 6
"""Age at which a writer at work renews its lease."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IndexedModel(_Record):
    """One model of a release."""

    repository: str
    commit: str = Field(description="on the main branch; of a directory: its digest")
    tag: str | None = Field(description="names the commit and is never moved; None of a directory")
    digest: str = Field(description="SHA-256 over names and contents of the files")
    bytes: int


class ReleaseIndex(_Record):
    """What `releases.json` says: the release that is published."""

    format: int = 1
    release: str = Field(description="SHA-256 over all repositories and their contents")
    published: str = Field(description="UTC, ISO 8601")
    models: dict[str, IndexedModel] = Field(description="by label: bf16, w8, w4, ...")


class PlannedModel(_Record):
    """One model of a publication under way."""

    repository: str
    digest: str
    before: str = Field(description="commit that the main branch had")
    staged: str | None = Field(None, description="commit that was verified on the staging branch")
    tree: str | None = Field(None, description="digest over the staged files' ids on the Hub")


class Publication(_Record):
    """What `publishing.json` says: who publishes what, and how far it is."""

    format: int = 1
    owner: str = Field(description="stands for the run directory that publishes; tells no name")
    renewed: datetime = Field(description="last sign of life, UTC")
    release: str
    tag: str
    models: dict[str, PlannedModel]
    decided: bool = Field(
        False, description="all is staged and verified: main branches may have changed"
    )
    interrupted: Publication | None = Field(
        None, description="an earlier publication of another release, to be undone first"
    )

    def is_fresh(self, now: datetime) -> bool:
        """Whether its writer may still be at work."""
        return now - self.renewed < LEASE

    def to_text(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"


def now() -> datetime:
    """UTC, whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def tag_of(release: str) -> str:
    """The tag of a release that was given none: equal for equal contents, so never in the way."""
    return f"release-{release[:12]}"
