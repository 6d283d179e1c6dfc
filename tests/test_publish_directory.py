"""Publishing to a directory: all models of a release, verified, or none."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from grace_core.artifacts import digest_folder
from grace_core.errors import GraceError
from grace_core.publish import directory
from grace_core.publish.content import ReleaseContent, read_content
from grace_core.publish.directory import publish_to_directory, read_directory_index
from grace_core.publish.index import INDEX, JOURNAL
from tests.publishing import of, release

LABELS = {"bf16": "Toy-BF16", "w4": "Toy-W4G128"}
DOCUMENTS = {"README.md": "# card\n", "grace_manifest.json": "{}\n", "lineage.svg": "<svg/>\n"}


def shown(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def require_published(root: Path, contents: list[ReleaseContent]) -> None:
    """These models are there as the index says, and nothing else but the lock."""
    index = read_directory_index(root)
    assert index is not None
    for content in contents:
        assert shown(root / content.repository) == of(content)
        model = index.models[content.label]
        assert model.digest == content.digest == digest_folder(root / content.repository)
    assert set(os.listdir(root)) == {*LABELS.values(), INDEX, f".{INDEX}.lock"}


def test_models_are_copied_with_their_documents_and_an_index(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    contents = release(tmp_path, "1", LABELS)
    index = publish_to_directory(contents, tmp_path / "out", lambda *at: told.append(at))
    require_published(tmp_path / "out", contents)
    assert read_directory_index(tmp_path / "out") == index
    assert told[-1] == (sum(content.size for content in contents),) * 2


def test_a_new_release_takes_the_place_of_the_old(tmp_path: Path) -> None:
    first = publish_to_directory(release(tmp_path, "1", LABELS), tmp_path / "out")
    again = publish_to_directory(release(tmp_path, "1", LABELS), tmp_path / "out")
    assert (again.release, again.models) == (first.release, first.models)
    (tmp_path / "2" / "w4" / "extra").mkdir(parents=True)
    contents = release(tmp_path, "2", LABELS)
    (tmp_path / "2" / "w4" / "extra" / "notes.txt").unlink()
    contents[1] = read_content("w4", LABELS["w4"], tmp_path / "2" / "w4", DOCUMENTS)
    second = publish_to_directory(contents, tmp_path / "out")
    assert second.release != first.release
    require_published(tmp_path / "out", contents)
    assert "extra/notes.txt" not in shown(tmp_path / "out" / LABELS["w4"])


def fails_at(step: int | str) -> Callable[[Path, Path], None]:
    """`os.replace`, of which the call with this number fails; with a word, none does."""
    replace, numbers = os.replace, itertools.count(1)

    def rename(source: Path, renamed: Path) -> None:
        if next(numbers) == step:
            raise OSError("no permission")
        replace(source, renamed)

    return rename


@pytest.mark.parametrize("when", ["copying", "verifying", *range(1, 6)])
def test_a_failure_leaves_the_old_release(
    tmp_path: Path, when: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = release(tmp_path, "1", LABELS), release(tmp_path, "2", LABELS)
    publish_to_directory(old, tmp_path / "out")
    copy = shutil.copyfile

    def bad_copy(source: Path, copied: Path) -> None:
        copy(source, copied)
        if "w4" in str(source) and source.suffix == ".safetensors":
            if when == "copying":
                raise OSError("disk full")
            if when == "verifying":
                copied.write_bytes(b"bit rot")

    with monkeypatch.context() as patched:
        patched.setattr(directory.shutil, "copyfile", bad_copy)
        patched.setattr(directory.os, "replace", fails_at(when))
        with pytest.raises((OSError, GraceError), match=r"disk full|differs|no permission"):
            publish_to_directory(new, tmp_path / "out")
    require_published(tmp_path / "out", old)


@pytest.mark.parametrize(
    ("before", "step"),
    [*(((), step) for step in range(1, 5)), *((("bf16",), step) for step in range(1, 6))],
)
def test_a_failure_leaves_no_model_that_is_new(
    tmp_path: Path, before: tuple[str, ...], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renames: the record of what is new, bf16 aside where there is one, both models, the index."""
    root, names = tmp_path / "out", {label: LABELS[label] for label in before}
    old = release(tmp_path, "1", names)
    if old:
        publish_to_directory(old, root)
    with monkeypatch.context() as patched:
        patched.setattr(directory.os, "replace", fails_at(step))
        with pytest.raises(OSError, match="no permission"):
            publish_to_directory(release(tmp_path, "2", LABELS), root)
    index = read_directory_index(root)
    assert (index is None) == (not old)
    for content in old:
        assert shown(root / content.repository) == of(content)
    left = {name for name in os.listdir(root) if not name.startswith(".")}
    assert left == ({*names.values(), INDEX} if old else set())
    new = release(tmp_path, "2", LABELS)
    publish_to_directory(new, root)
    require_published(root, new)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_new_model_of_a_killed_publication_goes(tmp_path: Path, step: int) -> None:
    """The fourth rename is the new model's, the fifth the index's; the sixth step removes."""
    root, old = tmp_path / "out", release(tmp_path, "1", {"bf16": LABELS["bf16"]})
    publish_to_directory(old, root)
    new = release(tmp_path, "2", LABELS)
    publisher = multiprocessing.get_context("forkserver").Process(
        target=_publish_and_die, args=(new, root, step)
    )
    publisher.start()
    publisher.join()
    assert publisher.exitcode == -signal.SIGKILL
    assert (root / LABELS["w4"]).exists() == (step > 4)
    publish_to_directory(old, root)
    assert shown(root / LABELS["bf16"]) == of(old[0])
    # Named by the index before, W4 is an earlier release's, which stays as any that is left out.
    assert (root / LABELS["w4"]).exists() == (step == 6)
    assert not (root / JOURNAL).exists()


