"""The regression gate: what a released model must score before anything is published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from grace_core.config.evaluation import Gate
from grace_core.errors import GraceError
from grace_core.evaluation.report.comparison import AVERAGE, Comparison, Estimate
from grace_core.evaluation.report.recorded import RecordedModel
from grace_core.evaluation.report.resampling import Interval

Demand = Literal["complete", "floor", "retention", "gain", "parse failures"]

_RELEASED = ("bf16", "w8", "w4")


class Check(BaseModel):
    """One demand on one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    demand: Demand
    on: str
    """A benchmark, or "average"."""

    needed: float
    """At least, but at most for parse failures. Percent; points for a gain."""

    found: float | None
    """The number that decides; None where there is none."""

    unit: str
    passed: bool
    problem: str | None = None
    """In words, where it did not pass."""


class GateVerdict(BaseModel):
    """Every check of every released model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decides: Literal["value", "lower_bound", "upper_bound"]
    checks: tuple[Check, ...]
    override: str | None = None
    """Why it is published all the same."""

    @property
    def shortfalls(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        return not self.shortfalls

    @property
    def in_words(self) -> str:
        """For logs and pages: how many checks there were, and what falls short."""
        if not self.checks:
            return "nothing is demanded"
        if self.passed:
            return f"all {len(self.checks)} checks passed"
        listed = "\n".join(f"  - {check.problem}" for check in self.shortfalls)
        return f"{len(self.shortfalls)} of {len(self.checks)} checks failed:\n{listed}"


class GateClosed(GraceError):
    """A released model falls short of what the configuration demands; nothing was published."""

    def __init__(self, verdict: GateVerdict) -> None:
        self.verdict = verdict
        super().__init__(
            f"nothing is published, the regression gate is closed: {verdict.in_words}\n"
            "Train better models, or demand less in evaluation.gate. To publish these all the "
            'same, say why: --set evaluation.gate.override="the reason"; it is recorded with them'
        )


def require_open(verdict: GateVerdict) -> None:
    """Raises GateClosed where a model falls short and nobody has overridden the gate."""
    if not verdict.passed and verdict.override is None:
        raise GateClosed(verdict)


def judge(gate: Gate, models: Sequence[RecordedModel], comparison: Comparison) -> GateVerdict:
    """Hold the released among `models` against what the configuration demands."""
    checks = []
    for model in models:
        if model.label in _RELEASED:
            checks += [
                *_completeness(gate, model),
                *_floors(gate, model, comparison),
                *_retention(gate, model, comparison),
                *_gain(gate, model, models, comparison),
                *_parse_failures(gate, model),
            ]
    return GateVerdict(decides=gate.decides, checks=tuple(checks), override=gate.override)


def _completeness(gate: Gate, model: RecordedModel) -> Iterator[Check]:
    if not gate.complete:
        return
    for name, score in model.scores.items():
        refused = score.headline_refused
        problem = None
        if refused is not None:
            problem = f"{model.key}, {name}: no number, {refused}"
        elif score.part is not None:
            problem = (
                f"{model.key}, {name}: {score.part}, which is not the whole benchmark; leave out "
                "evaluation.items, and name its whole data"
            )
        yield Check(
            model=model.key,
            demand="complete",
            on=name,
            needed=100.0,
            found=100.0 * score.answered / max(score.total, *score.part_of, 1),
            unit="% answered",
            passed=problem is None,
            problem=problem,
        )


def _floors(gate: Gate, model: RecordedModel, comparison: Comparison) -> Iterator[Check]:
    estimates = comparison.estimates[model.key]
    for name, floor in gate.floors.items():
        yield _at_least(gate, model, "floor", name, floor, estimates.get(name), "%")


def _retention(gate: Gate, model: RecordedModel, comparison: Comparison) -> Iterator[Check]:
    needed = {"w8": gate.retention.w8, "w4": gate.retention.w4}.get(model.label)
    if needed is None:
        return
    kept = [each for each in comparison.retention if each.model == model.key]
    found = Estimate(kept[0].value, kept[0].interval) if kept else None
    yield _at_least(gate, model, "retention", AVERAGE, needed, found, "% of BF16")


def _gain(
    gate: Gate, model: RecordedModel, models: Sequence[RecordedModel], comparison: Comparison
) -> Iterator[Check]:
    if gate.min_gain is None:
        return
    baselines = {other.key for other in models if other.label == "baseline"}
    found = None
    for difference in comparison.differences:
        pair = (difference.first, difference.second, difference.on)
        if pair[0] == model.key and pair[1] in baselines and pair[2] == AVERAGE:
            found = Estimate(difference.value, difference.interval)
    if found is None:
        found = _plain_gain(model, baselines, comparison.estimates)
    yield _at_least(gate, model, "gain", AVERAGE, gate.min_gain, found, "points")


def _plain_gain(
    model: RecordedModel,
    baselines: set[str],
    estimates: Mapping[str, Mapping[str, Estimate]],
) -> Estimate | None:
    """The gain where a benchmark could not be resampled, without an interval."""
    own = estimates[model.key].get(AVERAGE)
    theirs = [estimates[key][AVERAGE] for key in baselines if AVERAGE in estimates[key]]
    return Estimate(own.value - theirs[0].value, None) if own and len(theirs) == 1 else None


def _parse_failures(gate: Gate, model: RecordedModel) -> Iterator[Check]:
    for name, score in model.scores.items():
        limit = gate.most_parse_failures(name)
        if limit is None:
            continue
        found = 100.0 * score.parse_failures / score.answered if score.answered else None
        passed = found is not None and found <= limit
        problem = None
        if found is None:
            problem = f"{model.key}, {name}: no answer at all"
        elif not passed:
            problem = (
                f"{model.key}, {name}: nothing can be read from {found:.2f} % of the answers "
                f"({score.parse_failures} of {score.answered}), {found - limit:.2f} above "
                f"{limit:g} %"
            )
            if score.cut_off:
                problem += (
                    f"; {score.cut_off} of them were cut off, which more tokens "
                    "(evaluation.max_new_tokens) may mend"
                )
        yield Check(
            model=model.key,
            demand="parse failures",
            on=name,
            needed=limit,
            found=found,
            unit="% unreadable",
            passed=passed,
            problem=problem,
        )


def _at_least(
    gate: Gate,
    model: RecordedModel,
    demand: Demand,
    on: str,
    needed: float,
    estimate: Estimate | None,
    unit: str,
) -> Check:
    found = None if estimate is None else _deciding(gate, estimate.value, estimate.interval)
    passed = found is not None and found >= needed
    problem = None
    where = f"{model.key}, {on}"
    if estimate is None:
        problem = f"{where}: no number to hold against the {demand} of {needed:g} {unit}"
    elif found is None:
        problem = f"{where}: no interval, and evaluation.gate.decides is {gate.decides}"
    elif not passed:
        bound = "" if gate.decides == "value" else f"{gate.decides.replace('_', ' ')} "
        problem = (
            f"{where}: {bound}{found:.2f} {unit}, {needed - found:.2f} below the {demand} of "
            f"{needed:g}"
        )
    return Check(
        model=model.key,
        demand=demand,
        on=on,
        needed=needed,
        found=found,
        unit=unit,
        passed=passed,
        problem=problem,
    )


def _deciding(gate: Gate, value: float, interval: Interval | None) -> float | None:
    if gate.decides == "value":
        return value
    if interval is None:
        return None
    return interval.low if gate.decides == "lower_bound" else interval.high
