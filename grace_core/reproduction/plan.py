"""What has to run to make a recorded model again, and with which configuration each stage.

Every stage runs from the configuration that was recorded when it was made: of a model whose data
were prepared in an earlier run, the two may differ in what no fingerprint sees, such as the number
of processes. The new run directory takes nothing from the old one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_core.artifacts import QUANTIZED_START
from grace_core.config.load import resolve_config
from grace_core.config.training import BITS
from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.lineage.find import Found
from grace_core.lineage.graph import Edge, Lineage, Node
from grace_core.whole_files import write_whole

MARKER = "reproduction.json"
"""In the run directory: whose reproduction it holds and, at the end, the verdict."""
_STAGES = ("world", "data", "teacher", "teacher-outputs", "bf16", "w8", "w4")
_SHORT = 8


@dataclass(frozen=True)
class Plan:
    """A model to be made again."""

    lineage: Lineage
    target: Node
    stages: Sequence[Node]
    """What was recorded of each stage to run, in the order in which they run."""

    configs: Mapping[str, GraceConfig]
    """By stage."""

    run_dir: Path

    @property
    def config(self) -> GraceConfig:
        """The configuration of the model itself."""
        return self.configs[self.target.stage]


def plan_reproduction(found: Found, run_dir: Path | None, overrides: Sequence[str] = ()) -> Plan:
    """The plan for a model.

    run_dir: where to; by default `runs/reproduced-<name>-<digest>`. overrides: settings that
    replace recorded ones in all stages, each as dotted.key=value.

    Raises GraceError for what is no model, or was recorded without its whole configuration, and
    ConfigError where a recorded path has to be given anew.
    """
    lineage = _with_quantized_starts(found.lineage)
    target = lineage.node(found.model)
    if not _is_remade(target.stage):
        raise GraceError(
            f"{target.stage} {target.short} is no model and no data; name a release, such as the "
            f"one it is about: `grace lineage {target.digest[:_SHORT]}` shows it"
        )
    if target.run_config is None:
        raise GraceError(
            f"{target.stage} {target.short} was made before whole configurations were recorded; "
            "run `grace run CONFIG --set run_dir=...` with the configuration file it was made from"
        )
    where = run_dir or Path("runs") / f"reproduced-{target.name}-{target.digest[:_SHORT]}"
    ancestors = lineage.ancestors(target.id)
    stages = [node for node in lineage.nodes if node.id in ancestors and _is_remade(node.stage)]
    stages.append(target)
    configs = {node.stage: _config(lineage, node, target, where, overrides) for node in stages}
    return Plan(lineage, target, stages, configs, where)


def claim_run_dir(plan: Plan) -> None:
    """Make the run directory this reproduction's own; again, it continues.

    Raises GraceError when it holds another run: the artifacts of that would be taken for new ones.
    """
    marker = plan.run_dir / MARKER
    if marker.is_file():
        held = json.loads(marker.read_text(encoding="utf-8"))["digest"]
        if held != plan.target.digest:
            raise GraceError(
                f"{plan.run_dir} holds the reproduction of another model ({held[:_SHORT]}); choose "
                "another folder with --run-dir"
            )
        return
    if (plan.run_dir / "artifacts").exists():
        raise GraceError(
            f"{plan.run_dir} holds a run that is no reproduction; what is done there would not be "
            "made again. Choose a new folder with --run-dir"
        )
    write_marker(plan, None)


def write_marker(plan: Plan, verdict: Mapping[str, Any] | None) -> None:
    """Record whose reproduction the run directory holds, and the verdict once there is one."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "format": 1,
        "name": plan.target.name,
        "stage": plan.target.stage,
        "digest": plan.target.digest,
        "verdict": verdict,
    }
    write_whole(plan.run_dir / MARKER, json.dumps(content, indent=1) + "\n")


def _is_remade(stage: str) -> bool:
    return stage in _STAGES or stage.startswith("release-")


def _config(
    lineage: Lineage, node: Node, target: Node, run_dir: Path, overrides: Sequence[str]
) -> GraceConfig:
    # Of an ancestor whose folder is gone, only its child's recorded configuration is left.
    key = node.run_config or target.run_config
    assert key is not None
    tree = copy.deepcopy(lineage.configs[key])
    tree["run_dir"] = str(run_dir)
    tree["publish"] = tree["publish"] | {"enabled": False}
    models, start = tree["models"], tree["quantize"].get("start")
    for role, source in (
        ("teacher", models["teacher"]),
        ("start", models["teacher"]),
        ("student", models["student"]),
        (QUANTIZED_START, start),
    ):
        revision = _revision(lineage, role)
        if revision is not None and source is not None:
            source["revision"] = revision  # the commit that was used, where none was named
    return resolve_config(tree, f"recorded configuration {key[:12]}", overrides)


def _with_quantized_starts(lineage: Lineage) -> Lineage:
    """Manifests once called the checkpoint of `quantize.start` the student of W8 and W4."""

    def renamed(edge: Edge) -> Edge:
        child, parent = lineage.node(edge.child), lineage.node(edge.parent)
        once = child.stage in BITS and edge.role == "student" and parent.stage == "checkpoint"
        return edge.model_copy(update={"role": QUANTIZED_START}) if once else edge

    return lineage.model_copy(update={"edges": tuple(map(renamed, lineage.edges))})


def _revision(lineage: Lineage, role: str) -> str | None:
    """Hub commit of the checkpoint that had this role in the lineage."""
    for edge in lineage.edges:
        parent = lineage.node(edge.parent)
        if edge.role == role and parent.stage == "checkpoint" and parent.revision:
            return parent.revision
    return None
