"""The report as people read it: in a browser, as Markdown, from the command line."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Collection
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from grace_core.config.evaluation import Gate
from grace_core.evaluation.gate import judge
from grace_core.evaluation.items import Gold, Item, Picture, Question
from grace_core.evaluation.report.comparison import compare
from grace_core.evaluation.report.document import Report, make_report
from grace_core.evaluation.report.files import report_files
from grace_core.evaluation.report.recorded import RecordedModel, find_recorded
from tests.recorded_evaluations import Answers, write_recorded

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<img src=x onerror=alert(1)></script><script>document.title='owned'</script>"


def answers(right: int) -> dict[str, Answers]:
    return {name: [at < right for at in range(40)] for name in ("toy-choice", "toy-yesno")}


def asked(_model: RecordedModel, _benchmark: str, ids: Collection[str]) -> dict[str, Item]:
    file = io.BytesIO()
    Image.new("RGB", (900, 300), "teal").save(file, "png")
    found = {}
    for item in ids:
        content = (Picture(file.getvalue()), f"What is this? {HOSTILE}")
        gold = Gold(item, "mcq", {"A": HOSTILE, "B": "blue"}, ("A",))
        found[item] = Item(Question(item, "mcq", content), gold)
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("recorded")
    right = {"teacher": 40, "baseline": 20, "bf16": 36, "w8": 35, "w4": 33}
    sizes = {"teacher": 16e9, "baseline": 4e9, "bf16": 4e9, "w8": 2.8e9, "w4": 2.1e9}
    places = [
        write_recorded(
            folder / label,
            label,
            answers(count),
            model_bytes=int(sizes[label]),
            pixels=[784, 90_000 if label == "teacher" else 200_704],
        )
        for label, count in right.items()
    ]
    lines = folder / "w4" / "predictions" / "toy-choice.jsonl"
    lines.write_text(
        lines.read_text().replace('"response": "B"', f'"response": {json.dumps(HOSTILE)}')
    )
    models = find_recorded(places)
    comparison = compare(models, seed=0)
    gate = judge(Gate(floors={"average": 85}), models, comparison)
    return make_report(
        models, title=f"Models {HOSTILE}", find_items=asked, comparison=comparison, gate=gate
    )


class Elements(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_of_the_data_becomes_part_of_the_page(report: Report) -> None:
    page = report_files(report)["index.html"]
    elements = Elements(page).found
    assert sum(tag == "script" for tag, _ in elements) == 1
    assert not [attrs for _, attrs in elements if any(name.startswith("on") for name in attrs)]
    addresses = [attrs.get("src") or attrs.get("href") or "" for _, attrs in elements]
    outside = [text for text in addresses if text and not text.startswith(("data:", "#"))]
    assert outside == [], "the page needs no other file and no network"
    pictures = [attrs for tag, attrs in elements if tag == "img"]
    assert {(attrs["width"], attrs["height"]) for attrs in pictures} == {("320", "107")}
    assert all(attrs["alt"] for attrs in pictures)


def test_every_part_is_there(report: Report) -> None:
    page = report_files(report)["index.html"]
    for words in ("▲ +40.0", "▼ -17.5", "91.7 %", "97.2 %"):
        assert words in page, words
    assert "GRACE W4G128, average: 82.50 %, 2.50 below the floor of 85" in page
    assert "first &lt;half&gt;" in page, "a category"
    assert page.count("<td>784 to 200,704</td>") == 4
    assert page.count("<figure") == 2, "retention and size; no speed was recorded"


def test_markdown_and_json_say_the_same(report: Report) -> None:
    files = report_files(report)
    assert set(files) == {
        *("index.html", "report.md", "report.json", "table.md", "retention.svg", "size.svg"),
    }
    made = json.loads(files["report.json"])
    assert made["comparison"]["estimates"]["GRACE W4G128"]["average"]["value"] == 82.5
    assert made["gate"]["checks"]
    assert [model["pixels"][1] for model in made["models"]] == [90_000, *[200_704] * 4]
    markdown = files["report.md"]
    assert files["table.md"].strip() in markdown
    assert "| GRACE W4G128 | 82.5 | 82.5 | 82.5 | +32.5 | 91.7 % |" in files["table.md"]
    assert "between 784 and 90,000 pixels (Teacher); to between 784 and 200,704" in markdown
    assert "<script" not in markdown and "first &lt;half>" in markdown
    assert report_files(report) == files, "made again, it is the same"


def browse(page: Path, profile: Path, script: str, width: int) -> dict[str, object]:
    """What `script` puts into `found`, in a window of that width."""
    assert CHROMIUM is not None
    text = page.read_text().replace(
        "</body>",
        f"<script>const found = {{}};\n{script}\nconst out = document.createElement('pre');"
        "out.id = 'measured'; out.textContent = JSON.stringify(found);"
        "document.body.append(out);</script></body>",
    )
    measured = page.with_name(f"measured-{width}.html")
    # A window is never narrower than 500 pixels, a frame is.
    frame = page.with_name(f"frame-{width}.html")
    measured.write_text(text)
    frame.write_text(
        f'<iframe src="{measured.name}" width="{width}" height="900"></iframe>'
        "<script>onload = () => { const inside = frames[0].document;"
        "document.body.append(inside.getElementById('measured').cloneNode(true)); };</script>"
    )
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"),
            *("--allow-file-access-from-files", f"--user-data-dir={profile}"),
            *("--virtual-time-budget=10000", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    shown = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown is not None, done.stdout[-2000:]
    answer: dict[str, object] = json.loads(unescape(shown[1]))
    return answer


LOOK = """
const table = document.querySelector("#results table");
const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
found.before = names();
const average = [...table.tHead.rows[0].cells].find((head) => head.textContent === "average");
average.querySelector("button").click();
found.descending = names();
found.sort = average.getAttribute("aria-sort");
average.querySelector("button").click();
found.ascending = names();
found.title = document.title;
found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.broken = [...document.images].filter((image) => !image.naturalWidth).length;
found.svgs = [...document.querySelectorAll("figure svg")].map((svg) => {
  const box = svg.getBoundingClientRect();
  const outside = [...svg.querySelectorAll("text")].filter((text) => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1;
  });
  return {width: box.width, outside: outside.map((text) => text.textContent)};
});
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `make system-deps` installs it")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_sorts_and_fits_it(report: Report, tmp_path: Path, width: int) -> None:
    page = tmp_path / "index.html"
    page.write_text(report_files(report)["index.html"])
    found = browse(page, tmp_path / "profile", LOOK, width)
    order = ["Teacher", "Baseline", "GRACE BF16", "GRACE W8G128", "GRACE W4G128"]
    assert found["before"] == order
    best = ["Teacher", "GRACE BF16", "GRACE W8G128", "GRACE W4G128", "Baseline"]
    assert (found["descending"], found["sort"]) == (best, "descending")
    assert found["ascending"] == best[::-1]
    assert str(found["title"]).startswith("Models <img"), "text, and no program"
    assert found["overflow"] == 0, "pixels that a reader would have to scroll sideways"
    assert found["broken"] == 0
    svgs = found["svgs"]
    assert isinstance(svgs, list) and len(svgs) == 2
    for svg in svgs:
        assert svg["width"] > 250 and svg["outside"] == []
