"""One option letter as it stands in running text: bare, labelled, quoted, emphasised or boxed."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

END_MARKS = " \t\r\n.!?,;:。！？，；："
"""What may follow a letter that stands for a whole answer."""

_MATES = {**dict(zip("`*_\"'“‘(（[{$", "`*_\"'”’)）]}$", strict=True)), "**": "**", "__": "__"}
_OPENER = re.compile(
    r"(?:(?P<name>(?:option|choice)\b\s*[:：]?)"
    r"|\\(?:text|textbf|mathrm|mathbf)\s*(?P<latex>\{)"
    r"|(?P<mark>\*\*|__|[`*_\"'“‘(（\[{$]))\s*",
    re.IGNORECASE,
)
_BEFORE = ":：=,，;；"
_INNER = ".:：!?。！？"
_EMPHASIS = ("**", "__", "*", "_")
_EMPHASISED_LABEL = re.compile(r"[.):：][ \t]+[^\s*_]")
_LABEL_MARKS = (".", ":", ")", "：")
# "B.com", "C:/path", "A-list" and "B's" are no letters of options; "B/C" are two.
_GOES_ON = re.compile(r"[.:\-'’][^\W_]|[.:\-'’][/_]")
_CONNECTOR = re.compile(
    r"(?:and\s*/\s*or\b|and\b|or\b|[/&,+|]|或者|或|和|또는|か|と)\s*", re.IGNORECASE
)


@dataclass(frozen=True)
class Token:
    """A letter and what follows it."""

    letter: str
    """In upper case."""

    rest: str
    wrapped: bool
    """In quotes, brackets or emphasis."""

    capital: bool
    """Written in upper case."""

    @property
    def alone(self) -> bool:
        """Nothing but punctuation follows."""
        return not self.rest.strip(END_MARKS)

    @property
    def labels(self) -> bool:
        """Followed by a mark that makes it a label, as in "B. the nucleus"."""
        return self.rest.lstrip().startswith(_LABEL_MARKS)

    @property
    def has_rival(self) -> bool:
        """A second letter is offered beside it: "B or C", "B/C", "B C"."""
        rest = self.rest.lstrip(" \t")
        label = rest.startswith(_LABEL_MARKS)
        if label:
            rest = rest[1:].lstrip(" \t")
        connector = _CONNECTOR.match(rest)
        if connector:
            return rest.startswith("/") or read_token(rest[connector.end() :]) is not None
        if label or rest.startswith(("\n", "\r")):
            return False
        other = read_token(rest)
        return other is not None and other.alone


def read_token(text: str, ending: str = "") -> Token | None:
    """The ASCII letter that `text` starts with, a word of its own; None where there is none.

    Blanks, separators, "option" and opening marks may stand before it; whatever opens must close
    after it, punctuation within allowed ("**B.**"), or emphasis a whole label ("**B. blue**").

    ending: a grammatical ending that may be joined to the letter, as in Korean and Japanese.
    """
    text = text.lstrip().lstrip(_BEFORE).lstrip()
    closers: list[str] = []
    named = False
    while opener := _OPENER.match(text):
        if opener["name"]:
            if named:
                break
            named = True
        else:
            closers.append("}" if opener["latex"] else _MATES[opener["mark"]])
        text = text[opener.end() :]
    if not (text[:1].isascii() and text[:1].isalpha()):
        return None
    letter, rest = text[0], text[1:].removeprefix(ending)
    if joins(rest[:1]) and not (closers and rest.startswith(closers[-1])):
        return None
    if closers and _EMPHASISED_LABEL.match(rest) and all(each in _EMPHASIS for each in closers):
        return Token(letter.upper(), rest, True, letter.isupper())
    within = ""
    for closer in reversed(closers):
        rest = rest.lstrip()
        bare = rest.lstrip(_INNER if closer == ")" else _INNER + ")")
        within += rest[: len(rest) - len(bare)]
        rest = bare.lstrip()
        if not rest.startswith(closer):
            return None
        rest = rest[len(closer) :]
    rest = within + rest
    if joins(rest[:1]) or _GOES_ON.match(rest):
        return None
    return Token(letter.upper(), rest, bool(closers), letter.isupper())


def joins(character: str) -> bool:
    """Whether a character beside a letter makes it part of a word, whatever the script."""
    return character != "" and (
        character.isalnum()
        or character == "_"
        or unicodedata.category(character)[0] == "M"
        or unicodedata.category(character) == "Cf"
    )
