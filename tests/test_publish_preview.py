"""`grace publish --dry-run`: what would happen, said truly, and nothing done."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from huggingface_hub import constants

from grace_core.config import GraceConfig, load_config
from grace_core.errors import GraceError
from grace_core.evaluation.gate import Check, GateVerdict
from grace_core.publish.content import ReleaseContent
from grace_core.publish.directory import publish_to_directory
from grace_core.publish.preview import Preview
from grace_core.publish.preview import preview as preview_of
from grace_core.publish.release_set import HubAccess
from tests.hub_server import Fault, Hub, running_hub
from tests.publishing import LABELS, TOKEN, publish, published, release

ROOT = Path(__file__).resolve().parent.parent
ACCESS = HubAccess(token=TOKEN)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with running_hub(TOKEN) as running:
        yield running


def config(tmp_path: Path, *more: str) -> GraceConfig:
    chosen = [f"run_dir={tmp_path}/run", "publish.name=Toy", *more]
    return load_config(ROOT / "configs/toy.yaml", chosen)


def preview(config: GraceConfig, contents: Sequence[ReleaseContent], access: HubAccess) -> Preview:
    return preview_of(config, contents, access, GateVerdict(decides="value", checks=()))


def to_hub(hub: Hub, tmp_path: Path, more: str = "") -> GraceConfig:
    target = f"{{kind: hub, namespace: grace, endpoint: '{hub.endpoint}'{more}}}"
    return config(tmp_path, f"publish.destination={target}")


def test_nothing_is_there_yet(hub: Hub, tmp_path: Path) -> None:
    contents = release(tmp_path, "1")
    seen = preview(to_hub(hub, tmp_path), contents, ACCESS)
    assert [(model.now, model.then) for model in seen.models] == [("nothing", "new, private")] * 2
    assert [model.bytes for model in seen.models] == [content.size for content in contents]
    assert seen.notes[0] == "index: none yet" and not seen.problems
    assert not hub.repositories


def test_what_is_there_is_compared_and_left_alone(hub: Hub, tmp_path: Path) -> None:
    publish(hub, release(tmp_path, "1"))
    before = copy.deepcopy(hub.repositories)
    hub.requests.clear()
    same = preview(to_hub(hub, tmp_path), release(tmp_path, "1"), ACCESS)
    assert [(model.then, model.bytes) for model in same.models] == [("unchanged, private", 0)] * 2
    other = preview(to_hub(hub, tmp_path), release(tmp_path, "2"), ACCESS)
    for model, content in zip(other.models, release(tmp_path, "2"), strict=True):
        # The picture and the empty notes are the same in both.
        assert model.then == f"1 commit: 4 of {len(content.files)} files; private"
        assert model.bytes == content.size - content.facts["lineage.svg"].size
    assert hub.repositories == before
    assert not [entry for entry in hub.requests if entry.split()[0] not in ("GET", "HEAD")]


def test_what_would_stop_it_is_told(hub: Hub, tmp_path: Path) -> None:
    publish(hub, release(tmp_path, "1"), tag="v1", private=False)
    gone = False

    def fault(number: int, request: str) -> Fault | None:
        nonlocal gone
        gone = gone or "/lfs/" in request
        return Fault("reset") if gone else None

    hub.fault = fault
    with pytest.raises(GraceError):
        publish(hub, release(tmp_path, "2"), private=False, owner="someone")
    hub.fault = lambda number, request: None
    seen = preview(to_hub(hub, tmp_path, ", tag: v1"), release(tmp_path, "2"), ACCESS)
    told = "\n".join(seen.problems)
    assert "under way" in told and told.count("never moved") == len(LABELS)
    assert told.count("is public, but publish.destination.private is true") == len(LABELS) + 1
    assert any("of this release would be completed" in note for note in seen.notes)
    assert published(hub) is not None


def test_a_tag_that_is_asked_for_later_is_told(hub: Hub, tmp_path: Path) -> None:
    contents = release(tmp_path, "1")
    publish(hub, contents, tag="v1")
    same, other = (
        preview(to_hub(hub, tmp_path, more), contents, ACCESS) for more in ("", ", tag: v2")
    )
    assert same.notes[1] == "tag: v1"
    assert other.notes[1] == "tag: v2, added to this release, which has v1"
    publish(hub, release(tmp_path, "2"), tag="v2")
    publish(hub, contents, tag="v1")
    refused = preview(to_hub(hub, tmp_path, ", tag: v2"), contents, ACCESS)
    assert "\n".join(refused.problems).count("never moved") == len(LABELS)


def test_a_directory_is_looked_at(tmp_path: Path) -> None:
    labels = {"bf16": "Toy-BF16", "w4": "Toy-W4G128"}
    to = config(tmp_path, "publish.destination={kind: directory, path: out}")
    old, new = release(tmp_path, "1", labels), release(tmp_path, "2", labels)
    first = preview(to, old, HubAccess())
    assert [model.then for model in first.models] == ["new", "new"]
    assert not (tmp_path / "run").exists()
    publish_to_directory(old, tmp_path / "run" / "out")
    again, other = preview(to, old, HubAccess()), preview(to, new, HubAccess())
    assert [(model.then, model.bytes) for model in again.models] == [("unchanged", 0)] * 2
    assert [model.then for model in other.models] == ["replaced", "replaced"]
    assert [model.bytes for model in other.models] == [content.size for content in new]


def test_a_closed_gate_would_stop_it(tmp_path: Path) -> None:
    check = Check(
        model="w4",
        demand="floor",
        on="average",
        needed=60.0,
        found=50.0,
        unit="%",
        passed=False,
        problem="w4 falls short",
    )
    verdict = GateVerdict(decides="value", checks=(check,))
    seen = preview_of(config(tmp_path), release(tmp_path, "1"), HubAccess(), verdict)
    assert "regression gate is closed" in seen.problems[0] and len(seen.models) == 2
    overridden = verdict.model_copy(update={"override": "a test"})
    assert not preview_of(
        config(tmp_path), release(tmp_path, "1"), HubAccess(), overridden
    ).problems
