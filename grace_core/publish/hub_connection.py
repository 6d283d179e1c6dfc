"""Talking to the Hugging Face Hub: patience with what passes, words for what does not.

The token is part of no error: what the client and the server say is cleaned of it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from grace_core.errors import GraceError
from grace_core.hub_transport import TransportError

log = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (1.0, 4.0, 16.0)
"""Seconds between the attempts of a step, where the server names no other time."""
LONGEST_WAIT = 300.0
"""Seconds; a server that asks for more is left alone until the next run."""
_PASSING = (408, 425, 429)


class HubConnection:
    """The Hub's API with one token. Steps that are given to it must be repeatable."""

    def __init__(self, endpoint: str, token: str | None, namespace: str) -> None:
        """token: by default the environment's HF_TOKEN; raises GraceError where there is none."""
        token = token or os.environ.get("HF_TOKEN")
        if not token:
            raise GraceError(
                "no token for the Hugging Face Hub; export HF_TOKEN (a token with the right to "
                f"write to {namespace}), or name a Prefect Secret block in "
                "publish.destination.token_secret and run the deployment grace-publish/publish"
            )
        self.endpoint = endpoint.rstrip("/")
        self._token = token
        self.api = HfApi(endpoint=self.endpoint, token=token, library_name="grace-pipeline")

    def patiently(self, about: str, step: Callable[[], T]) -> T:
        """The step's result; tried again while what fails may pass.

        A step that was carried out although its answer was lost is tried again too: it must first
        look at what is there.

        about: repository, for the error. Raises GraceError saying what to mend.
        """
        for wait in (*WAITS, None):
            try:
                return step()
            except GraceError:
                raise
            except Exception as error:
                seconds = None if wait is None else _patience(error, wait)
                if seconds is None:
                    with self._explained(about):
                        raise
                log.warning("%s: %s; trying again in %.0f s", about, self._said(error), seconds)
                time.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")

    def _said(self, error: BaseException) -> str:
        return f"{type(error).__name__}: {error}".replace(self._token, "<token>")

    @contextmanager
    def _explained(self, repository: str) -> Iterator[None]:
        """Turn the client's errors into ones with a remedy.

        The original error is not chained: it carries the request, and a server may echo a header.
        """
        try:
            yield
        except OfflineModeIsEnabled:
            raise GraceError(
                f"{repository}: the Hub client is offline; unset HF_HUB_OFFLINE to publish"
            ) from None
        except (TransportError, OSError, RuntimeError, ValueError) as error:
            # OSError: the client's own errors, and a disk that is full while verifying.
            reason = _reason(error)
            remedy = (
                _remedy(reason.response.status_code)
                if isinstance(reason, HfHubHTTPError)
                else f"publishing to {self.endpoint} failed; a release is switched whole or not at "
                "all. Mend what is said below and publish again: what is there is kept"
            )
            raise GraceError(f"{repository}: {remedy}\n{self._said(reason)}") from None


def _reason(error: BaseException) -> BaseException:
    """The client wraps a failed upload in a RuntimeError, a failed look-up in its own error."""
    while not isinstance(error, HfHubHTTPError | TransportError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _patience(error: Exception, wait: float) -> float | None:
    """Seconds until it is worth trying again; None where it is not."""
    if isinstance(error, OfflineModeIsEnabled):
        return None
    reason = _reason(error)
    if isinstance(reason, HfHubHTTPError):
        status = reason.response.status_code
        if status not in _PASSING and status < 500:
            return None
        asked = reason.response.headers.get("Retry-After", "")
        seconds = max(wait, float(asked)) if asked.isdigit() else wait
        return seconds if seconds <= LONGEST_WAIT else None
    # The client finds a download that was cut short: an OSError, but none of this machine's.
    truncated = isinstance(reason, OSError) and reason.errno is None
    return wait if truncated or isinstance(reason, TransportError) else None


def _remedy(status: int) -> str:
    if status == 401:
        return (
            "the token was refused (401); set HF_TOKEN to a valid token whose scope is `write`, or "
            "fine-grained with write access to this namespace"
        )
    if status == 403:
        return (
            "the token is valid but may not do this (403); give it the scope `write` for this "
            "namespace, or publish to a namespace you can write to"
        )
    if status in (409, 412):
        return (
            f"the repository changed while publishing ({status}); nothing was overwritten. Look at "
            "its newest commit and publish again"
        )
    if status == 429:
        return (
            "the Hub asks for fewer requests (429); publish again later. What is uploaded is kept"
        )
    if status >= 500:
        return (
            f"the Hub failed ({status}); a release is switched whole or not at all. Publish again "
            "later: what is uploaded is kept"
        )
    return f"the Hub refused the request ({status}); check repository name, namespace and card"
