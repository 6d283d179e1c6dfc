"""Gold letters as the data sets write them."""

from __future__ import annotations

from collections.abc import Collection


def gold_letter(value: object, choices: Collection[str]) -> tuple[str, ...]:
    """The gold of a multiple-choice row; empty where the split's answers are not public.

    Raises ValueError where the letter is none of the choices.
    """
    if value is None or str(value).strip() in ("", "nan", "?"):
        return ()
    letter = str(value).strip().upper()
    if letter not in choices:
        raise ValueError(f"answer {value!r} is none of the choices {', '.join(choices)}")
    return (letter,)


def gold_position(value: object, choices: Collection[str]) -> tuple[str, ...]:
    """The same for an answer that counts the options from 0, as a number or its text."""
    if value is None or str(value).strip() in ("", "-1", "nan"):
        return ()
    try:
        position = int(str(value))
    except ValueError:
        raise ValueError(f"answer {value!r} is no number") from None
    if not 0 <= position < len(choices):
        raise ValueError(f"answer {value!r} is no position among {len(choices)} choices, from 0")
    return (list(choices)[position],)
