"""Whether the token that a deployment will publish with is there and may, before any training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from grace_core.config import GraceConfig
from grace_core.config.publish import HubDestination
from grace_core.doctor.findings import Finding, Severity, problem, unchecked
from grace_core.doctor.hub import AREA, check_publishing
from operations.servers import shown_address


def token_block(config: GraceConfig) -> str | None:
    """The Secret block that the token is read from; None: HF_TOKEN is used, or none is needed."""
    destination = config.publish.destination
    if not config.publish.enabled or not isinstance(destination, HubDestination):
        return None
    return None if os.environ.get("HF_TOKEN") else destination.token_secret


def secret(block: str) -> str | None:
    """What a Prefect Secret block holds; None where there is no such block."""
    from prefect.blocks.system import Secret

    try:
        found = cast(Secret, Secret.load(block))
    except ValueError:
        return None
    return str(found.get())


def check_token(config: GraceConfig) -> Iterator[Finding]:
    """The token of a publication by this process: HF_TOKEN's, or that of the Secret block."""
    block = token_block(config)
    if block is None:
        yield from check_publishing(config)
        return
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    address = PREFECT_API_URL.value()
    if not address:
        yield unchecked(
            AREA,
            f"HF_TOKEN and PREFECT_API_URL are not set, so the Secret block {block} was not read",
            "set PREFECT_API_URL to the server that has the block",
        )
        return
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            token = secret(block)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        yield unchecked(
            AREA,
            f"{shown_address(address)} did not give the Secret block {block} "
            f"({type(error).__name__})",
            "look at the area prefect",
        )
        return
    if token is None:
        yield problem(
            AREA,
            f"publish.destination.token_secret: Prefect has no Secret block {block}",
            "make one in its UI under Blocks, or export HF_TOKEN",
        )
    else:
        yield from check_publishing(config, token, f"the Secret block {block}")


def check_token_of_publisher(config: GraceConfig) -> Iterator[Finding]:
    """The token of a publication by another process, after an approval.

    That one reads the same block. Its HF_TOKEN may be another than this process's, so what is
    wrong with this one is only a warning.
    """
    of_block = token_block(config) is not None
    for found in check_token(config):
        if of_block or found.severity is not Severity.PROBLEM:
            yield found
        else:
            told = f"{found.text} here; the publication after the approval reads its own HF_TOKEN"
            yield replace(found, severity=Severity.WARNING, text=told)
