"""Lineage from manifests: the tree, forward, what is gone, the picture, and what goes out."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_core.artifacts import Artifact
from grace_core.config import GraceConfig, load_config
from grace_core.errors import GraceError
from grace_core.lineage.collect import artifacts_below, lineage_of, outside_name
from grace_core.lineage.find import find_model
from grace_core.lineage.forward import descendants, models_in
from grace_core.lineage.graph import Lineage
from grace_core.lineage.layout import BOX_WIDTH, lay_out
from grace_core.lineage.page import page_files
from grace_core.lineage.picture import picture
from grace_core.lineage.published import published_form
from grace_core.lineage.text import plain_tree
from grace_core.stages import StageContext
from tests.stand_in_stages import StandIns, checkpoint

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"
RECORD = "teacher_outputs={}"
FIT = "teacher_fit={training: {steps: 2, row_tokens: 1024, rows_per_step: 4}}"


def run(folder: Path, *overrides: str) -> dict[str, Artifact]:
    """A whole run with stand-in stages; its artifacts by stage."""
    config = load_config(ROOT / "configs" / "toy.yaml", [f"run_dir={folder}", *overrides])
    stages, context = StandIns(), StageContext()
    data = stages.prepare_data(config, context)
    teacher = stages.fit_teacher(config, data, context) if config.teacher_fit else None
    teaching = teacher
    if config.records_teacher:
        teaching = stages.record_teacher(config, data, teacher, context)
    students = {"bf16": stages.distill(config, data, teaching, context)}
    for label in config.quantize.variants:
        students[label] = stages.quantize(config, label, data, teaching, students["bf16"], context)
    releases = {label: stages.release(config, item, context) for label, item in students.items()}
    rows: dict[str, Artifact | None] = {"teacher": teacher, "baseline": None, **releases}
    scores = {label: stages.evaluate(config, label, item, context) for label, item in rows.items()}
    stages.publish(config, releases, scores, context)
    return {item.manifest.stage: item for item in artifacts_below(folder)}


def test_a_student_of_recorded_outputs_descends_from_the_teacher(tmp_path: Path) -> None:
    made = run(tmp_path / "run", FIT, RECORD)
    lineage = find_model("w4", tmp_path / "run").lineage
    student = next(node for node in lineage.nodes if node.stage == "w4")
    assert dict(lineage.parents(student.id))["teacher"].stage == "teacher-outputs"
    ancestors = {lineage.node(one).stage for one in lineage.ancestors(student.id)}
    assert {"teacher-outputs", "teacher", "bf16", "data"} <= ancestors
    outputs = made["teacher-outputs"].manifest.parents
    assert outputs["teacher"].digest == made["teacher"].digest
    assert outputs["data"].digest == made["data"].digest


def edges_of(made: dict[str, Artifact], stages: set[str]) -> set[tuple[str, str, str]]:
    """(stage, role, digest) as the manifests of these stages have them."""
    return {
        (stage, role, parent.digest)
        for stage in stages
        for role, parent in made[stage].manifest.parents.items()
    }


def drawn_edges(lineage: Lineage) -> set[tuple[str, str, str]]:
    return {
        (lineage.node(e.child).stage, e.role, lineage.node(e.parent).digest) for e in lineage.edges
    }


def test_a_released_model_has_its_whole_past_scores_and_publication(tmp_path: Path) -> None:
    made = run(tmp_path / "run", FIT)
    found = find_model("w4", tmp_path / "run")
    lineage = found.lineage
    assert lineage.node(found.model).digest == made["release-w4"].digest
    past = {"release-w4", "w4", "bf16", "teacher", "data", "world"}
    said = {"evaluate-w4", "benchmarks", "publish"}
    assert {n.stage for n in lineage.nodes} == past | said | {"checkpoint"}
    told = edges_of(made, past | said)
    others = {made[s].digest for s in made if s not in past | said}
    assert drawn_edges(lineage) == {edge for edge in told if edge[2] not in others}
    assert lineage.node(f"publish:{made['publish'].digest}").published.keys() == {"release-w4"}
    position = {node.id: number for number, node in enumerate(lineage.nodes)}
    assert all(position[edge.parent] < position[edge.child] for edge in lineage.edges)
    assert Lineage.model_validate_json(lineage.model_dump_json()) == lineage
    (whole,) = lineage.configs.values()
    assert GraceConfig.model_validate(whole).run_dir == tmp_path / "run"


def test_the_tree_tells_counts_scores_settings_and_versions(tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    found = find_model("Toy-GRACE-W4G128", tmp_path)
    text = plain_tree(found.lineage, found.model)
    first, *lines = text.splitlines()
    assert first == f"release-w4 Toy-GRACE-W4G128 {made['release-w4'].digest[:12]}  0.0 MB"
    (scores,) = [line for line in lines if "scores: evaluate-w4" in line]
    assert scores.endswith("toy-choice 75.0")
    (w4,) = [line for line in lines if "model: w4" in line]
    assert made["w4"].digest[:12] in w4 and "40 steps, ZeRO-2" in w4
    assert sum("tokenizer" in line or "world" in line for line in lines) == 1, "spelt out once"
    assert [line for line in lines if "data " in line][1].endswith("5 records (see above)")
    teacher = checkpoint("assets/toy/teacher").digest[:12]
    assert [line for line in lines if f"teacher: checkpoint teacher {teacher}" in line]
    for label in ("configuration: ", "code: 0.", "environment: python 3."):
        assert label in text


def test_an_ancestor_whose_folder_is_gone_is_shown_with_its_digest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = run(tmp_path / "run")
    shutil.rmtree(made["data"].path)
    manifest = made["bf16"].path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    found = find_model("release-w4", tmp_path)
    nodes = {node.stage: node for node in found.lineage.nodes}
    for stage in ("data", "bf16"):
        assert (nodes[stage].present, nodes[stage].digest) == (False, made[stage].digest)
    assert "world" not in nodes, "nothing here says any more what the data were made from"
    assert f"data {made['data'].digest[:12]}  its folder is gone" in plain_tree(
        found.lineage, found.model
    )
    assert "left out of the lineage" in caplog.text


def test_a_run_directory_may_be_moved(tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    lineage = find_model("w4", tmp_path).lineage
    assert all(node.present for node in lineage.nodes)
    assert {"world", "data", "bf16"} <= {node.stage for node in lineage.nodes}
    assert made["data"].digest in {node.digest for node in lineage.nodes}


@pytest.mark.parametrize(
    "name",
    [
        lambda made: "Toy-GRACE-W4G128",
        lambda made: "someone/Toy-GRACE-W4G128",
        lambda made: "release-w4",
        lambda made: made["release-w4"].digest[:8],
        lambda made: str(made["release-w4"].path),
        lambda made: str(made["release-w4"].path / "model"),
    ],
)
def test_a_model_is_found_by(name: Callable[[dict[str, Artifact]], str], tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    (made["release-w4"].path / "model").mkdir()
    found = find_model(name(made), tmp_path)
    assert found.artifact is not None
    assert found.artifact.digest == made["release-w4"].digest


def test_names_that_mean_nothing_or_several_things_are_explained(tmp_path: Path) -> None:
    run(tmp_path / "one")
    with pytest.raises(GraceError, match=r"no model w5 .*Toy-GRACE-BF16, Toy-GRACE-W4G128"):
        find_model("w5", tmp_path)
    run(tmp_path / "two", "quantize.training.steps=7")
    assert find_model("bf16", tmp_path).lineage.models, "the same content twice is one model"
    with pytest.raises(GraceError, match="several models; give the digest of one") as error:
        find_model("w4", tmp_path)
    digests = re.findall(r"\n  ([0-9a-f]{12})  ", str(error.value))
    assert len(digests) == 2
    assert len({find_model(digest, tmp_path).model for digest in digests}) == 2


def test_scores_of_other_models_with_the_same_answers_stay_with_those(tmp_path: Path) -> None:
    """Two models may answer alike, so that their evaluations have one digest."""
    known = []
    for seed in (1, 2):
        made = run(tmp_path / f"run{seed}", f"seed={seed}", f"distill.training.steps={seed}")
        known += list(made.values())
    twin, content = [a for a in known if a.manifest.stage == "evaluate-bf16"]
    manifest = twin.manifest.model_copy(update={"digest": content.digest})
    known[known.index(twin)] = Artifact(twin.path, manifest)
    for seed in (1, 2):
        (release,) = [
            a
            for a in known
            if a.manifest.stage == "release-bf16" and a.path.parts[-3] == f"run{seed}"
        ]
        lineage = lineage_of([release], known)
        assert [n.digest for n in lineage.nodes if n.stage == "release-bf16"] == [release.digest]


def test_forward_from_data_and_teacher_over_all_runs(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one"), run(tmp_path / "two", "quantize.training.steps=7")
    other = run(tmp_path / "three", "data.source.records=7")
    known = artifacts_below(tmp_path)
    found = {node.digest for node in models_in(descendants(one["data"].digest[:10], known))}
    labels = ("release-bf16", "release-w8", "release-w4")
    assert found == {made[label].digest for made in (one, two) for label in labels}
    assert other["release-w4"].digest not in found
    teacher = checkpoint("assets/toy/teacher").digest
    below = descendants(teacher, known)
    assert {node.digest for node in models_in(below)} >= found | {other["release-w4"].digest}
    assert "world" not in {node.stage for node in below.nodes}
    with pytest.raises(GraceError, match="nothing here was made from 0123456789"):
        descendants("0123456789", known)


@pytest.mark.parametrize("settings_", [(), (FIT,), ("quantize.variants=[w4]",)])
def test_every_node_and_edge_is_drawn_and_no_box_covers_another(
    tmp_path: Path, settings_: tuple[str, ...]
) -> None:
    made = run(tmp_path / "run", *settings_)
    releases = [item for stage, item in made.items() if stage.startswith("release-")]
    lineage = lineage_of(releases, made.values())
    root = ElementTree.fromstring(picture(lineage))
    assert root.tag == f"{SVG}svg"
    groups = list(root.iter(f"{SVG}g"))
    assert {g.get("data-node") for g in groups} - {None} == {n.id for n in lineage.nodes}
    assert {g.get("data-edge") for g in groups} - {None} == {
        f"{e.child} < {e.parent}" for e in lineage.edges
    }
    boxes = []
    for group in groups:
        if group.get("data-node"):
            box = group.find(f"{SVG}rect")
            assert box is not None
            x, y, width, height = (float(box.attrib[n]) for n in ("x", "y", "width", "height"))
            assert x >= 0 and x + width <= float(root.attrib["width"])
            assert y >= 0 and y + height <= float(root.attrib["height"])
            boxes.append((x, y, x + width, y + height))
    for one, other in itertools.combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)
    for path in root.iter(f"{SVG}path"):
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path.attrib["d"])]
        assert len(numbers) % 2 == 0
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", picture(lineage)), "nothing is fetched"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_graph_is_laid_out_in_rows_from_sources_down(data: st.DataObject) -> None:
    nodes = [f"n{number}" for number in range(data.draw(st.integers(1, 9)))]
    pairs = [(c, p) for c, p in itertools.product(nodes, nodes) if nodes.index(p) < nodes.index(c)]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    layout = lay_out(nodes, edges)
    row = {node: number for number, line in enumerate(layout.rows) for node in line}
    assert sorted(row) == sorted(nodes)
    for child, parent in edges:
        assert row[parent] < row[child]
        passed = [number for number, _ in layout.bends.get((child, parent), [])]
        assert passed == list(range(row[parent] + 1, row[child])), "a way round every row's boxes"
    for line in layout.rows:
        places = sorted(layout.centre[node] for node in line)
        assert all(b - a >= BOX_WIDTH for a, b in itertools.pairwise(places))
    for (_, _), bends in layout.bends.items():
        for number, place in bends:
            assert all(
                abs(place - layout.centre[node]) > BOX_WIDTH / 2 for node in layout.rows[number]
            )


def test_what_goes_out_names_no_place(tmp_path: Path) -> None:
    folder = tmp_path / "secret-place"
    made = run(
        folder / "run",
        f"models.teacher.path={folder}/teacher",
        "models.student.path=../student",
        f"publish.destination.path={folder}/out",
        f"data={{source: {{kind: sharegpt4v, root: {folder}/data, annotations: "
        f"[{folder}/data/sub/a.json, {folder}/b.json, c.json]}}, max_tokens: 512}}",
    )
    release = made["release-w4"]
    lineage = lineage_of([release], made.values())
    assert str(folder) in lineage.model_dump_json()
    teacher = checkpoint(f"{folder}/teacher").digest
    out = published_form(lineage, {teacher: "owner/teacher"})
    for text in (out.model_dump_json(), plain_tree(out, out.models[0]), picture(out)):
        assert "secret-place" not in text and str(tmp_path) not in text and ".." not in text
    assert out.node(f"checkpoint:{teacher}").name == "owner/teacher"
    assert [(n.stage, n.digest) for n in out.nodes] == [(n.stage, n.digest) for n in lineage.nodes]
    assert out.edges == lineage.edges
    (config,) = out.configs.values()
    assert config["models"]["teacher"]["path"] == "${GRACE_MODELS_TEACHER_PATH}"
    assert config["data"]["source"]["root"] == "${GRACE_DATA_ROOT}"
    assert config["data"]["source"]["annotations"] == ["sub/a.json", "b.json", "c.json"]
    assert config["launch"].keys() <= {"processes", "threads_per_process", "device", "nodes"}
    assert "destination" not in config["publish"] and "run_dir" not in config
    assert {node.run_config for node in out.nodes} - {None} == out.configs.keys()


def test_inputs_from_outside_have_the_names_people_know() -> None:
    cached = "/home/x/.cache/huggingface/hub/models--Qwen--Qwen3-VL-8B/snapshots/0123abc"
    assert outside_name("checkpoint", cached) == "Qwen/Qwen3-VL-8B"
    assert outside_name("checkpoint", "assets/toy/teacher") == "teacher"
    assert outside_name("annotations", "/d/a.json, /d/b.json") == "a.json, b.json"


def test_the_files_of_the_page_agree(tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    lineage = lineage_of([made["release-w8"]], made.values())
    files = page_files(lineage)
    assert Lineage.model_validate(json.loads(files["lineage.json"])) == lineage
    assert files["lineage.svg"] in files["index.html"]
    for node in lineage.nodes:
        assert node.digest in files["index.html"]
    assert not re.search(r'(?:src|href)="', files["index.html"]), "the page needs nothing else"


def test_a_published_directory_tells_its_own_lineage(tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    lineage = published_form(lineage_of([made["release-w4"]], made.values()), {})
    folder = tmp_path / "elsewhere" / "Toy-GRACE-W4G128"
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"format": 2, "repository": folder.name, "lineage": None}
    (folder / "grace_manifest.json").write_text(json.dumps(content))
    with pytest.raises(GraceError, match="holds no lineage that this version reads"):
        find_model(str(folder), tmp_path)
    content["lineage"] = lineage.model_dump(mode="json")
    (folder / "grace_manifest.json").write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "run")
    found = find_model(str(folder), tmp_path / "nothing-here")
    assert (found.artifact, found.lineage) == (None, lineage)
