"""Benchmarks from a Hub: the files of one split at one commit, and no others."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from grace_core.artifacts import Artifact
from grace_core.config import load_config
from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.items import Item
from grace_core.evaluation.loading.data_files import files_of_split, read_front_matter
from grace_core.evaluation.loading.place import Wanted, locate, resolve_revision
from grace_core.evaluation.loading.rows import load_items
from grace_core.stages import StageContext
from grace_core.stages.benchmarks import prepare_benchmarks
from tests.benchmark_rows import BLUE, PICTURE, RED, ROWS, SCHEMAS, cell
from tests.findings import toy
from tests.hub_server import Blob, Hub, Repository, running_hub

TOKEN = "hf_NeverToBeSeenAnywhere"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    resolve_revision.cache_clear()
    with running_hub(TOKEN) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running
    resolve_revision.cache_clear()


def parquet(name: str, *rows: dict[str, Any]) -> Blob:
    return written(rows, SCHEMAS[name])


def written(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> Blob:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), stream)
    return Blob(stream.getvalue(), large=True)


def card(*configs: tuple[str, dict[str, str]]) -> Blob:
    lines = ["---", "license: mit", "configs:"]
    for name, splits in configs:
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return Blob("\n".join([*lines, "---", "# Rows"]).encode(), large=False)


def offer(hub: Hub, name: str, files: dict[str, Blob]) -> str:
    """Commit the files; returns the commit."""
    repository = hub.repositories.setdefault(name, Repository(private=False))
    return repository.add_commit(files)


def load(name: str, **wanted: Any) -> list[Item]:
    declared = find_benchmark(name)
    return load_items(declared, locate(declared, Wanted(**wanted)))


def fetched(hub: Hub) -> set[str]:
    """Names of the files that were downloaded."""
    return {
        each.split("/resolve/")[1].split("/", 1)[1]
        for each in hub.requests
        if "GET" in each and "/resolve/" in each
    }


def test_all_configurations_of_a_split_are_read_in_the_cards_order(hub: Hub) -> None:
    music, maths = ROWS["mmmu"]
    readme = card(
        ("Music", {"dev": "Music/dev-*", "validation": "Music/validation-*"}),
        ("Math", {"dev": "Math/dev-*", "validation": "Math/validation-*"}),
    )
    commit = offer(
        hub,
        "MMMU/MMMU",
        {
            "README.md": readme,
            "Math/dev-00000-of-00001.parquet": parquet("mmmu", maths),
            "Math/validation-00000-of-00001.parquet": parquet("mmmu", maths),
            "Music/dev-00000-of-00001.parquet": parquet("mmmu", music),
            "Music/validation-00000-of-00001.parquet": parquet("mmmu", music),
        },
    )
    assert [item.id for item in load("mmmu")] == ["validation_Music_1", "validation_Math_15"]
    assert fetched(hub) == {
        "README.md",
        "Math/validation-00000-of-00001.parquet",
        "Music/validation-00000-of-00001.parquet",
    }
    assert [item.id for item in load("mmmu", config="Math")] == ["validation_Math_15"]
    place = locate(find_benchmark("mmmu"), Wanted())
    assert (place.repository, place.revision) == ("MMMU/MMMU", commit)


def test_several_splits_follow_one_another(hub: Hub) -> None:
    """The second has no column of pictures at all."""
    pictured, plain = ROWS["hallusionbench"]
    without = pa.schema([each for each in SCHEMAS["hallusionbench"] if each.name != "image"])
    files = {
        "README.md": card(("default", {"image": "data/image-*", "non_image": "data/non_image-*"})),
        "data/image-00000-of-00001.parquet": parquet("hallusionbench", pictured),
        "data/non_image-00000-of-00001.parquet": written([plain], without),
    }
    offer(hub, "lmms-lab/HallusionBench", files)
    items = load("hallusionbench")
    assert [len(item.question.pictures) for item in items] == [1, 0]
    assert len(load("hallusionbench", split="image")) == 1


def test_pictures_of_a_table_of_their_own_are_found_by_id(hub: Hub) -> None:
    """GQA: 12578 questions name 398 pictures of another configuration."""
    columns = [(name, pa.string()) for name in ("id", "imageId", "question", "answer")]
    types = pa.struct([(name, pa.string()) for name in ("detailed", "semantic", "structural")])
    schema = pa.schema([*columns, ("types", types)])
    row = {"id": "201307251", "imageId": "n161313", "question": "Is it wet?", "answer": "no"}
    rows = [{**row, "types": {"detailed": "x", "semantic": "attr", "structural": "verify"}}]
    shown = [{"id": "n161313", "image": cell(BLUE)}, {"id": "n1", "image": cell(RED)}]
    files = {
        "README.md": card(
            ("testdev_balanced_images", {"testdev": "testdev_balanced_images/testdev-*"}),
            (
                "testdev_balanced_instructions",
                {"testdev": "testdev_balanced_instructions/testdev-*"},
            ),
        ),
        "testdev_balanced_images/testdev-00000-of-00001.parquet": written(
            shown, pa.schema([("id", pa.string()), ("image", PICTURE)])
        ),
        "testdev_balanced_instructions/testdev-00000-of-00001.parquet": written(
            [*rows, {**rows[0], "id": "2", "imageId": "n1"}],
            pa.schema([*columns, ("types", types)]),
        ),
    }
    offer(hub, "lmms-lab/GQA", files)
    items = load("gqa")
    assert [item.question.pictures[0].encoded() for item in items] == [BLUE, RED]
    assert items[0].gold.fields == {"semantic": "attr", "structural": "verify"}
    bad = written([{**rows[0], "imageId": "n2"}], schema)
    name = "testdev_balanced_instructions/testdev-00000-of-00001.parquet"
    offer(hub, "lmms-lab/GQA", {**files, name: bad})
    resolve_revision.cache_clear()
    with pytest.raises(GraceError, match="its picture 'n2' is neither"):
        load("gqa")


def test_a_revision_stays_what_it_was(hub: Hub) -> None:
    one = parquet("mmstar", ROWS["mmstar"][0])
    both = parquet("mmstar", *ROWS["mmstar"])
    old = offer(hub, "me/rows", {"val.parquet": one})
    new = offer(hub, "me/rows", {"val.parquet": both})
    assert resolve_revision("me/rows", None) == resolve_revision("me/rows", "main") == new
    assert len(load("mmstar", repository="me/rows")) == 2
    assert len(load("mmstar", repository="me/rows", revision=old)) == 1


def test_a_run_keeps_to_the_commit_that_it_took_first(hub: Hub, tmp_path: Path) -> None:
    """A data set is edited between the evaluation and the approval."""

    def prepared(run: str, *, finished_only: bool = False) -> Artifact:
        resolve_revision.cache_clear()  # as in a process of its own
        config = toy("evaluation.benchmarks=[mmstar]", f"run_dir={tmp_path / run}")
        return prepare_benchmarks(config, StageContext(finished_only=finished_only))

    files = {
        "README.md": card(("val", {"val": "val-*"})),
        "val-00000-of-00001.parquet": parquet("mmstar", *ROWS["mmstar"]),
    }
    old = offer(hub, "Lin-Chen/MMStar", files)
    with pytest.raises(GraceError, match="stage benchmarks is not done"):
        prepared("run", finished_only=True)
    assert not hub.requests
    made = prepared("run")
    edited = Blob(files["README.md"].content + b", for you", large=False)
    new = offer(hub, "Lin-Chen/MMStar", {**files, "README.md": edited})
    asked = len(hub.requests)
    assert prepared("run", finished_only=True).path == made.path
    assert prepared("run").path == made.path
    assert len(hub.requests) == asked
    commits = [
        parent.revision
        for artifact in (made, prepared("another"))
        for parent in artifact.manifest.parents.values()
    ]
    assert commits == [old, new]


def test_what_is_downloaded_is_found_without_a_connection(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "README.md": card(("val", {"val": "val-*"})),
        "val-00000-of-00001.parquet": parquet("mmstar", *ROWS["mmstar"]),
    }
    commit = offer(hub, "Lin-Chen/MMStar", files)
    online = load("mmstar")
    resolve_revision.cache_clear()
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        assert [item.id for item in load("mmstar", revision=revision)] == [
            item.id for item in online
        ]
    assert len(hub.requests) == before
    with pytest.raises(GraceError, match=r"lmms-lab/ai2d cannot be had .*set .* `path`"):
        load("ai2d")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"repository": "no/where"}, "no/where is no data set of the Hub"),
        ({"revision": "v9"}, "has no such revision"),
        ({"config": "fr"}, "no configuration 'fr'; there are en, cn: set `config`"),
        ({"split": "train"}, "no split 'train'; there are dev: set `split`"),
        ({"config": "cn"}, "one of 1 of 2 files"),
    ],
)
def test_what_is_not_there_is_named(hub: Hub, wanted: dict[str, str], says: str) -> None:
    rows = parquet("mmbench", *ROWS["mmbench"])
    files = {
        "README.md": card(("en", {"dev": "en/dev-*"}), ("cn", {"dev": "cn/dev-*"})),
        "en/dev-00000-of-00001.parquet": rows,
        "cn/dev-00001-of-00002.parquet": rows,
    }
    offer(hub, "lmms-lab/MMBench", files)
    assert len(load("mmbench")) == 2
    with pytest.raises(GraceError) as caught:
        load("mmbench", **wanted)
    assert says in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_clone_of_the_repository_is_read_like_it(tmp_path: Path) -> None:
    files = {
        "README.md": card(("cn", {"dev": "cn/dev-*"}), ("en", {"dev": "en/dev-*"})),
        "cn/dev-00000-of-00001.parquet": parquet("mmbench", ROWS["mmbench"][1]),
        "en/dev-00000-of-00002.parquet": parquet("mmbench", ROWS["mmbench"][0]),
        "en/dev-00001-of-00002.parquet": parquet("mmbench", ROWS["mmbench"][1]),
    }
    for name, blob in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(blob.content)
    assert [item.id for item in load("mmbench", path=tmp_path)] == ["7", "1000007"]
    assert [item.id for item in load("mmbench", path=tmp_path, config="cn")] == ["1000007"]
    (tmp_path / "en" / "dev-00000-of-00002.parquet").unlink()
    with pytest.raises(GraceError, match=r"dev-00000-of-00002\.parquet is missing"):
        load("mmbench", path=tmp_path)


NAMES = [
    *("data/test-00000-of-00001.parquet", "data/test_mini-00000-of-00001.parquet"),
    *("en/dev.parquet", "images/test.png", "non_image-x.parquet"),
]


@pytest.mark.parametrize(
    ("config", "split", "found"),
    [
        (None, "test", ["data/test-00000-of-00001.parquet"]),
        (None, "test_mini", ["data/test_mini-00000-of-00001.parquet"]),
        ("en", "dev", ["en/dev.parquet"]),
        ("en", "other", ["en/dev.parquet"]),  # a lone file is not called after its split
    ],
)
def test_without_a_card_names_tell_the_split(
    config: str | None, split: str, found: list[str]
) -> None:
    assert files_of_split(NAMES, {}, config, split) == found


def test_a_card_may_list_files_in_several_ways() -> None:
    def found(data_files: object) -> list[str]:
        metadata = {"configs": [{"config_name": "default", "data_files": data_files}]}
        return files_of_split(["b.parquet", "a.parquet"], metadata, None, "train")

    assert found("*.parquet") == found(["*.parquet"]) == ["a.parquet", "b.parquet"]
    assert found([{"split": "train", "path": ["b.parquet", "a.parquet"]}]) == [
        *("b.parquet", "a.parquet")
    ]
    assert read_front_matter("# no metadata") == {}
    with pytest.raises(GraceError, match="no YAML"):
        read_front_matter("---\na: [\n---\n")


@pytest.mark.parametrize(
    ("entry", "count", "part"),
    [
        ("mmstar", 2, False),
        ("{name: mmstar, items: 1}", 1, True),
        ("{name: mmstar, items: 2}", 2, False),
        ("{name: mmstar, split: other}", 1, False),
        ("{name: mmstar, repository: mine/mmstar, config: val}", 1, False),
    ],
)
def test_what_was_asked_is_recorded(
    hub: Hub, tmp_path: Path, entry: str, count: int, part: bool
) -> None:
    rows = ROWS["mmstar"]
    both = {"a.parquet": parquet("mmstar", *rows), "b.parquet": parquet("mmstar", *rows[:1])}
    commits = {
        name: offer(hub, name, {"README.md": card(("val", files)), **both})
        for name, files in (
            ("Lin-Chen/MMStar", {"val": "a.parquet", "other": "b.parquet"}),
            ("mine/mmstar", {"val": "b.parquet"}),
        )
    }
    toy = Path(__file__).resolve().parent.parent / "configs" / "toy.yaml"
    overrides = [f"run_dir={tmp_path / 'run'}", f"evaluation.benchmarks=[{entry}]"]
    made = prepare_benchmarks(load_config(toy, overrides), StageContext())
    name = "mine/mmstar" if "mine" in entry else "Lin-Chen/MMStar"
    assert made.manifest.facts["mmstar"] == {
        "repository": name,
        "revision": commits[name],
        "config": "val",
        "split": "other" if "other" in entry else "val",
        "prompt": "llava",
        "part": part,
        "declared": "split" not in entry and "mine" not in entry,
    }
    assert made.manifest.metrics["mmstar/items"] == count
