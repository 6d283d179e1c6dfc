"""What the tests of publishing share: small releases, a Hub, and what it shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from grace_core.publish.content import ReleaseContent, read_content
from grace_core.publish.hub import HubTarget, Report, publish_to_hub
from grace_core.publish.index import INDEX, ReleaseIndex
from tests.hub_server import Hub

TOKEN = "hf_NeverToBeSeenAnywhere"
TAG = "v2"
LABELS = {"bf16": "grace/Toy-BF16", "w4": "grace/Toy-W4G128"}
INDEX_REPOSITORY = "grace/Toy-Releases"


def release(folder: Path, version: str, labels: dict[str, str] = LABELS) -> list[ReleaseContent]:
    """Models whose weights and cards say which version they are."""
    contents = []
    for label, repository in labels.items():
        model = folder / version / label
        (model / "extra").mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "v": version}))
        (model / "extra" / "notes.txt").write_text("")
        (model / "model.safetensors").write_bytes(f"{label} {version} ".encode() * 99)
        documents = {
            "README.md": f"---\nlicense: apache-2.0\n---\n\n# {label} {version}\n",
            "grace_manifest.json": json.dumps({"version": version}) + "\n",
            "lineage.svg": "<svg/>\n",
        }
        contents.append(read_content(label, repository, model, documents))
    return contents


def no_report(done: int, total: int) -> None:
    pass


def target(hub: Hub, **changes: object) -> HubTarget:
    made = HubTarget(
        endpoint=hub.endpoint,
        namespace="grace",
        index_repository=INDEX_REPOSITORY,
        private=True,
        owner="first",
        token=TOKEN,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def publish(
    hub: Hub, contents: list[ReleaseContent], report: Report = no_report, **changes: object
) -> ReleaseIndex:
    return send(contents, target(hub, **changes), report)


def send(contents: list[ReleaseContent], to: HubTarget, report: Report = no_report) -> ReleaseIndex:
    """Publish from this process, or from one that knows the server's address only."""
    (weights,) = (
        file
        for file in contents[0].files.values()
        if isinstance(file, Path) and file.suffix == ".safetensors"
    )
    room = weights.parent.parent / "room"
    try:
        return publish_to_hub(contents, to, index_text, room, report)
    finally:
        assert not room.exists()


def index_text(index: ReleaseIndex) -> str:
    return f"---\ntags: []\n---\n{index.release}\n"


def published(hub: Hub) -> ReleaseIndex | None:
    """What the index names now."""
    repository = hub.repositories.get(INDEX_REPOSITORY)
    blob = None if repository is None else repository.commits[-1][1].get(INDEX)
    return None if blob is None else ReleaseIndex.model_validate_json(blob.content)


def main_of(hub: Hub, repository: str) -> dict[str, bytes]:
    """What the main branch shows, without what the Hub writes itself."""
    files = hub.repositories[repository].commits[-1][1]
    return {path: blob.content for path, blob in files.items() if path != ".gitattributes"}


def of(content: ReleaseContent) -> dict[str, bytes]:
    return {
        name: file if isinstance(file, bytes) else file.read_bytes()
        for name, file in content.files.items()
    }
