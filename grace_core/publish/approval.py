"""Who allowed a publication. Recorded beside what was published, and never part of what it is."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field


class Approval(BaseModel):
    """A person's consent to send the releases to their destination."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str = Field(min_length=1, description="name of the person")
    at: str = Field(description="UTC, ISO 8601")
    note: str = ""

    @classmethod
    def now(cls, by: str, note: str = "") -> Approval:
        return cls(by=by, at=datetime.now(UTC).isoformat(timespec="seconds"), note=note)
