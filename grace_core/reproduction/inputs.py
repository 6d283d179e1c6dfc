"""What is here beside what was used: code, environment, checkpoints and data.

A difference is told and the reproduction goes on, because it may not matter; an input that is not
there is an error, and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator

from grace_core.artifacts import QUANTIZED_START, code_version, environment
from grace_core.config.data import ShareGPT4VData
from grace_core.lineage.graph import Node
from grace_core.models.loading import check_pair, locate_checkpoint
from grace_core.reproduction.plan import Plan
from grace_core.stages.once import checkpoint_parent
from grace_core.stages.sources import annotations_parent, sharegpt4v_files

_OF_A_TRAINING = ("world_size", "zero_stage")
"""Recorded by the ranks, and set by the configuration; not of this process."""


def differences(plan: Plan) -> list[str]:
    """What differs between the recorded run and this one, a sentence each.

    Raises GraceError when a checkpoint or the data are not to be found.
    """
    found = [*_code(plan), *_environment(plan), *_checkpoints(plan), *_annotations(plan)]
    return list(dict.fromkeys(found))


def _code(plan: Plan) -> Iterator[str]:
    here = code_version()
    for node in plan.stages:
        for name in sorted(node.code.keys() | here.keys()) if node.code else ():
            if node.code.get(name) != here.get(name):
                yield _sentence(f"code {name}", node.code.get(name), here.get(name))
    if any(node.code.get("commit", "").endswith("-dirty") for node in plan.stages):
        yield "the recorded code had uncommitted changes, which nothing here can bring back"


def _environment(plan: Plan) -> Iterator[str]:
    here = environment()
    for node in plan.stages:
        for name in sorted(node.environment.keys() - set(_OF_A_TRAINING)):
            if node.environment[name] != here.get(name):
                yield _sentence(name, node.environment[name], here.get(name))


def _checkpoints(plan: Plan) -> Iterator[str]:
    """Teacher, student and quantized start; reading them raises what is wrong with them."""
    config = plan.config
    teacher, student = (
        locate_checkpoint(source) for source in (config.models.teacher, config.models.student)
    )
    check_pair(teacher, student)
    used = [(("teacher", "start"), teacher), (("student",), student)]
    if config.quantize.start is not None and _recorded(plan, (QUANTIZED_START,), "checkpoint"):
        used.append(((QUANTIZED_START,), locate_checkpoint(config.quantize.start)))
    for roles, folder in used:
        recorded = _recorded(plan, roles, "checkpoint")
        digest = checkpoint_parent(folder).digest
        for node in recorded:
            if node.digest != digest:
                yield _sentence(f"{roles[0]} {folder.path}", node.short, digest[:12])


def _annotations(plan: Plan) -> Iterator[str]:
    source = plan.config.data.source
    if isinstance(source, ShareGPT4VData):
        _, files = sharegpt4v_files(source)
        digest = annotations_parent(files).digest
        for node in _recorded(plan, ("annotations",), "annotations"):
            if node.digest != digest:
                yield _sentence("annotations", node.short, digest[:12])


def _recorded(plan: Plan, roles: tuple[str, ...], stage: str) -> list[Node]:
    nodes = {
        edge.parent: plan.lineage.node(edge.parent)
        for edge in plan.lineage.edges
        if edge.role in roles and edge.parent.startswith(f"{stage}:")
    }
    return list(nodes.values())


def _sentence(what: str, recorded: str | None, here: str | None) -> str:
    return f"{what}: recorded {recorded or 'nothing'}, here {here or 'nothing'}"
