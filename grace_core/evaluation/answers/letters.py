"""The option letter that a response settles on, or none.

A response that settles on none is a *parse failure*: it scores as wrong and is counted on its own,
never turned into a guess. The rule is that of lmms-eval's rewritten extractor
(`_task_utils/mcq_extract.py` at commit 00a12d40, and the contract in `test/eval/mcq_extract`):
containers over declarations over labels, the last of each, and no letter out of running text.

Where it would guess we differ: "the answer is a dog" names no option, and neither does a refusal
that mentions one. And we read what it leaves: "the answer would be B" and "I'd choose B" are
declarations here, "**B. blue**" is a label like "B. blue", and so is a capital in the first line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from grace_core.evaluation.answers.tokens import Token, joins, read_token

_OPENED = re.compile(r"<answer\b[^<>]*>|(?<![\w</])answer>", re.IGNORECASE)
_CLOSED = re.compile(r"</answer\s*>", re.IGNORECASE)
_BROKEN = re.compile(r"<answer\b(?![^<>]*>)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{", re.IGNORECASE)
_MARKUP = re.compile(r"</?\w")

_DECLARATION = re.compile(
    r"""
    (?<!\w)(?:answer|option|choice)\s*(?:is\b|[:：=])
    |(?<!\w)I\s+(?:choose|select|pick)\b
    |(?P<loose>
        (?<!\w)(?:answer|option|choice)\s+(?:would|should|must|will)\s+be\b
        |(?<!\w)I(?:\s+would|\s+will|['’]d|['’]ll)\s+(?:choose|select|pick)\b
    )
    |答案是|答案为|选
    |(?P<korean>옵션|정답은|답은|답\s*[:：])
    |(?P<japanese>答えは)
    |(?<!\w)option\s+(?P<confirmed>[a-z])(?!\w)\s+is\s+(?:the\s+)?(?:correct|right|best)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
# `loose` is ours; it declares nothing where no letter follows.
_ENDINGS = {"korean": "입니다", "japanese": "です"}
_WINDOW = 500
"""Characters after a declaration or a label that can belong to it."""

_ARTICLE = re.compile(r"[ \t]+(?!because\b|since\b|as\b|due\b|for\b|and\b|but\b|is\b)[a-z]")

_URL = re.compile(r"(?<!\w)(?:[a-z][a-z0-9+.\-]*://|www\.)\S*[^\s,;，；]", re.IGNORECASE)
_PARENTHESISED = re.compile(r"\(\s*(?P<letter>[A-Za-z])\s*\)|（\s*(?P<wide>[A-Za-z])\s*）")
_LABEL = re.compile(r"(?P<letter>[A-Za-z])[.):](?=\s|$)")
_ASSERTED = re.compile(
    r"\s*(?:because\b|(?:is|seems|looks|appears)\s+(?:(?:the|a)\s+)?"
    r"(?:correct|right|best|answer|option|choice)\b)",
    re.IGNORECASE,
)
_LINE_ENDS = re.compile(r"[ \t]*\n")
_RIVALS = re.compile(r"(?<!\w)[A-Z]\s*(?:[,/&+|]|and\b|or\b)\s*[A-Z](?!\w)")
_SEPARATORS = re.compile(r"[\n,;，；]")
_REFUSAL = re.compile(
    r"\b(?:can(?:not|['’]t)|could\ not|couldn['’]t|unable\ to|impossible\ to)\s+(?:be\s+)?"
    r"(?:determine|tell|answer|decide|say|help)|\bI\ (?:don['’]t|do\ not)\ know\b",
    re.IGNORECASE,
)


def extract_letter(response: str, letters: Collection[str]) -> str:
    """The option letter that `response` settles on, or "" where there is no such thing.

    `letters` are the item's own, in any case ("A", "B", ...). In this order: the content of the
    last `<answer>...</answer>` or `\\boxed{...}`; else the last declaration ("the answer is B", "I
    choose B", "option B is correct"); else a label that stands for the answer ("B", "(b) the
    nucleus", "... matches (C)."), if all labels agree. The kind found first decides: a last
    declaration that names no letter, several letters or a letter outside `letters` gives "".

    Reasoning in `<think>` tags is not looked at specially; remove it before.
    """
    text = response.strip()
    content = _last_container(text)
    if content is not None:
        found = _in_container(content)
    else:
        declared = _declared(text)
        found = _labelled(text) if declared is None else declared
    return found if found in {letter.upper() for letter in letters} else ""


