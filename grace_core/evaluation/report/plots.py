"""Plots of a report as SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grace_core.evaluation.report.comparison import AVERAGE
from grace_core.evaluation.report.document import Report
from grace_core.evaluation.report.recorded import RecordedModel
from grace_core.evaluation.table import Label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#010203"
"""Stands for the page's text colour, which a page may change."""

COLOURS: dict[Label, str] = {
    "teacher": "#8a8f98",
    "baseline": "#d98324",
    "bf16": "#4477d8",
    "w8": "#2e9d8f",
    "w4": "#9463d6",
}
_SIZE = (5.4, 3.6)  # inches


@dataclass(frozen=True)
class Plot:
    """One picture: what it is called, what it says in words, and its SVG."""

    name: str
    title: str
    words: str
    svg: str


def draw_plots(report: Report) -> list[Plot]:
    """Those that the recorded numbers allow: retention, accuracy against size and speed."""
    drawn = [_retention(report)]
    drawn.append(
        _against(
            report,
            "size",
            "Average accuracy against size on disk",
            "Weight files, MB",
            lambda model: None if model.model_bytes is None else model.model_bytes / 1e6,
        )
    )
    drawn.append(
        _against(
            report,
            "speed",
            "Average accuracy against speed",
            "Questions a second in this evaluation, loading included",
            lambda model: model.questions_per_second,
        )
    )
    return [plot for plot in drawn if plot is not None]


def _retention(report: Report) -> Plot | None:
    kept = report.comparison.retention
    if not kept:
        return None
    labels = {model.key: model.label for model in report.models}

    def draw(axes: Axes) -> None:
        for place, each in enumerate(kept):
            axes.plot(each.value, place, "o", color=COLOURS[labels[each.model]], markersize=8)
            if each.interval is not None:
                ends = [each.interval.low, each.interval.high]
                axes.plot(ends, [place, place], color=COLOURS[labels[each.model]], linewidth=2.5)
            axes.annotate(
                f"{each.value:.1f} %",
                (each.value, place),
                (0, 9),
                textcoords="offset points",
                ha="center",
            )
        axes.axvline(100.0, color=_INK, linewidth=1, linestyle="--", alpha=0.6)
        axes.set_yticks(range(len(kept)), [each.model for each in kept])
        axes.set_ylim(len(kept) - 0.4, -0.7)
        axes.set_xlabel("Per cent of the BF16 model's average")
        axes.margins(x=0.12)

    words = "; ".join(f"{each.model} keeps {each.value:.1f} % of {each.of}" for each in kept)
    svg = _svg(draw, height=1.4 + 0.6 * len(kept))
    return Plot("retention", "What quantization keeps", words, svg)


def _against(
    report: Report,
    name: str,
    title: str,
    label: str,
    measure: Callable[[RecordedModel], float | None],
) -> Plot | None:
    """Average accuracy over another number of the same models; needs two of them."""
    points: list[tuple[RecordedModel, float, Any]] = []
    for model in report.models:
        x, estimate = measure(model), report.comparison.estimates[model.key].get(AVERAGE)
        if x and estimate is not None:
            points.append((model, x, estimate))
    if len(points) < 2:
        return None

    def draw(axes: Axes) -> None:
        for model, x, estimate in points:
            colour = COLOURS[model.label]
            if estimate.interval is not None:
                ends = [estimate.interval.low, estimate.interval.high]
                axes.plot([x, x], ends, color=colour, linewidth=2, alpha=0.7)
            axes.plot(x, estimate.value, "o", color=colour, markersize=8)
        _name_points(axes, [(model, x, each.value) for model, x, each in points])
        axes.set_xscale("log")
        axes.margins(x=0.15, y=0.15)
        _plain_ticks(axes)
        axes.set_xlabel(label)
        axes.set_ylabel("Average accuracy, %")

    words = "; ".join(f"{model.key}: {x:.3g}, {each.value:.1f} %" for model, x, each in points)
    return Plot(name, title, f"{label}: {words}", _svg(draw))


def _name_points(axes: Axes, named: Sequence[tuple[RecordedModel, float, float]]) -> None:
    """Names beside their points and in their colour, moved down where they would cover another."""
    xs = [x for _, x, _ in named]
    ys = [y for _, _, y in named]
    height = max(max(ys) - min(ys), 1.0)
    placed: list[float] = []
    middle = (max(xs) * min(xs)) ** 0.5
    for model, x, y in sorted(named, key=lambda point: -point[2]):
        shift = 0.0
        while any(abs(y + shift - other) < 0.085 * height for other in placed):
            shift -= 0.02 * height
        placed.append(y + shift)
        left = x > middle
        axes.annotate(
            model.key,
            (x, y + shift),
            (-9 if left else 9, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=COLOURS[model.label],
            weight="bold",
        )


def _plain_ticks(axes: Axes) -> None:
    """Round numbers along a logarithmic axis, two at least where ten to a decade give them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    near: list[float] = []
    for leading in ((1, 2, 5), [n / 2 for n in range(2, 20)], [n / 10 for n in range(10, 100)]):
        steps = [m * 10.0**e for e in range(-3, 8) for m in leading]
        near = [step for step in steps if low <= step <= high]
        if len(near) >= 2:
            break
    axes.xaxis.set_major_locator(FixedLocator(near))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def _svg(draw: Callable[[Axes], None], height: float = _SIZE[1]) -> str:
    """Deterministic SVG without a background, its text as text, in the page's ink."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "grace",
        "text.parse_math": False,  # names are not formulas
        "font.family": "sans-serif",
        "font.size": 10,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
        ),
    }
    with rc_context(settings):
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_INK, alpha=0.12, linewidth=0.8)
        axes.set_axisbelow(True)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page decides how wide a picture is; its own size would not fit a phone.
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
