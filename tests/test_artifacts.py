"""Artifacts: complete or absent, found again by what made them, true to their manifest."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grace_core
from grace_core.artifacts import (
    MANIFEST,
    Artifact,
    Parent,
    digest_folder,
    environment,
    find_artifact,
    fingerprint,
    new_artifact,
    read_artifact,
    verify_artifact,
)
from grace_core.errors import GraceError

FILES = st.dictionaries(
    st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3})?\.bin", fullmatch=True),
    st.binary(max_size=40),
    min_size=1,
    max_size=6,
)


def make(
    folder: Path,
    stage: str = "data",
    files: dict[str, bytes] | None = None,
    config: dict[str, Any] | None = None,
    parents: dict[str, Parent] | None = None,
) -> Artifact:
    with new_artifact(folder, stage, config or {}, parents or {}) as writer:
        for name, content in (files or {"a.txt": b"a"}).items():
            file = writer.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return read_artifact(folder)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_the_manifest_tells_what_went_in_and_what_came_out(tmp_path: Path) -> None:
    parent = Parent(kind="world", path="somewhere", digest="d" * 64)
    folder = tmp_path / "made" / "data-1"
    with new_artifact(folder, "data", {"records": 3}, {"world": parent}) as writer:
        assert not folder.exists()
        (writer.path / "sub").mkdir()
        (writer.path / "sub" / "x.bin").write_bytes(b"12345")
        writer.metrics["used"] = 3.0
        writer.facts["why"] = {"bad picture": 1}
    manifest = read_artifact(folder).manifest
    assert manifest.stage == "data"
    assert manifest.config == {"records": 3}
    assert manifest.parents == {"world": parent}
    assert manifest.metrics == {"used": 3.0}
    assert manifest.facts == {"why": {"bad picture": 1}}
    assert list(manifest.files) == ["sub/x.bin"]
    assert manifest.files["sub/x.bin"].size == 5
    assert manifest.files["sub/x.bin"].sha256 == hashlib.sha256(b"12345").hexdigest()
    assert manifest.fingerprint == fingerprint("data", {"records": 3}, {"world": parent})
    assert manifest.code["version"] == grace_core.__version__
    assert manifest.environment["torch"] != "not installed"
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data-1"
    with (
        pytest.raises(RuntimeError, match="broken"),
        new_artifact(folder, "data", {}, {}) as writer,
    ):
        (writer.path / "half.bin").write_bytes(b"half")
        raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []
    assert find_artifact(folder) is None


def test_a_killed_writer_leaves_nothing_that_passes_for_an_artifact(tmp_path: Path) -> None:
    folder = tmp_path / "data-1"
    program = f"""
import os, signal
from pathlib import Path
from grace_core.artifacts import new_artifact
with new_artifact(Path({str(folder)!r}), "data", {{}}, {{}}) as writer:
    (writer.path / "half.bin").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert find_artifact(folder) is None
    artifact = make(folder)
    assert snapshot(folder).keys() == {"a.txt", MANIFEST}
    verify_artifact(artifact)


def test_the_first_of_two_writers_stays(tmp_path: Path) -> None:
    folder = tmp_path / "data-1"
    with new_artifact(folder, "data", {}, {}) as slow:
        (slow.path / "a.txt").write_bytes(b"slow")
        make(folder, files={"a.txt": b"fast"})
    assert (folder / "a.txt").read_bytes() == b"fast"
    assert [item.name for item in tmp_path.iterdir()] == [folder.name]


def test_a_foreign_folder_of_the_same_name_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "data-1"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert find_artifact(folder) is None
    with pytest.raises(GraceError, match="no complete artifact; move it away"):
        make(folder)
    assert snapshot(folder) == {"mine.txt": b"mine"}
    assert list(tmp_path.iterdir()) == [folder]


def test_reading_what_is_no_artifact_says_so(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="run the stage that makes it"):
        read_artifact(tmp_path / "none")
    artifact = make(tmp_path / "data-1")
    fields = json.loads((artifact.path / MANIFEST).read_text())
    del fields["stage"]
    (artifact.path / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(GraceError, match="damaged"):
        find_artifact(artifact.path)


@settings(max_examples=25, deadline=None)
@given(files=FILES)
def test_the_digest_depends_on_content_and_names_alone(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("digest")
    first = make(root / "one", "data", files, {"seed": 1})
    second = make(root / "two", "other", dict(reversed(files.items())), {"seed": 2})
    assert first.digest == second.digest == digest_folder(first.path)
    name = sorted(files)[0]
    for number, other in enumerate(
        (files | {name: files[name] + b"!"}, files | {"new.txt": b""}, {"zzzz": b"", **files})
    ):
        assert make(root / f"other{number}", files=other).digest != first.digest


@settings(max_examples=25, deadline=None)
@given(files=FILES, data=st.data())
def test_any_later_change_is_found_and_named(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    artifact = make(tmp_path_factory.mktemp("verify") / "made", files=files)
    verify_artifact(artifact)
    name = data.draw(st.sampled_from(sorted(files)))
    file = artifact.path / name
    change = data.draw(st.sampled_from(["missing", "changed", "not in the manifest"]))
    if change == "missing":
        file.unlink()
    elif change == "changed":
        file.write_bytes(files[name] + b"!")
    else:
        name = "added.txt"
        (artifact.path / name).write_bytes(b"")
    with pytest.raises(GraceError, match=f"{change}: {name}"):
        verify_artifact(artifact)


def test_the_fingerprint_depends_on_everything_that_decides_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = Parent(kind="data", path="a", digest="1")
    keys = {
        fingerprint("w4", {"a": 1}, {"data": parent}),
        fingerprint("w8", {"a": 1}, {"data": parent}),
        fingerprint("w4", {"a": 2}, {"data": parent}),
        fingerprint("w4", {"a": 1}, {"data": parent.model_copy(update={"digest": "2"})}),
        fingerprint("w4", {"a": 1}, {"held_out": parent}),
        fingerprint("w4", {"a": 1}, {}),
    }
    assert len(keys) == 6
    moved = parent.model_copy(update={"path": "elsewhere"})
    assert fingerprint("w4", {"a": 1}, {"data": moved}) in keys
    monkeypatch.setattr(grace_core, "__version__", "99.0")
    assert fingerprint("w4", {"a": 1}, {"data": parent}) not in keys


def test_the_environment_names_absent_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_core.artifacts._RECORDED_PACKAGES", ("pydantic", "no-such-package"))
    found = environment()
    assert found["no-such-package"] == "not installed"
    assert found["pydantic"][0].isdigit()
