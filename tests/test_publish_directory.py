"""Publishing to a directory: whole, verified, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from grace_core.artifacts import digest_folder
from grace_core.errors import GraceError
from grace_core.publish import directory
from grace_core.publish.directory import publish_to_directory

CARD = "# card\n"
MANIFEST = '{"format": 1}\n'
PICTURE = "<svg/>\n"
DOCUMENTS = {"README.md": CARD, "grace_manifest.json": MANIFEST, "lineage.svg": PICTURE}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "work" / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "sub" / "more.json").write_text("[]")
    return folder


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_release_is_copied_with_its_documents(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "releases" / "Toy-BF16"
    published = publish_to_directory(release, DOCUMENTS, target)
    assert names(target) == names(release) | DOCUMENTS.keys()
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert (target / "README.md").read_text() == CARD
    assert (published.location, published.revision) == (str(target), digest_folder(target))
    assert os.listdir(target.parent) == ["Toy-BF16"]


def test_a_new_release_takes_the_place_of_the_old(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "releases" / "Toy-BF16"
    first = publish_to_directory(release, DOCUMENTS, target)
    assert publish_to_directory(release, DOCUMENTS, target) == first
    (release / "sub" / "more.json").unlink()
    (release / "model.safetensors").write_bytes(b"better")
    second = publish_to_directory(release, DOCUMENTS, target)
    assert second.revision != first.revision
    assert (target / "model.safetensors").read_bytes() == b"better"
    assert "sub/more.json" not in names(target)
    assert os.listdir(target.parent) == ["Toy-BF16"]


@pytest.mark.parametrize("when", ["copying", "verifying", "first rename", "second rename"])
def test_a_failure_leaves_the_old_release(
    release: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "releases" / "Toy-BF16"
    old = publish_to_directory(release, DOCUMENTS, target)
    (release / "model.safetensors").write_bytes(b"better")
    copy, replace = shutil.copyfile, os.replace
    renames = 0

    def bad_copy(source: Path, copied: Path) -> None:
        copy(source, copied)
        if when == "copying" and source.suffix == ".safetensors":
            raise OSError("disk full")
        if when == "verifying" and source.suffix == ".safetensors":
            copied.write_bytes(b"bit rot")

    def bad_replace(source: Path, renamed: Path) -> None:
        nonlocal renames
        renames += 1
        if (when, renames) in (("first rename", 1), ("second rename", 2)):
            raise OSError("no permission")
        replace(source, renamed)

    with monkeypatch.context() as patched:
        patched.setattr(directory.shutil, "copyfile", bad_copy)
        patched.setattr(directory.os, "replace", bad_replace)
        with pytest.raises((OSError, GraceError), match=r"disk full|differs|no permission"):
            publish_to_directory(release, DOCUMENTS, target)
    assert digest_folder(target) == old.revision
    assert os.listdir(target.parent) == ["Toy-BF16"]


def test_a_switch_cut_short_is_undone_by_the_next_run(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "releases" / "Toy-BF16"
    old = publish_to_directory(release, DOCUMENTS, target)
    os.replace(target, target.with_name(".Toy-BF16.previous"))  # killed between the renames
    (release / "config.json").unlink()
    with pytest.raises(GraceError, match=r"config\.json is missing"):
        publish_to_directory(release, DOCUMENTS, target)
    (release / "config.json").write_text("{}")
    assert publish_to_directory(release, DOCUMENTS, target) == old
    assert os.listdir(target.parent) == ["Toy-BF16"]


def test_someone_elses_folder_is_not_overwritten(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(GraceError, match="no earlier release"):
        publish_to_directory(release, DOCUMENTS, target)
    assert names(target) == {"thesis.tex"}


@pytest.mark.parametrize("place", ["inside", "around", "same"])
def test_release_and_destination_must_be_apart(release: Path, place: str) -> None:
    target = {"inside": release / "out", "around": release.parent, "same": release}[place]
    with pytest.raises(GraceError, match="inside each other"):
        publish_to_directory(release, DOCUMENTS, target)
    assert names(release) == {"config.json", "model.safetensors", "sub/more.json"}


def test_what_is_no_release_is_refused_with_all_reasons(release: Path, tmp_path: Path) -> None:
    (release / "config.json").unlink()
    (release / "model.safetensors").rename(release / "pytorch_model.bin")
    (release / "README.md").write_text("old")
    (release / "link").symlink_to("/etc/hostname")
    with pytest.raises(GraceError) as caught:
        publish_to_directory(release, DOCUMENTS, tmp_path / "out")
    for reason in ("config.json is missing", "pickle", "safetensors weights", "README.md", "link"):
        assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(GraceError, match="no directory"):
        publish_to_directory(tmp_path / "nothing", DOCUMENTS, tmp_path / "out")
