"""The Hugging Face Hub: what must be downloaded is there, and the token may publish.

Asks the Hub's API and transfers no file. The token is part of no finding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from grace_core.config.publish import HubDestination
from grace_core.config.tree import GraceConfig
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.doctor.findings import Finding, ok, problem, unchecked

AREA = "hub"

_SECONDS = 5.0
_MAY_WRITE = {"admin", "write", "contributor"}


def look_up(checkpoint: Checkpoint) -> tuple[Checkpoint, list[Finding]]:
    """A checkpoint that is to be downloaded, with the size that the Hub tells, and what it said."""
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from grace_core.hub_transport import TransportError

    path, revision = checkpoint.source.path, checkpoint.source.revision
    if is_offline_mode():
        text = f"{path} must be downloaded, but HF_HUB_OFFLINE is set"
        remedy = "unset HF_HUB_OFFLINE, or download it first on a machine with a connection"
        return checkpoint, [problem(AREA, text, remedy)]
    api = HfApi(token=os.environ.get("HF_TOKEN") or False)
    try:
        info = api.model_info(path, revision=revision, timeout=_SECONDS)
    except GatedRepoError:
        text = f"{path} is gated, and HF_TOKEN has no access to it"
        remedy = "accept its terms on the Hub, and export HF_TOKEN of that account"
        return checkpoint, [problem(AREA, text, remedy)]
    except RevisionNotFoundError:
        text = f"{path} has no revision {revision}"
        return checkpoint, [problem(AREA, text, "mend `revision`: the commit of the repository")]
    except RepositoryNotFoundError:
        text = f"{path} is no repository of the Hub that this token may read"
        return checkpoint, [problem(AREA, text, "mend the name, or export HF_TOKEN if private")]
    except HfHubHTTPError as error:
        text = f"{path}: the Hub answered {error.response.status_code}"
        return checkpoint, [problem(AREA, text, "try again later, or download it first")]
    except (TransportError, OSError) as error:
        text = f"{path} must be downloaded, but {api.endpoint} cannot be reached"
        remedy = f"check the connection and HF_ENDPOINT ({type(error).__name__})"
        return checkpoint, [problem(AREA, text, remedy)]
    weights = info.safetensors.total if info.safetensors else None
    found = ok(AREA, f"{path} can be downloaded")
    return replace(checkpoint, listed_parameters=weights), [found]


def missing_token(config: GraceConfig) -> Iterator[Finding]:
    """HF_TOKEN, where the configuration publishes to the Hub."""
    destination = _destination(config)
    if destination is None or os.environ.get("HF_TOKEN"):
        return
    remedy = "publishing to the Hub needs it; export a token with the right to write"
    if destination.token_secret is not None:
        remedy += f" (only the deployments read the Secret block {destination.token_secret})"
    yield problem(AREA, "publish.destination: HF_TOKEN is not set", remedy)


def check_publishing(
    config: GraceConfig, token: str | None = None, called: str = "HF_TOKEN"
) -> Iterator[Finding]:
    """The token is there and may write to the namespace, as the Hub itself says.

    token: None for that of HF_TOKEN; called: where it is from, for the findings.
    """
    destination = _destination(config)
    if destination is None:
        return
    token = token or os.environ.get("HF_TOKEN")
    if not token:
        yield from missing_token(config)
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from grace_core.hub_transport import TransportError

    api = HfApi(endpoint=destination.endpoint, token=token)
    try:
        who = api.whoami()
    except OfflineModeIsEnabled:
        yield problem(
            AREA,
            "publish.destination is the Hub, but HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE to publish",
        )
        return
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            yield problem(AREA, f"{called} was refused (401)", "give it a valid token")
        else:
            yield unchecked(AREA, f"{called}: the Hub answered {status}", "try again later")
        return
    except (TransportError, OSError) as error:
        yield problem(
            AREA,
            f"{destination.endpoint} cannot be reached ({type(error).__name__})",
            "check the connection and publish.destination.endpoint",
        )
        return
    yield _scope(destination.namespace, who, called)


def _destination(config: GraceConfig) -> HubDestination | None:
    destination = config.publish.destination
    wanted = config.publish.enabled and isinstance(destination, HubDestination)
    return destination if wanted and isinstance(destination, HubDestination) else None


def _scope(namespace: str, who: Mapping[str, Any], called: str) -> Finding:
    """What the answer of `whoami-v2` says about writing to `namespace`."""
    token = (who.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    remedy = f"create a token with the right to write to {namespace}"
    if role == "read":
        return problem(AREA, f"the scope of {called} is `read`", remedy)
    if role == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        for scope in scopes:
            mine = (scope.get("entity") or {}).get("name") == namespace
            if mine and "repo.write" in (scope.get("permissions") or []):
                return ok(AREA, f"{called} is fine-grained and may write to {namespace}")
        text = f"{called} is fine-grained and may not write to {namespace}"
        return problem(AREA, text, remedy)
    if role != "write":
        text = f"the Hub tells no scope of {called} (role {role!r})"
        return unchecked(AREA, text, f"make sure that it may write to {namespace}")
    if namespace == who.get("name"):
        return ok(AREA, f"{called} may write to {namespace}")
    for group in who.get("orgs") or []:
        if group.get("name") == namespace:
            rank = group.get("roleInOrg")
            if rank in _MAY_WRITE:
                return ok(AREA, f"{called} may write to the organisation {namespace}")
            text = f"the owner of {called} has the role {rank!r} in {namespace}"
            return problem(AREA, text, "ask the organisation for the role `write`")
    owner = who.get("name")
    return problem(
        AREA,
        f"{namespace} is neither {owner}, the owner of {called}, nor one of its organisations",
        "mend publish.destination.namespace, or export another token",
    )
