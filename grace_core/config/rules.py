"""What several values of a configuration must satisfy together.

A rule is a small function that yields its problems, each starting with the key it is about. Rules
read a whole configuration, or the valid part of a broken one: there, asking for a value that is
wrong or missing raises `Unknown` and leaves out this rule alone, so that one mistake never hides
another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from grace_core.config.evaluation import OTHERS

if TYPE_CHECKING:
    from grace_core.config.training import TrainingStage
    from grace_core.config.tree import GraceConfig


_OWN = "the launcher sets it itself, leave it out"
_LAUNCHER_OPTIONS = {
    option: remedy
    for options, remedy in (
        ("--nodes -N", "set launch.nodes"),
        ("--cpus-per-task -c", "set launch.threads_per_process"),
        ("--time -t", "set launch.backend.time_limit_minutes"),
        ("--partition -p", "set launch.backend.partition"),
        ("--account -A", "set launch.backend.account"),
        ("--qos -q", "set launch.backend.qos"),
        ("--constraint -C", "set launch.backend.constraint"),
        ("--gpus-per-node", "set launch.backend.gpus_per_node"),
        ("--mem", "set launch.backend.memory_gb"),
        ("--signal", "set launch.backend.warning_seconds"),
        ("--job-name -J --output -o --error -e --open-mode --requeue --no-requeue", _OWN),
        ("--chdir -D --array -a --wrap --export --ntasks -n --ntasks-per-node", _OWN),
    )
    for option in options.split()
}
"""Options of sbatch that follow from other keys, and where to set those."""


_GENERATED = ("toy-choice", "toy-yesno")


class Unknown(Exception):
    """A rule asked for a value that is not valid itself."""


def broken_rules(config: GraceConfig) -> list[str]:
    """Problems of values that are valid one by one; empty when all fit together."""
    found: list[str] = []
    for rule in _RULES:
        found += _ask(rule(config))
    for name in ("teacher_fit", "distill", "quantize"):
        for stage_rule in _STAGE_RULES:
            found += _ask(_of_stage(stage_rule, name, config))
    return found


def _ask(problems: Iterable[str]) -> list[str]:
    found = []
    try:
        for problem in problems:
            found.append(problem)
    except Unknown:
        pass
    return found


def _of_stage(rule: StageRule, name: str, config: GraceConfig) -> Iterator[str]:
    stage = getattr(config, name)
    if stage is not None:
        for problem in rule(stage, config):
            yield f"{name}.{problem}"


def _pixels_in_order(config: GraceConfig) -> Iterator[str]:
    for name, section in (("data", config.data), ("evaluation", config.evaluation)):
        low, high = section.min_pixels, section.max_pixels
        if low is not None and high is not None and low > high:
            yield f"{name}.min_pixels ({low}) is above {name}.max_pixels ({high}); exchange them"


def _pixels_of_vllm(config: GraceConfig) -> Iterator[str]:
    evaluation = config.evaluation
    if evaluation.engine == "vllm":
        for key in ("min_pixels", "max_pixels"):
            if getattr(evaluation, key) is not None:
                yield (
                    f"evaluation.{key}: vLLM resizes pictures itself, as the checkpoint says; set "
                    "it to null, or the engine to transformers"
                )


def _annotations_once(config: GraceConfig) -> Iterator[str]:
    source = config.data.source
    if source.kind == "sharegpt4v":
        yield from _named_twice("data.source.annotations", source.annotations)


def _variants_once(config: GraceConfig) -> Iterator[str]:
    yield from _named_twice("quantize.variants", config.quantize.variants)


def _one_width_to_go_on_with(config: GraceConfig) -> Iterator[str]:
    variants = config.quantize.variants
    if config.quantize.start is not None and len(variants) > 1:
        yield (
            f"quantize.start: a checkpoint has one width, but quantize.variants are "
            f"{', '.join(variants)}; name the one that the checkpoint has"
        )


def _benchmarks_once(config: GraceConfig) -> Iterator[str]:
    names = [benchmark.name for benchmark in config.evaluation.benchmarks]
    yield from _named_twice("evaluation.benchmarks", names)


def _benchmarks_from_one_place(config: GraceConfig) -> Iterator[str]:
    for benchmark in config.evaluation.benchmarks:
        if benchmark.path is not None:
            beside = [key for key in ("repository", "revision") if getattr(benchmark, key)]
            if beside:
                yield (
                    f"evaluation.benchmarks: {benchmark.name} has a path and a {beside[0]}; the "
                    "one is on this machine, the other on the Hub: leave one out"
                )
        elif benchmark.repository is None and benchmark.name in _GENERATED:
            beside = [key for key in ("config", "split", "revision") if getattr(benchmark, key)]
            if beside:
                yield (
                    f"evaluation.benchmarks: {benchmark.name} is generated and has no "
                    f"{beside[0]}; leave it out"
                )


def _gate_asks_for_what_is_measured(config: GraceConfig) -> Iterator[str]:
    gate, benchmarks = config.evaluation.gate, config.evaluation.names
    for name in gate.floors:
        if name != "average" and name not in benchmarks:
            known = ", ".join(("average", *benchmarks))
            yield f"evaluation.gate.floors: nothing is scored on {name}; there are {known}"
    for name in gate.max_parse_failures:
        if name not in (OTHERS, *benchmarks):
            yield (
                f"evaluation.gate.max_parse_failures: nothing is scored on {name}; there are "
                f"{', '.join(benchmarks)}, and {OTHERS} for all that are not named"
            )


def _group_size_divides_widths(config: GraceConfig) -> Iterator[str]:
    size = config.quantize.group_size
    if size & (size - 1):
        yield (
            f"quantize.group_size ({size}) is no power of two, and the groups would not divide the "
            "layers' widths; use 128 as published, 64 or 32"
        )


def _teacher_has_no_teacher(config: GraceConfig) -> Iterator[str]:
    if config.teacher_fit is None:
        return
    objective = config.teacher_fit.objective
    if objective.distillation.kind != "none" or objective.relational.enabled:
        yield (
            "teacher_fit.objective: the teacher has no teacher of its own; set distillation.kind: "
            "none and relational.enabled: false"
        )


def _one_temperature_of_recorded_outputs(config: GraceConfig) -> Iterator[str]:
    if config.teacher_outputs is None:
        return
    learners = (config.distill.objective.distillation, config.quantize.objective.distillation)
    first, second = learners
    if first.kind != "none" and second.kind != "none" and first.temperature != second.temperature:
        yield (
            "teacher_outputs: outputs are recorded for one temperature, but "
            f"distill.objective.distillation.temperature is {first.temperature:g} and quantize's "
            f"{second.temperature:g}; make them equal, or leave teacher_outputs out"
        )


def _one_machine_without_a_scheduler(config: GraceConfig) -> Iterator[str]:
    if config.launch.backend.kind == "local" and config.launch.nodes > 1:
        yield (
            f"launch.nodes ({config.launch.nodes}): the local back-end starts processes on this "
            "machine alone; set launch.backend.kind: slurm, or nodes: 1"
        )


def _time_to_be_warned(config: GraceConfig) -> Iterator[str]:
    backend = config.launch.backend
    if backend.kind == "slurm" and backend.time_limit_minutes is not None:
        if backend.warning_seconds >= 60 * backend.time_limit_minutes:
            yield (
                f"launch.backend.warning_seconds ({backend.warning_seconds}) is not below "
                f"time_limit_minutes ({backend.time_limit_minutes}), so that every start would be "
                "stopped at once; lower the one or raise the other"
            )


def _options_of_the_launcher(config: GraceConfig) -> Iterator[str]:
    backend = config.launch.backend
    if backend.kind != "slurm":
        return
    for option in backend.options:
        name = re.split(r"[=\s]", option, maxsplit=1)[0]
        if name in _LAUNCHER_OPTIONS:
            yield f"launch.backend.options: {name} is not free; {_LAUNCHER_OPTIONS[name]}"


def _one_length(stage: TrainingStage, config: GraceConfig) -> Iterator[str]:
    steps, epochs = stage.training.steps, stage.training.epochs
    if steps is None and epochs is None:
        yield "training: its length is missing; give `steps` or `epochs`"
    elif steps is not None and epochs is not None:
        yield (
            f"training: its length is given twice, as steps ({steps}) and as epochs ({epochs:g}); "
            "leave one out"
        )


def _rows_for_every_process(stage: TrainingStage, config: GraceConfig) -> Iterator[str]:
    rows, nodes, processes = (
        stage.training.rows_per_step,
        config.launch.nodes,
        config.launch.processes,
    )
    everyone = nodes * processes
    if rows % everyone:
        above = -(-rows // everyone) * everyone
        of = (
            f"launch.processes ({processes})"
            if nodes == 1
            else f"launch.nodes * launch.processes ({nodes} * {processes})"
        )
        yield f"training.rows_per_step ({rows}) is not a multiple of {of}; use {above}"


def _samples_fit_their_row(stage: TrainingStage, config: GraceConfig) -> Iterator[str]:
    row, sample = stage.training.row_tokens, config.data.max_tokens
    if row < sample:
        yield (
            f"training.row_tokens ({row}) is below data.max_tokens ({sample}): a sample could not "
            "fit its row; raise the one or lower the other"
        )


def _something_to_minimise(stage: TrainingStage, config: GraceConfig) -> Iterator[str]:
    objective = stage.objective
    if not (
        objective.cross_entropy
        or objective.distillation.kind != "none"
        or objective.relational.enabled
    ):
        yield "objective: every term is switched off; leave at least one on"


def _beta_within_bounds(stage: TrainingStage, config: GraceConfig) -> Iterator[str]:
    controller = stage.objective.controller
    low, start, high = controller.beta_min, controller.beta_init, controller.beta_max
    if controller.kind == "adaptive" and not low <= start <= high:
        yield (
            f"objective.controller.beta_init ({start:g}) must lie between beta_min ({low:g}) and "
            f"beta_max ({high:g})"
        )


def _distillation_weighs_something(stage: TrainingStage, config: GraceConfig) -> Iterator[str]:
    terms = stage.objective.distillation
    if terms.kind in ("gated-decoupled", "decoupled") and terms.alpha == terms.beta_dkd == 0:
        yield (
            "objective.distillation: alpha and beta_dkd are both 0, so the term is nothing; set "
            "kind: none to switch it off"
        )


def _fixed_beta_weighs_something(stage: TrainingStage, config: GraceConfig) -> Iterator[str]:
    controller = stage.objective.controller
    off = stage.objective.distillation.kind == "none"
    if controller.kind == "fixed" and controller.beta_init == 0 and not off:
        yield (
            "objective.controller.beta_init: a fixed beta of 0 multiplies distillation by nothing; "
            "set distillation.kind: none to switch it off"
        )


def _omega_weighs_something(stage: TrainingStage, config: GraceConfig) -> Iterator[str]:
    relational = stage.objective.relational
    if relational.enabled and relational.omega == 0:
        yield (
            "objective.relational.omega is 0 and multiplies the term by nothing; set "
            "relational.enabled: false to switch it off"
        )


def _named_twice(key: str, names: Sequence[str]) -> Iterator[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield f"{key} names {', '.join(twice)} more than once; name each once"


Rule = Callable[["GraceConfig"], Iterator[str]]
StageRule = Callable[["TrainingStage", "GraceConfig"], Iterator[str]]

_RULES: tuple[Rule, ...] = (
    _pixels_in_order,
    _pixels_of_vllm,
    _annotations_once,
    _variants_once,
    _one_width_to_go_on_with,
    _benchmarks_once,
    _benchmarks_from_one_place,
    _gate_asks_for_what_is_measured,
    _group_size_divides_widths,
    _teacher_has_no_teacher,
    _one_temperature_of_recorded_outputs,
    _one_machine_without_a_scheduler,
    _time_to_be_warned,
    _options_of_the_launcher,
)
_STAGE_RULES: tuple[StageRule, ...] = (
    _one_length,
    _rows_for_every_process,
    _samples_fit_their_row,
    _something_to_minimise,
    _beta_within_bounds,
    _distillation_weighs_something,
    _fixed_beta_weighs_something,
    _omega_weighs_something,
)
