"""Errors a user can mend.

Every message says what is wrong, where it is, and what to do about it. Anything that is a bug of
this package rather than a mistake of its user is an assertion or an ordinary Python exception.
"""

from __future__ import annotations

from collections.abc import Sequence


class GraceError(Exception):
    """A problem whose message tells the user what, where and how to mend it."""


class ConfigError(GraceError):
    """A configuration with one or more problems, all listed at once."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = list(problems)
        count = len(self.problems)
        noun = "problem" if count == 1 else "problems"
        lines = [f"{source}: {count} {noun}", *(f"  - {problem}" for problem in self.problems)]
        super().__init__("\n".join(lines))
