"""What GRACE's flow runs say about themselves in Prefect beyond Prefect's own states."""

from __future__ import annotations

NOTHING_NEW = "Nothing new"
"""Name of the completed state of a scheduled run that found neither data nor teacher changed."""

REJECTED = "Rejected"
"""Name of the completed state of a publication that a person refused."""

STAGE_LABEL = "grace.stage"
"""Label of a flow run: the stage it is at, or was at when it ended."""
