"""How far our readers agree with recorded cases: `grace extract`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.answers.letters import extract_letter
from grace_core.evaluation.answers.mmmu import open_is_right, read_choice, read_open
from grace_core.evaluation.answers.yesno import extract_yes_no

_MMMU = "MMMU"
"""Authorities whose name starts so judge letters by MMMU's parser."""


@dataclass(frozen=True)
class CaseResult:
    """A case and what was read from its response."""

    case: Mapping[str, Any]
    found: str | bool

    @property
    def right(self) -> bool:
        """Equal to what is expected, or to what is expected of a rule for letters alone."""
        return self.found in (self.case["expected"], self.case.get("policy_expected"))


@dataclass(frozen=True)
class Agreement:
    """All cases of a file."""

    results: tuple[CaseResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Counts in all, by kind, and of the cases that all known implementations agree on."""
        kinds = dict.fromkeys(each.case["kind"] for each in self.results)
        unanimous = [each for each in self.results if each.case.get("agree") is True]
        return {
            **_counts(self.results),
            "kinds": {
                kind: _counts([each for each in self.results if each.case["kind"] == kind])
                for kind in kinds
            },
            "unanimous": _counts(unanimous),
            "differing": [
                {**each.case, "found": each.found} for each in self.results if not each.right
            ],
        }


def read_cases(file: Path) -> Agreement:
    """Run the readers over a file of cases.

    The file is a list of objects: `kind` (mcq, yesno, open), `response`, `expected`, for mcq
    `choices` (letter -> text), for open `gold` (a text or several); optional `authority` (MMMU's
    own parser reads letters where it starts so), `policy_expected` and `agree`.

    Raises GraceError naming the case that is malformed.
    """
    try:
        cases = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise GraceError(f"{file} cannot be read ({error.strerror}); mend its path") from error
    except ValueError as error:
        raise GraceError(f"{file} is not JSON: {error}") from error
    if not isinstance(cases, list) or not cases:
        raise GraceError(f"{file} is not a list of cases")
    results = []
    for number, case in enumerate(cases):
        try:
            results.append(CaseResult(case, _read(case)))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            name = case.get("id", number) if isinstance(case, dict) else number
            raise GraceError(
                f"{file}: case {name!r} cannot be read ({type(error).__name__}: {error}); "
                "it needs kind, response, expected, and choices or gold"
            ) from error
    return Agreement(tuple(results))


def _read(case: Mapping[str, Any]) -> str | bool:
    kind, response = case["kind"], case["response"] or ""
    case["expected"]  # a case without it tells nothing
    if kind == "yesno":
        return extract_yes_no(response)
    if kind == "open":
        gold = case["gold"]
        return open_is_right(read_open(response), [gold] if isinstance(gold, str) else gold)
    if kind != "mcq":
        raise ValueError(f"kind {kind!r} is none of mcq, yesno, open")
    if str(case.get("authority") or "").startswith(_MMMU):
        return read_choice(response, case["choices"])
    return extract_letter(response, case["choices"])


def _counts(results: tuple[CaseResult, ...] | list[CaseResult]) -> dict[str, Any]:
    right = sum(each.right for each in results)
    percent = 100.0 * right / len(results) if results else None
    return {"cases": len(results), "right": right, "percent": percent}
