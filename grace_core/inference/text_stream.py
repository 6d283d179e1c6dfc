"""Text of tokens as they come."""

from __future__ import annotations

from typing import Any

_CUT = "\N{REPLACEMENT CHARACTER}"
"""What decoding ends with while the last character's further bytes are still to come."""


class TextStream:
    """Turns tokens into text, piece by piece; the pieces together are the text of all tokens.

    A token's text depends on the one before (a space may belong to neither alone), so tokens are
    decoded with those of the piece before.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """What one more token adds: nothing while a character is incomplete."""
        self._ids.append(token)
        text = self._new_text()
        return "" if text.endswith(_CUT) else self._taken(text)

    def rest(self) -> str:
        """What is left when no token follows, incomplete characters as replacement characters."""
        return self._taken(self._new_text())

    def _taken(self, text: str) -> str:
        if text:
            self._context, self._shown = self._shown, len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decoded(self._ids[self._context : self._shown])
        return self._decoded(self._ids[self._context :])[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
