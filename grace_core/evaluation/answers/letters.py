"""The option letter that a response settles on, or none.

A response that settles on none is a *parse failure*: it scores as wrong and is counted on its own,
never turned into a guess. The rule follows lmms-eval's rewritten extractor: containers over
declarations over bare labels.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_OPEN = r"[\s*_`\"'“‘(\[{$]*"
_CLOSE = r"[*_`\"'”’)\]}$.,:;!?]*"
# One ASCII letter that is a word of its own: "DNA", "A-frame", "D's" and "1.b" hold none.
_LETTER = r"(?<![A-Za-z0-9])(?P<letter>[A-Za-z])(?![A-Za-z0-9]|['’\-][A-Za-z])"
_VERB = r"(?:is|was|would\ be|should\ be|must\ be|will\ be)"

_CONTAINER = re.compile(
    r"<answer>(?P<tag>.*?)</answer>|\\boxed\{(?:\\(?:text|textbf|mathrm|mathbf)\{)?(?P<box>[^{}]*)\}",
    re.IGNORECASE | re.DOTALL,
)
# Says "here comes the answer"; whatever follows is what was declared, readable or not.
_ANSWER = re.compile(
    rf"\banswer\b[*_`\"')]*\s*(?:{_VERB}\b\s*:?|[:=>])|答案[是为][：:]?|答えは|정답은",
    re.IGNORECASE,
)
# Counts only when a letter follows: "the option is expensive" declares nothing.
_CHOICE = re.compile(
    rf"\b(?:option|choice)\b\s*(?:{_VERB}\b\s*:?|:)"
    r"|\bI(?:\ would|\ will|'d|'ll)?\ (?:choose|select|pick)\b|选",
    re.IGNORECASE,
)
_CONFIRMED = re.compile(
    rf"\b(?:option|choice)\s+{_OPEN}{_LETTER}{_CLOSE}\s+is\s+(?:the\s+)?(?:correct|right|best)\b",
    re.IGNORECASE,
)
_DECLARED = re.compile(
    rf"{_OPEN}(?:(?:option|choice|letter)\s+)?{_OPEN}{_LETTER}(?P<close>{_CLOSE})", re.IGNORECASE
)
_ANOTHER = re.compile(rf"\s*(?:or|and|/|,|&|\|)\s*{_OPEN}[A-Za-z](?![A-Za-z0-9])", re.IGNORECASE)
_REASON = re.compile(r"\s+(?:because|since|as|due|for|and|but|is)\b", re.IGNORECASE)

_WHOLE = re.compile(rf"{_OPEN}(?:(?:option|choice)\s+)?{_OPEN}{_LETTER}{_CLOSE}\s*", re.IGNORECASE)
_LINE = re.compile(rf"^{_OPEN}{_LETTER}{_CLOSE}[ \t]*$", re.MULTILINE)
_LEADING = re.compile(
    rf"\s*[*_`\"'(\[]*{_LETTER}(?:[)\].:]+[*_`\"']*(?=\s)|[*_`]+(?=\s)|(?=\s+(?:because|since)\b))"
)
_PARENTHESISED = re.compile(r"\((?P<letter>[A-Z])\)")
_CONCLUDING = re.compile(rf"[,:;]\s+[*_`(]*{_LETTER}{_CLOSE}\s*\Z")
_REFUSAL = re.compile(
    r"\b(?:can(?:not|'t|’t)|could\ not|couldn't|unable\ to|impossible\ to)\s+(?:be\s+)?"
    r"(?:determine|tell|answer|decide|say|help)|\bI\ (?:don't|don’t|do\ not)\ know\b",
    re.IGNORECASE,
)


def extract_letter(response: str, letters: Collection[str]) -> str:
    """The option letter that `response` settles on, or "" where there is no such thing.

    `letters` are the item's own, upper-case ("A", "B", ...). In this order: the last
    `<answer>...</answer>` or `\\boxed{...}`; else the last explicit declaration ("the answer is
    B", "I choose B", "option B is correct"); else a label that stands for the whole answer ("B",
    "(b) the nucleus", "... matches (C)."), if all labels agree. The kind found first decides: a
    last declaration that names no letter, several letters or a letter outside `letters` gives "".

    Reasoning in `<think>` tags is not looked at specially; remove it before.
    """
    text = response.strip()
    containers = list(_CONTAINER.finditer(text))
    if containers:
        last = containers[-1]
        content = last["tag"] if last["tag"] is not None else last["box"]
        found = _read_declared(content)
    elif "</answer>" in text.lower():
        found = ""  # closed but never opened: what it should have held is not known
    else:
        declared = _last_declaration(text)
        found = _read_labels(text) if declared is None else declared
    return found if found in letters else ""


def _last_declaration(text: str) -> str | None:
    """Letter of the last declaration; "" when it names none; None without any declaration."""
    declarations = [
        (match.end(), _read_declared(text[match.end() :])) for match in _ANSWER.finditer(text)
    ]
    for match in _CHOICE.finditer(text):
        letter = _read_declared(text[match.end() :])
        if letter:
            declarations.append((match.end(), letter))
    declarations += [(match.end(), match["letter"].upper()) for match in _CONFIRMED.finditer(text)]
    return max(declarations)[1] if declarations else None


def _read_declared(text: str) -> str:
    """Letter at the start of `text`, unless it is an article or one of several alternatives."""
    match = _DECLARED.match(text)
    if match is None:
        return ""
    rest = text[match.end() :]
    if _ANOTHER.match(rest) or (match["close"] == "," and _ANOTHER.match("," + rest)):
        return ""
    letter = match["letter"].upper()
    # "The answer is a dog": before another word, "a" is the article and "I" the pronoun.
    followed = not match["close"] and re.match(r"[ \t]+\w", rest)
    if letter in "AI" and followed and not _REASON.match(rest):
        return ""
    return letter


def _read_labels(text: str) -> str:
    """The one letter used as a label; "" when there is none, several, or a refusal."""
    whole = _WHOLE.fullmatch(text)
    if whole:
        return whole["letter"].upper()
    if _REFUSAL.search(text):
        return ""
    labels = {match["letter"] for match in _LINE.finditer(text) if match["letter"].isupper()}
    labels |= {match["letter"] for match in _PARENTHESISED.finditer(text)}
    labels |= {line["letter"].upper() for line in map(_LEADING.match, text.splitlines()) if line}
    concluding = _CONCLUDING.search(text)
    if not labels and concluding and concluding["letter"].isupper():
        labels = _mentions(text)
    return labels.pop() if len(labels) == 1 else ""


def _mentions(text: str) -> set[str]:
    """Upper-case letters that stand alone, without the article "A" and the pronoun "I"."""
    return {
        match["letter"]
        for match in re.finditer(_LETTER, text)
        if match["letter"].isupper()
        and not (match["letter"] in "AI" and re.match(r"\s+[a-z]", text[match.end() :]))
    }
