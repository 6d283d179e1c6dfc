"""What the parts of the page are made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from grace_core.evaluation.report.resampling import Interval


def table(
    heads: Sequence[str], rows: Sequence[str], caption: str = "", *, sortable: bool = False
) -> str:
    cells = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    kind = ' class="sortable"' if sortable else ""
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    # A region that scrolls must be reachable by keyboard.
    return (
        f'<div class="wide" tabindex="0"><table{kind}>{named}<thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def ends(interval: Interval, form: str = ".1f") -> str:
    return f"{interval.low:{form}} … {interval.high:{form}}"
