"""A report's files: the page, Markdown, JSON, the results table alone, and the plots."""

from __future__ import annotations

import json
from pathlib import Path

from grace_core.evaluation.report.document import Report
from grace_core.evaluation.report.html.page import page
from grace_core.evaluation.report.markdown import markdown
from grace_core.evaluation.report.plots import draw_plots
from grace_core.whole_files import write_whole

FOLDER = "report"
"""In a run's folder."""

PAGE, TEXT, DATA, TABLE = "index.html", "report.md", "report.json", "table.md"


def report_files(report: Report) -> dict[str, str]:
    """Text by file name."""
    plots = draw_plots(report)
    return {
        PAGE: page(report, plots),
        TEXT: markdown(report),
        DATA: as_json_text(report),
        TABLE: report.table().to_markdown() + "\n",
        **{f"{plot.name}.svg": plot.svg for plot in plots},
    }


def as_json_text(report: Report) -> str:
    return json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"


def write_report(report: Report, folder: Path) -> Path:
    """Write the files into `folder`, each whole or as it was; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in report_files(report).items():
        write_whole(folder / name, text)
    return folder / PAGE
