"""Publishing a release to the Hugging Face Hub: one commit with all files, then verified."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from grace_core.errors import GraceError
from grace_core.hub_transport import TransportError
from grace_core.publish.directory import Published, release_files

_KEPT = frozenset({".gitattributes"})
"""Files the Hub writes itself."""


def publish_to_hub(
    release_folder: Path,
    documents: Mapping[str, str],
    *,
    namespace: str,
    name: str,
    private: bool,
    endpoint: str,
    token: str | None = None,
) -> Published:
    """Make the repository `namespace/name` hold exactly this release, by a single commit.

    The commit is made on top of the one that was read before, so a change by someone else in
    between is not overwritten but refused. Afterwards every file's digest is compared with what the
    server lists for that commit.

    Args:
        documents: text by file name, of CARD, RELEASE_MANIFEST and PICTURE.
        private: visibility of a repository that is made now. One that exists must not be public
            when this is true.
        endpoint: base address of the Hub's API.
        token: with the right to write to `namespace`; by default the environment's HF_TOKEN. It is
            never part of a log line or an error.

    Raises GraceError saying what to mend; until the commit succeeds, `main` is unchanged.
    """
    token = token or os.environ.get("HF_TOKEN")
    if not token:
        raise GraceError(
            "no token for the Hugging Face Hub; export HF_TOKEN (a token with the right to write "
            f"to {namespace})"
        )
    files: dict[str, Path | bytes] = dict(release_files(release_folder, documents))
    files |= {name: text.encode("utf-8") for name, text in documents.items()}
    repository = f"{namespace}/{name}"
    api = HfApi(endpoint=endpoint, token=token, library_name="grace-pipeline")
    with _explained(repository, endpoint, token):
        api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        info = api.model_info(repository)
        if private and not info.private:
            raise GraceError(
                f"{repository} exists and is public, but a private release was asked for; make it "
                "private on the Hub, choose another name, or set publish.destination.private to "
                "false"
            )
        present = _listed(api, repository, info.sha) if info.sha else {}
        commit = api.create_commit(
            repository,
            operations=[
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(
                    CommitOperationDelete(path)
                    for path in sorted(present.keys() - files.keys() - _KEPT)
                ),
            ],
            commit_message=f"Release {name}",
            parent_commit=info.sha,
        ).oid
        _verify(repository, commit, files, _listed(api, repository, commit))
    return Published(f"{endpoint.rstrip('/')}/{repository}", commit)


def _listed(api: HfApi, repository: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repository, revision=revision, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _verify(
    repository: str,
    commit: str,
    files: Mapping[str, Path | bytes],
    listed: Mapping[str, RepoFile],
) -> None:
    """Compare digests: SHA-256 of files in large-file storage, git's blob id of the others."""
    problems = [
        f"{path} should not be there" for path in sorted(listed.keys() - files.keys() - _KEPT)
    ]
    for path, content in files.items():
        entry = listed.get(path)
        if entry is None:
            problems.append(f"{path} is missing")
        elif entry.lfs is not None:
            if entry.lfs.sha256 != _digest(content, hashlib.sha256()):
                problems.append(f"{path} has another SHA-256")
        else:
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            if entry.blob_id != _digest(content, blob):
                problems.append(f"{path} has another content")
    if problems:
        raise GraceError(
            f"commit {commit} of {repository} is not what was sent; do not use it, and publish "
            "again:\n  - " + "\n  - ".join(problems)
        )


def _digest(content: Path | bytes, digest: hashlib._Hash) -> str:
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _explained(repository: str, endpoint: str, token: str) -> Iterator[None]:
    """Turn the client's errors into ones with a remedy, and keep the token out of their text.

    The original error is not chained: it carries the request, and a server may echo a header.
    """
    try:
        yield
    except OfflineModeIsEnabled:
        raise GraceError(
            f"{repository}: the Hub client is offline; unset HF_HUB_OFFLINE to publish"
        ) from None
    except (TransportError, OSError, RuntimeError, ValueError) as error:
        # The client wraps a failed upload of a large file in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        reason = cause or error
        remedy = (
            _remedy(reason.response.status_code)
            if isinstance(reason, HfHubHTTPError)
            else f"publishing to {endpoint} failed; a commit is made whole or not at all. Mend "
            "what is said below and publish again"
        )
        said = f"{type(reason).__name__}: {reason}".replace(token, "<token>")
        raise GraceError(f"{repository}: {remedy}\n{said}") from None


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
    if status >= 500:
        return (
            f"the Hub failed ({status}); a commit is made whole or not at all. Publish again later"
        )
    return f"the Hub refused the request ({status}); check repository name, namespace and card"