def _last_container(text: str) -> str | None:
    """Content of the last container, "" where containers are malformed; None without any.

    An opening tag may stay open, up to the end of the text.
    """
    opened = list(_OPENED.finditer(text))
    closed = list(_CLOSED.finditer(text))
    boxes = list(_BOXED.finditer(text))
    if not (opened or closed or boxes or _BROKEN.search(text)):
        return None
    tags = sorted([(tag.start(), "open") for tag in opened] + [(t.start(), "end") for t in closed])
    in_turn = all(kind == ("open", "end")[i % 2] for i, (_, kind) in enumerate(tags))
    if not in_turn or _BROKEN.search(text):
        return ""
    end = -1
    for box in boxes:
        if box.start() < end:
            return ""  # one within another
        end = _closing_brace(text, box.end())
    if boxes and (not opened or boxes[-1].start() > opened[-1].start()):
        return text[boxes[-1].end() : end] if end < len(text) else ""
    start = opened[-1].end()
    closing = _CLOSED.search(text, start)
    return text[start : closing.start()] if closing else text[start:]


def _closing_brace(text: str, start: int) -> int:
    """Place of the brace that closes the one before `start`; the text's length without it."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    return len(text)


def _in_container(content: str) -> str:
    if _MARKUP.search(content):
        return ""
    declared = _declared(content)
    if declared is not None:
        return declared
    token = read_token(content)
    if token is None or token.has_rival:
        return ""
    lines = (read_token(line) for line in content.splitlines())
    alone = {line.letter for line in lines if line is not None and line.alone}
    return token.letter if alone <= {token.letter} else ""


def _declared(text: str) -> str | None:
    """Letter of the last declaration; "" when it names none or several; None without any."""
    declaration = token = None
    for match in _DECLARATION.finditer(text):
        ending = next((_ENDINGS[script] for script in _ENDINGS if match[script]), "")
        after = text[match.end() : match.end() + _WINDOW]
        read = read_token((match["confirmed"] or "") + after, ending)
        if read is not None or not match["loose"]:
            declaration, token = match, read
    if declaration is None:
        return None
    if token is None or token.has_rival:
        return ""
    is_article = not (token.capital or token.wrapped) and _ARTICLE.match(token.rest)
    return "" if token.letter == "A" and is_article else token.letter


def _labelled(text: str) -> str:
    """The one letter used as a label; "" when there is none, several, or a refusal."""
    text = _URL.sub(lambda url: "x" * len(url[0]), text)
    parenthesised = list(_apart(_PARENTHESISED, text))
    for match in parenthesised:
        token = read_token(text[match.start() : match.start() + _WINDOW])
        if token is not None and token.has_rival:
            return ""
    answers = {(match["letter"] or match["wide"]).upper() for match in parenthesised}
    labels = {match["letter"].upper() for match in _apart(_LABEL, text)}
    labels |= {token.letter for line in text.splitlines() if (token := _conclusion(line))}
    leading = read_token(text)
    if leading is not None and leading.has_rival:
        return ""
    if leading is not None and _is_leading_label(leading):
        answers.add(leading.letter)
    leads = leading is not None and leading.letter in answers
    if not leads and (_RIVALS.search(text) or _REFUSAL.search(text)):
        return ""
    concluding = _conclusion(_last_segment(text))
    if concluding is not None:
        answers.add(concluding.letter)
    return answers.pop() if len(answers) == 1 and labels <= answers else ""


def _is_leading_label(token: Token) -> bool:
    if token.wrapped or token.alone or token.labels or _ASSERTED.match(token.rest):
        return True
    return token.capital and _LINE_ENDS.match(token.rest) is not None


def _apart(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Matches that are no part of a word."""
    for match in pattern.finditer(text):
        before, after = text[: match.start()][-1:], text[match.end() : match.end() + 1]
        if not joins(before) and not joins(after):
            yield match


def _conclusion(text: str) -> Token | None:
    """A capital letter that is all there is."""
    token = read_token(text)
    return token if token is not None and token.capital and token.alone else None


def _last_segment(text: str) -> str:
    """What follows the last line break, comma or semicolon."""
    return _SEPARATORS.split(text)[-1]