def test_a_folder_that_took_the_place_of_a_new_model_is_left_alone(tmp_path: Path) -> None:
    root, new = tmp_path / "out", release(tmp_path, "1", LABELS)
    index = publish_to_directory(new, root)
    (root / INDEX).rename(root / JOURNAL)  # as if it had been killed before the index
    (root / LABELS["w4"] / "notes.txt").write_text("mine")
    publish_to_directory(new[:1], root)
    assert shown(root / LABELS["w4"])["notes.txt"] == b"mine"
    assert index.models["bf16"].digest == digest_folder(root / LABELS["bf16"])


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 10))
def test_whatever_was_killed_is_put_right_by_the_next_run(tmp_path: Path, step: int) -> None:
    """The fifth rename is the index's: what was killed before it is undone, after it is done."""
    old, new = release(tmp_path, "1", LABELS), release(tmp_path, "2", LABELS)
    root = tmp_path / "out"
    publish_to_directory(old, root)
    context = multiprocessing.get_context("forkserver")
    publisher = context.Process(target=_publish_and_die, args=(new, root, step))
    publisher.start()
    publisher.join()
    assert publisher.exitcode == -signal.SIGKILL
    index = read_directory_index(root)
    assert index is not None
    is_new = index.models["w4"].digest == new[1].digest
    assert is_new == (step > 5)
    # A release that is refused puts the old one back all the same.
    (tmp_path / "thesis").mkdir()
    foreign = [*new, read_content("w8", "thesis", tmp_path / "2" / "w4", DOCUMENTS)]
    (root / "thesis").mkdir()
    with pytest.raises(GraceError, match="no earlier release"):
        publish_to_directory(foreign, root)
    (root / "thesis").rmdir()
    for content in new if is_new else old:
        assert shown(root / content.repository) == of(content)
    publish_to_directory(new, root)
    require_published(root, new)


def _publish_and_die(contents: list[ReleaseContent], root: Path, step: int) -> None:
    """Is killed before its given step: a rename or a removal; 1 is the first copy instead."""
    steps = 0

    def counted(call):  # type: ignore[no-untyped-def]
        def act(*args, **options):  # type: ignore[no-untyped-def]
            nonlocal steps
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return act

    os.replace = counted(os.replace)
    shutil.rmtree = counted(shutil.rmtree)
    shutil.copyfile = counted(shutil.copyfile) if step == 1 else shutil.copyfile
    publish_to_directory(contents, root)


def test_someone_elses_folder_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out" / LABELS["w4"]
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(GraceError, match="no earlier release"):
        publish_to_directory(release(tmp_path, "1", LABELS), tmp_path / "out")
    assert shown(target) == {"thesis.tex": b"years of work"}
    assert not (tmp_path / "out" / LABELS["bf16"]).exists()


@pytest.mark.parametrize("place", ["inside", "around", "same"])
def test_release_and_destination_must_be_apart(tmp_path: Path, place: str) -> None:
    release(tmp_path, "1", LABELS)
    model = tmp_path / "1" / "w4"
    before = shown(model)
    root, name = {
        "inside": (model, "out"),
        "around": (tmp_path, "1"),
        "same": (tmp_path / "1", "w4"),
    }[place]
    content = read_content("w4", name, model, DOCUMENTS)
    with pytest.raises(GraceError, match="inside each other"):
        publish_to_directory([content], root)
    assert shown(model) == before


def test_what_is_no_release_is_refused_with_all_reasons(tmp_path: Path) -> None:
    release(tmp_path, "1", LABELS)
    model = tmp_path / "1" / "w4"
    (model / "config.json").unlink()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    (model / "README.md").write_text("old")
    (model / "link").symlink_to("/etc/hostname")
    with pytest.raises(GraceError) as caught:
        read_content("w4", LABELS["w4"], model, DOCUMENTS)
    for reason in ("config.json is missing", "pickle", "safetensors weights", "README.md", "link"):
        assert reason in str(caught.value)
    with pytest.raises(GraceError, match="no directory"):
        read_content("w4", LABELS["w4"], tmp_path / "nothing", DOCUMENTS)


def test_an_index_that_nobody_understands_is_told(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(GraceError, match="no release index"):
        read_directory_index(tmp_path)
