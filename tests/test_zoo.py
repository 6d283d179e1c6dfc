"""The model zoo: what it finds, what it says of it, and how that looks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grace_core.artifacts import Artifact, new_artifact, read_artifact
from grace_core.config import load_config
from grace_core.errors import GraceError
from grace_core.publish.zoo import Zoo, find_zoo, to_markdown, with_speed
from grace_core.publish.zoo_page import to_html

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCORES = {"bf16": (90.0, 80.0), "w8": (88.0, 80.0), "w4": (81.0, None)}


def make_run(folder: Path, name: str = "Toy-GRACE") -> Path:
    """What the stages leave of a run that was released, scored and published to a Hub."""
    destination = "{kind: hub, namespace: lab, endpoint: 'http://hub.example'}"
    config = load_config(
        ROOT / "configs/toy.yaml",
        [f"run_dir={folder}", f"publish.name={name}", f"publish.destination={destination}"],
    ).model_dump(mode="json")
    artifacts = folder / "artifacts"

    def make(stage: str, files: dict[str, str], **parents: Artifact) -> Artifact:
        place = artifacts / f"{stage}-{'0' * 12}"
        inputs = {role: parent.as_parent() for role, parent in parents.items()}
        with new_artifact(place, stage, {}, inputs, config) as writer:
            for path, text in files.items():
                (writer.path / path).parent.mkdir(parents=True, exist_ok=True)
                (writer.path / path).write_text(text)
        return read_artifact(place)

    students = {"bf16": make("bf16", {"model/a": name})}
    for label in ("w8", "w4"):
        students[label] = make(label, {"model/a": name + label}, student=students["bf16"])
    models = {}
    for label, student in students.items():
        files = {"model/model.safetensors": "x" * {"bf16": 4000, "w8": 2000, "w4": 1200}[label]}
        if label == "w4":
            files["awq/model.safetensors"] = "x" * 1300
        released = make(f"release-{label}", files, model=student)
        results = {
            benchmark: {"headline": None if score is None else {"percent": score}}
            for benchmark, score in zip(("toy-choice", "toy-yesno"), SCORES[label], strict=True)
        }
        make(
            f"evaluate-{label}",
            {"results.json": json.dumps({"benchmarks": results})},
            model=released,
        )
        models[label] = released
    index = {"models": {"w4": {"repository": f"lab/{name}-W4G128"}}}
    make(
        "publish",
        {"index.json": json.dumps(index)},
        **{f"release-{label}": model for label, model in models.items()},
    )
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return find_zoo(make_run(tmp_path_factory.mktemp("runs") / "first"))


def test_every_form_of_every_release_is_a_row(zoo: Zoo) -> None:
    found = [(model.name, model.form, model.group_size, model.size) for model in zoo.models]
    assert found == [
        ("Toy-GRACE-BF16", "safetensors", None, 4000),
        ("Toy-GRACE-W8G128", "compressed-tensors", 128, 2000),
        ("Toy-GRACE-W4G128", "compressed-tensors", 128, 1200),
        ("Toy-GRACE-W4G128-AWQ", "awq", 128, 1300),
    ]
    bf16, w8, w4, awq = zoo.models
    assert (bf16.average, w8.average, w4.average) == (85.0, 84.0, None)
    assert zoo.kept(bf16) is None and zoo.kept(w4) is None
    assert zoo.kept(w8) == pytest.approx(100 * 84 / 85)
    assert awq.scores == w4.scores, "the same codes"
    assert w4.where == "http://hub.example/lab/Toy-GRACE-W4G128" and w8.where is None


def test_the_table_says_it_all(zoo: Zoo) -> None:
    header, rule, *rows = to_markdown(zoo).splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names[:5] == ["Model", "Bits", "Group", "Format", "Size"]
    assert "Tokens/s" not in names, "nothing was measured"
    assert len(rule.strip("|").split("|")) == len(names)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == len(names) for row in cells)
    w8 = dict(zip(names, cells[1], strict=True))
    assert (w8["Bits"], w8["Average"], w8["of BF16"]) == ("int8", "84.0", "98.8 %")
    w4 = dict(zip(names, cells[2], strict=True))
    assert w4["Average"] == "–"
    assert w4["Model"] == "[Toy-GRACE-W4G128](http://hub.example/lab/Toy-GRACE-W4G128)"
    assert w4["Lineage"].endswith("/blob/main/lineage.svg)")


def test_what_was_measured_is_shown_beside(zoo: Zoo, tmp_path: Path) -> None:
    line = {"what": "decode", "batch": 1, "tokens_per_second": 1234.5, "weights_gib": 1.5}
    table = {
        "device": "NVIDIA H200",
        "lines": [
            line | {"weights": "w4"},
            line | {"weights": "w4", "batch": 8, "tokens_per_second": 9.0},
            line | {"weights": "bf16", "tokens_per_second": 600.0, "weights_gib": 4.0},
        ],
    }
    file = tmp_path / "decode.json"
    file.write_text(json.dumps(table))
    measured = with_speed(zoo, file)
    rates = [model.tokens_per_second for model in measured.models]
    assert rates == [600.0, None, 1234.5, None], "AWQ runs elsewhere"
    text = to_markdown(measured)
    assert "| 1,234 | 1.50 GiB |" in text and "NVIDIA H200" in text
    file.write_text("[]")
    with pytest.raises(GraceError, match="grace bench decode"):
        with_speed(zoo, file)


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "Alpha")
    make_run(tmp_path / "b", "Beta")
    names = [model.name.split("-")[0] for model in find_zoo(tmp_path).models]
    assert names == ["Alpha"] * 4 + ["Beta"] * 4


def test_a_folder_without_models_is_explained(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="no released model"):
        find_zoo(tmp_path)
    with pytest.raises(GraceError, match="is no folder"):
        find_zoo(tmp_path / "nowhere")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "grace_manifest.json").write_text("{}")
    with pytest.raises(GraceError, match="not what this version publishes"):
        find_zoo(tmp_path)


class Links(HTMLParser):
    """Everything that a page would fetch, and the ids in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.fetched += [str(given[name]) for name in ("src", "srcset", "data") if name in given]
        self.fetched += [str(given["href"])] if tag in ("link", "image", "use") else []
        self.ids += [str(given["id"])] if "id" in given else []
        assert tag not in ("script", "iframe", "object")


