"""What recorded evaluations say about each other: estimates, differences, retention, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from grace_core.evaluation.report.recorded import ItemRecord, RecordedModel
from grace_core.evaluation.report.resampling import RESAMPLES, Draws, Interval, interval, resample

AVERAGE = "average"
Verdict = Literal["better", "worse", "no difference shown"]
_SAME_PERCENT = 1e-6
"""Points by which a share that is counted again may differ from the recorded one."""


@dataclass(frozen=True)
class Estimate:
    """A score in percent."""

    value: float
    interval: Interval | None
    """95 %; None where `Comparison.unresampled` says why."""


@dataclass(frozen=True)
class Difference:
    """`first` minus `second`, in percentage points, on the same items."""

    first: str
    second: str
    on: str
    """A benchmark, or "average"."""

    value: float
    interval: Interval
    verdict: Verdict
    """Of `first`: no difference is shown where the interval holds 0."""

    only_first: int | None = None
    """Items that `first` has right and `second` not, or less so; None for the average."""

    only_second: int | None = None


@dataclass(frozen=True)
class Retention:
    """Percent of the BF16 model's average that a quantized model of the same run keeps."""

    model: str
    of: str
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """Everything that is computed from the items. Models go by key, in the report's order."""

    estimates: Mapping[str, Mapping[str, Estimate]]
    """Model -> benchmark or "average" -> estimate; refused numbers have no entry."""

    differences: Sequence[Difference]
    retention: Sequence[Retention]
    unresampled: Mapping[str, str]
    """Benchmark -> why there are no intervals and differences on it."""


def compare(
    models: Sequence[RecordedModel], *, seed: int, resamples: int = RESAMPLES
) -> Comparison:
    """Compare all models on all benchmarks that they were scored on."""
    benchmarks = list(dict.fromkeys(name for model in models for name in model.scores))
    estimates: dict[str, dict[str, Estimate]] = {model.key: {} for model in models}
    draws: dict[str, dict[str, _Sample]] = {}
    unresampled: dict[str, str] = {}
    for name in benchmarks:
        scored = [model for model in models if _percent(model, name) is not None]
        if not scored:
            continue
        reason = _cannot_resample(scored, name)
        if reason is None:
            draws[name] = _draw(scored, name, seed, resamples)
            reason = _not_as_recorded(scored, name, draws[name])
        if reason is not None:
            unresampled[name] = reason
            draws.pop(name, None)
        for model in scored:
            percent = _percent(model, name)
            assert percent is not None
            sample = draws.get(name, {}).get(model.key)
            estimates[model.key][name] = _estimate(percent, sample)
    averages: dict[str, _Sample] = {}
    for model in models:
        if model.scores and all(name in estimates[model.key] for name in benchmarks):
            average, value = _average(model, benchmarks, estimates, draws)
            averages |= {model.key: average} if average else {}
            estimates[model.key][AVERAGE] = _estimate(value, average)
    differences = []
    for first, second in combinations(reversed(models), 2):
        for on, samples in [*draws.items(), (AVERAGE, averages)]:
            if first.key in samples and second.key in samples:
                pair = samples[first.key], samples[second.key]
                differences.append(_difference(first, second, on, *pair))
    return Comparison(estimates, differences, _retention(models, estimates, averages), unresampled)


@dataclass(frozen=True)
class _Sample:
    value: float
    draws: NDArray[np.float64]
    """(resamples,), paired with those of the other models."""


def _estimate(value: float, sample: _Sample | None) -> Estimate:
    return Estimate(value, None if sample is None else interval(sample.draws))


def _percent(model: RecordedModel, name: str) -> float | None:
    return model.scores[name].percent if name in model.scores else None


def _cannot_resample(scored: Sequence[RecordedModel], name: str) -> str | None:
    first = scored[0].items[name]
    if not any(item.counted for item in first):
        return "its headline counts other items than the benchmark's declaration says"
    counted = [item for item in first if item.counted]
    if len(counted) > 1 and len({_cluster(item) for item in counted}) == 1:
        return "all its questions are about one picture, which says nothing of others"
    expected = [(item.id, item.group, item.counted) for item in first]
    for model in scored:
        if [(item.id, item.group, item.counted) for item in model.items[name]] != expected:
            return f"{model.key} was scored on other items than {scored[0].key}"
    headlines = [model.scores[name].headline for model in scored]
    rules = {headline.metric for headline in headlines if headline is not None}
    return None if len(rules) == 1 else f"scored by different rules: {', '.join(sorted(rules))}"


