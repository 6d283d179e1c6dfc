"""A small Hugging Face Hub on 127.0.0.1: the part of its API that publishing and downloading use.

It keeps repositories in memory as lists of commits, stores large files by SHA-256 after checking
it, refuses a commit on another parent, and fails on demand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass(frozen=True)
class Blob:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_id(self) -> str:
        stored = self.content
        if self.large:
            stored = (
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_id


@dataclass
class Repository:
    private: bool
    parameters: int | None = None
    """Weights of its model, as a real server reads them from the safetensors headers."""
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)
    """Of the main branch, oldest first."""
    branches: dict[str, str] = field(default_factory=dict)
    """Newest commit of the other branches."""
    tags: dict[str, str] = field(default_factory=dict)
    known: dict[str, dict[str, Blob]] = field(default_factory=dict)
    """Files of every commit there ever was: deleting a branch deletes none."""

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def commit_of(self, revision: str) -> str | None:
        if revision == "main":
            return self.head
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        return revision if revision in self.known else None

    def files(self, revision: str) -> dict[str, Blob] | None:
        commit = self.commit_of(revision)
        return None if commit is None else self.known[commit]

    def add_commit(self, files: dict[str, Blob], branch: str = "main") -> str:
        parent = self.commit_of(branch) if branch != "main" or self.commits else None
        listing = repr((branch, parent, sorted((p, b.sha256) for p, b in files.items())))
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.known[oid] = files
        if branch == "main":
            self.commits.append((oid, files))
        else:
            self.branches[branch] = oid
        return oid


@dataclass(frozen=True)
class Fault:
    """What befalls one request.

    kind: `reset` (the connection breaks before the request is carried out), `lost` (it breaks
    afterwards, so that the answer is lost), `500`, `429`, `412`, `truncated` (half of the answer's
    body), or `kill` and `killed` (the asking process is killed, before or after the request is
    carried out).
    """

    kind: str
    process: int = 0


class Hub:
    """State of the server; `fail` maps a path's regular expression to the status it answers."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.who: dict[str, Any] = {}
        """What `whoami-v2` answers: owner, organisations, and the scope of the token."""
        self.endpoint = ""
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.fail: dict[str, int] = {}
        self.before_commit: list[Callable[[Repository], None]] = []
        self.fault: Callable[[int, str], Fault | None] = lambda number, request: None
        """Asked at each request, with its number since the start (or since `requests` was emptied).
        """
        self.after: Callable[[], None] = lambda: None
        """Called after each request, while nothing else is at work."""
        self.requests: list[str] = []
        self.lock = threading.Lock()


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub(token)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_REPO = r"([\w.-]+/[\w.-]+)"
_KIND = "(?:models|datasets)"  # names are of one kind or the other in a test


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    _mute = _cut = False
    wbufsize = -1  # header and body in one packet, else each answer waits for an acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _dispatch(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        hub = self.state
        with hub.lock:
            request = f"{self.command} {path}"
            hub.requests.append(request)
            fault = hub.fault(len(hub.requests) - 1, request)
            if fault is not None and fault.kind in ("reset", "500", "429", "412", "kill"):
                self._befall(fault)
                return
            self._cut = fault is not None and fault.kind == "truncated"
            self._mute = fault is not None and fault.kind in ("lost", "killed")
            self._carry_out(path, body)
            hub.after()
            if fault is not None and self._mute:
                self._befall(fault)

    def _befall(self, fault: Fault) -> None:
        if fault.kind in ("kill", "killed"):
            os.kill(fault.process, signal.SIGKILL)
            self.close_connection = True
        elif fault.kind in ("reset", "lost"):
            # Closing with a linger of no time sends a reset instead of an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            headers = {"Content-Type": "application/json"}
            headers |= {"Retry-After": "7"} if fault.kind == "429" else {}
            self._send(b'{"error": "not now"}', int(fault.kind), headers)

    def _carry_out(self, path: str, body: bytes) -> None:
        hub = self.state
        for pattern, status in hub.fail.items():
            if re.search(pattern, path):
                # A careless server: it repeats the credentials it was sent.
                said = f"refused {self.headers.get('Authorization')}"
                self._json({"error": said}, status)
                return
        if path.startswith("/lfs/"):
            self._store(path.removeprefix("/lfs/"), body)
            return
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._json({"error": "Invalid credentials in Authorization header"}, 401)
            return
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                action(self, body, *match.groups())
                return
        self._json({"error": f"no route {self.command} {path}"}, 404)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        if self._mute:
            return
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self._cut else content)
        if self._cut:
            self.close_connection = True

    def _repository(self, name: str) -> Repository | None:
        found = self.state.repositories.get(name)
        if found is None:
            headers = {"X-Error-Code": "RepoNotFound"}
            self._send(b'{"error": "Repository not found"}', 404, headers)
        return found

    def whoami(self, body: bytes) -> None:
        self._json(self.state.who)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.state.endpoint}/{name}"}
        if name in self.state.repositories:
            self._json({"error": "You already created this model repo", **url}, 409)
            return
        repository = Repository(private=asked.get("visibility") == "private")
        repository.add_commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", large=False)})
        self.state.repositories[name] = repository
        self._json(url)

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        good = content.startswith("---\n") and "\n---\n" in content
        errors = [] if good else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, 200 if good else 400)

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if revision is not None and repository.files(revision) is None:
            self._send(b'{"error": "Revision"}', 404, {"X-Error-Code": "RevisionNotFound"})
            return
        count = repository.parameters
        weights = {"safetensors": {"parameters": {"BF16": count}, "total": count}} if count else {}
        listed = repository.files(revision or "main") or {}
        siblings = [{"rfilename": path, "size": len(blob.content)} for path, blob in listed.items()]
        card = listed.get("README.md")
        front = card.content.decode().split("---\n") if card else []
        metadata = {"cardData": yaml.safe_load(front[1])} if len(front) > 2 else {}
        self._json(
            {
                "id": name,
                "sha": repository.commit_of(revision or "main"),
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                **weights,
                **metadata,
            }
        )

    def tree(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        files = repository.files(revision) if repository else None
        if repository is None:
            return
        if files is None:
            self._send(b'{"error": "Revision"}', 404, {"X-Error-Code": "RevisionNotFound"})
            return
        self._json([_entry(path, blob) for path, blob in files.items()])

    def paths_info(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        files = (repository.files(revision) if repository else None) or {}
        asked = parse_qs(body.decode()).get("paths", [])
        self._json([_entry(path, files[path]) for path in asked if path in files])

    def refs(self, body: bytes, name: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        heads = {"main": repository.head, **repository.branches}

        def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": oid}
                for ref, oid in names.items()
            ]

        answer = {"branches": listed("heads", heads), "tags": listed("tags", repository.tags)}
        self._json({**answer, "converts": []})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if self.command == "DELETE":
            known = repository.branches.pop(branch, None)
            self._json({}, 200 if known else 404)
        elif branch in repository.branches:
            self._json({"error": "Reference already exists"}, 409)
        else:
            start = repository.commit_of(json.loads(body or b"{}").get("startingPoint", "main"))
            assert start is not None
            repository.branches[branch] = start
            self._json({})

    def tag(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        tag, commit = json.loads(body)["tag"], repository.commit_of(revision)
        if tag in repository.tags:
            self._json({"error": "Tag reference exists already"}, 409)
        elif commit is None:
            self._send(b'{"error": "Revision"}', 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            repository.tags[tag] = commit
            self._json({})

    def settings(self, body: bytes, name: str) -> None:
        repository = self._repository(name)
        if repository is not None:
            repository.private = json.loads(body)["visibility"] == "private"
            self._json({})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        present = repository.files(revision) or {}
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            answer = {
                "path": path,
                "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            if path in present:
                answer["oid"] = present[path].etag
            answers.append(answer)
        self._json({"files": answers})

    def lfs_batch(self, body: bytes, name: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            wanted: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.state.stored:
                href = f"{self.state.endpoint}/lfs/{entry['oid']}"
                wanted["actions"] = {"upload": {"href": href}}
            objects.append(wanted)
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._json({"error": "content does not match its digest"}, 400)
            return
        self.state.stored[oid] = body
        self._json({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        while self.state.before_commit:
            self.state.before_commit.pop()(repository)
        files = dict(repository.files(revision) or {})
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header" and value.get("parentCommit") not in (
                None,
                repository.commit_of(revision),
            ):
                self._json({"error": "A commit has happened since. Please refresh."}, 412)
                return
            if key == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Blob(content, large=False)
            elif key == "lfsFile":
                files[value["path"]] = Blob(self.state.stored[value["oid"]], large=True)
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repository.add_commit(files, revision)
        url = f"{self.state.endpoint}/{name}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit = repository.commit_of(revision) or ""
        blob = (repository.files(revision) or {}).get(path)
        if blob is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self._send(b"{}", 404, headers)
            return
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is None:
            self._send(blob.content, 200, headers)
            return
        rest, size = blob.content[int(start[1]) :], len(blob.content)
        headers["Content-Range"] = f"bytes {start[1]}-{size - 1}/{size}"
        self._send(rest, 206, headers)


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file as the Hub lists it."""
    size = len(blob.content)
    entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": blob.git_id}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": size, "pointerSize": 130}
    return entry


_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/{_KIND}/{_REPO}", _Handler.info),
    ("GET", rf"/api/{_KIND}/{_REPO}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/{_KIND}/{_REPO}/tree/([^/]+)", _Handler.tree),
    ("POST", rf"/api/models/{_REPO}/paths-info/([^/]+)", _Handler.paths_info),
    ("GET", rf"/api/models/{_REPO}/refs", _Handler.refs),
    ("POST DELETE", rf"/api/models/{_REPO}/branch/([^/]+)", _Handler.branch),
    ("POST", rf"/api/models/{_REPO}/tag/([^/]+)", _Handler.tag),
    ("PUT", rf"/api/models/{_REPO}/settings", _Handler.settings),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    ("GET HEAD", rf"/(?:datasets/)?{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
