"""Whether MLflow can take what a run measures: reachable, of this version, on a database."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from packaging.version import InvalidVersion, Version

from grace_core.doctor.findings import Finding, information, ok, problem, unchecked, warning
from operations.servers import SECONDS, away, shown_address

AREA = "mlflow"

_FILES = "MLflow no longer writes to files, and a file store keeps no models"
_DATABASE = "sqlite:///mlflow.db, or the address of a server with a database"
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_mlflow() -> Iterator[Finding]:
    """The place that MLFLOW_TRACKING_URI, or this process, has set."""
    if not _is_configured():
        yield information(
            AREA, "not configured: MLFLOW_TRACKING_URI is not set; runs go to sqlite:///mlflow.db"
        )
        return
    import mlflow

    address = mlflow.get_tracking_uri()
    scheme = urlsplit(address).scheme.partition("+")[0]
    if scheme in ("", "file"):
        remedy = f"set MLFLOW_TRACKING_URI to {_DATABASE}"
        yield problem(AREA, f"{shown_address(address)} is a file store: {_FILES}", remedy)
    elif scheme in ("http", "https"):
        yield from _server(address)
    elif scheme == "sqlite":
        yield from _sqlite(address)
    elif scheme in _PORTS:
        yield from _database(address, scheme)
    else:
        yield unchecked(
            AREA,
            f"{scheme}: stores of this kind are not examined",
            "make sure that MLFLOW_TRACKING_URI is meant so",
        )


def _is_configured() -> bool:
    """Without the variable only a program that has loaded MLflow may have told it a place."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return True
    if "mlflow" not in sys.modules:
        return False
    from mlflow.tracking import is_tracking_uri_set

    return bool(is_tracking_uri_set())


def _server(address: str) -> Iterator[Finding]:
    """The version is answered without a login; the kind of the store since MLflow 3."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    shown = shown_address(address)
    credentials = get_default_host_creds(address)
    try:
        answers = [
            http_request(
                credentials, path, "GET", max_retries=0, timeout=SECONDS, raise_on_status=False
            )
            for path in ("/version", "/api/3.0/mlflow/server-info")
        ]
    except MlflowException:  # its text repeats the address, credentials included
        yield away(
            AREA,
            f"{shown} does not answer",
            "start the server (`make ui` for a local one), or mend MLFLOW_TRACKING_URI",
        )
        return
    version, server_info = answers
    if version.status_code in (401, 403):
        yield problem(
            AREA,
            f"{shown} refuses the credentials ({version.status_code})",
            "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or a token as "
            "MLFLOW_TRACKING_TOKEN",
        )
        return
    if version.status_code >= 500:
        yield away(AREA, f"{shown} answers {version.status_code}", "look at the server's log")
        return
    told = server_info.status_code == 200 and "json" in server_info.headers.get("Content-Type", "")
    if told and server_info.json().get("store_type") == "FileStore":
        remedy = f"start it with --backend-store-uri {_DATABASE.split(',')[0]}"
        yield problem(AREA, f"{shown} keeps runs in a file store: {_FILES}", remedy)
    yield from _version(shown, version.text.strip() if version.status_code == 200 else None)


def _version(shown: str, theirs: str | None) -> Iterator[Finding]:
    ours = metadata.version("mlflow")
    try:
        release = Version(theirs or "").release
    except InvalidVersion:
        yield unchecked(AREA, f"{shown} tells no version", "check that it is an MLflow server")
        return
    if release[:2] != Version(ours).release[:2]:
        yield warning(
            AREA,
            f"{shown} is MLflow {theirs}, this is {ours}",
            "install the same version on both sides",
        )
    else:
        yield ok(AREA, f"{shown} answers, MLflow {theirs}")


def _sqlite(address: str) -> Iterator[Finding]:
    path = urlsplit(address).path
    file = Path(path[1:])  # three slashes: relative; four: absolute
    folder = file.absolute().parent
    if not folder.is_dir():
        yield problem(
            AREA, f"{shown_address(address)}: there is no folder {folder}", f"mkdir -p {folder}"
        )
    else:
        yield ok(AREA, f"{shown_address(address)}, on this machine")


def _database(address: str, scheme: str) -> Iterator[Finding]:
    """Only whether something listens: asking more would create tables."""
    parts = urlsplit(address)
    host, port = parts.hostname or "localhost", parts.port or _PORTS[scheme]
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        yield away(
            AREA,
            f"{shown_address(address)} does not answer ({type(error).__name__})",
            "start the database, or mend MLFLOW_TRACKING_URI",
        )
    else:
        yield ok(AREA, f"{shown_address(address)} answers")