def _draw(
    scored: Sequence[RecordedModel], name: str, seed: int, resamples: int
) -> dict[str, _Sample]:
    items = [item for item in scored[0].items[name] if item.counted]
    correct = np.array(
        [[item.value for item in model.items[name] if item.counted] for model in scored]
    ).T
    whole = any(item.group is not None for item in items)
    found: Draws = resample(
        correct,
        [_unit(item) for item in items],
        whole_groups=whole,
        clusters=[_cluster(item) for item in items],
        seed=seed,
        name=name,
        resamples=resamples,
    )
    return {
        model.key: _Sample(float(found.value[at]), found.draws[:, at])
        for at, model in enumerate(scored)
    }


def _unit(item: ItemRecord) -> tuple[str, str]:
    return ("item", item.id) if item.group is None else ("group", item.group)


def _cluster(item: ItemRecord) -> tuple[str, str]:
    return _unit(item) if item.cluster is None else ("cluster", item.cluster)


def _not_as_recorded(
    scored: Sequence[RecordedModel], name: str, samples: Mapping[str, _Sample]
) -> str | None:
    for model in scored:
        recorded = _percent(model, name)
        assert recorded is not None
        if abs(samples[model.key].value - recorded) > _SAME_PERCENT:
            return "its headline is no share of items, nor of the groups that its items name"
    return None


def _average(
    model: RecordedModel,
    benchmarks: Sequence[str],
    estimates: Mapping[str, Mapping[str, Estimate]],
    draws: Mapping[str, Mapping[str, _Sample]],
) -> tuple[_Sample | None, float]:
    """Unweighted mean over the benchmarks; their items are drawn independently."""
    value = sum(estimates[model.key][name].value for name in benchmarks) / len(benchmarks)
    if any(name not in draws for name in benchmarks):
        return None, value
    drawn = sum(draws[name][model.key].draws for name in benchmarks) / len(benchmarks)
    return _Sample(value, np.asarray(drawn)), value


def _difference(
    first: RecordedModel, second: RecordedModel, on: str, one: _Sample, other: _Sample
) -> Difference:
    within = interval(one.draws - other.draws)
    verdict: Verdict = "no difference shown"
    if within.low > 0:
        verdict = "better"
    elif within.high < 0:
        verdict = "worse"
    only: tuple[int | None, int | None] = (None, None)
    if on != AVERAGE:
        pairs = [
            (a.value, b.value)
            for a, b in zip(first.items[on], second.items[on], strict=True)
            if a.counted
        ]
        only = (sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
    value = one.value - other.value
    return Difference(first.key, second.key, on, value, within, verdict, *only)


def _retention(
    models: Sequence[RecordedModel],
    estimates: Mapping[str, Mapping[str, Estimate]],
    averages: Mapping[str, _Sample],
) -> list[Retention]:
    """Of every quantized model against the BF16 model of its run, or the only one there is."""
    found = []
    full = [model for model in models if model.label == "bf16"]
    for model in models:
        if model.label not in ("w8", "w4"):
            continue
        beside = [other for other in full if other.folder.parent == model.folder.parent]
        (reference,) = beside if len(beside) == 1 else full if len(full) == 1 else (None,)
        if reference is None or AVERAGE not in estimates[model.key]:
            continue
        whole = estimates[reference.key].get(AVERAGE)
        if whole is None or whole.value == 0:
            continue
        within = None
        if model.key in averages and reference.key in averages:
            of = averages[reference.key].draws
            # A resample in which the reference has nothing right has no ratio.
            ratios = 100.0 * averages[model.key].draws[of > 0] / of[of > 0]
            within = interval(ratios)
        value = 100.0 * estimates[model.key][AVERAGE].value / whole.value
        found.append(Retention(model.key, reference.key, value, within))
    return found