def test_the_page_needs_nothing_from_elsewhere(zoo: Zoo) -> None:
    page = Links()
    page.feed(to_html(zoo))
    assert page.fetched == []
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in to_html(zoo) and "url(http" not in to_html(zoo)


def test_names_are_no_markup(zoo: Zoo) -> None:
    hostile = replace(zoo.models[0], name="<script>alert(1)</script>", where='http://x/"><b>')
    page = to_html(replace(zoo, models=(hostile,), source="<i>here</i>"))
    assert "<script>" not in page and "<i>here" not in page and '"><b>' not in page


MEASURE = """<pre id="measured"></pre><script>
const cells = [...document.querySelectorAll("td, th")].map(cell => cell.getBoundingClientRect());
document.querySelectorAll("details").forEach(one => { one.open = true; });
document.getElementById("measured").textContent = JSON.stringify({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  rows: document.querySelectorAll("tbody tr").length,
  flat: cells.filter(box => box.width < 10 || box.height < 10).length,
  drawings: [...document.querySelectorAll("details svg")]
    .filter(one => one.getBoundingClientRect().width > 100).length});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `make system-deps` installs it")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it_whole(zoo: Zoo, tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    page = tmp_path / "page.html"
    page.write_text(to_html(zoo).replace("</body>", MEASURE), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1600"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path}/p", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    found = re.search(r'<pre id="measured">(.+?)</pre>', done.stdout)
    assert found is not None
    assert json.loads(unescape(found[1])) == {"wide": 0, "rows": 4, "flat": 0, "drawings": 3}
