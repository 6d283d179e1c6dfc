"""Secrets of the environment: which variables hold one, and text without their values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY|ACCESS_KEY|AUTH_STRING|CONNECTION_URL"
)
_SHORTEST = 8
"""Characters; a shorter value stands in ordinary words, and is no secret anyone should rely on."""


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, by its name."""
    return _SECRET_NAME.search(name.upper()) is not None


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` with each secret's value replaced by the name of its variable."""
    secrets = {
        value: name
        for name, value in environment.items()
        if is_secret(name) and len(value) >= _SHORTEST
    }
    for value in sorted(secrets, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, f"[{secrets[value]}]")
    return text
