"""The bench's tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(
    heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A heading, a table of text cells and, below it, notes; ends with a newline."""
    lines = [columns, ["---"] * len(columns), *rows]
    text = [heading, "", *(f"| {' | '.join(line)} |" for line in lines)]
    if notes:
        text += ["", *notes]
    return "\n".join(text) + "\n"
