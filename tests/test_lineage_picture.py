"""The picture of a lineage as a real browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from grace_core.lineage.collect import lineage_of
from grace_core.lineage.page import page_files
from tests.test_lineage import FIT, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MEASURE = """
<script>
const found = [];
for (const group of document.querySelectorAll("g[data-node]")) {
  const box = group.querySelector("rect").getBBox();
  for (const text of group.querySelectorAll("text")) {
    const size = text.getBBox();
    found.push({node: group.dataset.node, text: text.textContent,
      inside: size.x >= box.x && size.x + size.width <= box.x + box.width &&
              size.y >= box.y && size.y + size.height <= box.y + box.height,
      letters: parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a});
  }
}
const crossed = [];
for (const group of document.querySelectorAll("g[data-edge]")) {
  const line = group.querySelector("path"), ends = group.dataset.edge.split(" < ");
  for (let at = 0; at <= line.getTotalLength(); at += 2) {
    const point = line.getPointAtLength(at);
    for (const other of document.querySelectorAll("g[data-node]")) {
      const box = other.querySelector("rect").getBBox();
      if (!ends.includes(other.dataset.node) && point.x > box.x && point.x < box.x + box.width &&
          point.y > box.y && point.y < box.y + box.height) {
        crossed.push([group.dataset.edge, other.dataset.node]);
      }
    }
  }
}
const out = document.createElement("pre");
out.id = "measured";
out.textContent = JSON.stringify({texts: found, crossed: crossed});
document.body.append(out);
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `make system-deps` installs it")
def test_words_fit_their_boxes_and_lines_go_round_them(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    long = "publish.name=A-Very-Long-Name-Of-A-Model-That-Somebody-May-Choose"
    made = run(tmp_path / "run", FIT, long)
    releases = [item for stage, item in made.items() if stage.startswith("release-")]
    lineage = lineage_of(releases, made.values())
    page = tmp_path / "page.html"
    page.write_text(page_files(lineage)["index.html"].replace("</body>", f"{MEASURE}</body>"))
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,2400"),
            *(f"--user-data-dir={tmp_path}/profile", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    measured = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout)
    assert measured is not None
    found = json.loads(unescape(measured[1]))
    assert {entry["node"] for entry in found["texts"]} == {node.id for node in lineage.nodes}
    assert [entry for entry in found["texts"] if not entry["inside"]] == []
    assert all(entry["letters"] >= 10 for entry in found["texts"]), "pixels, at 100 %"
    assert found["crossed"] == []
