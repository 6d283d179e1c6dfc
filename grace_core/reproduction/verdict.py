"""Whether a model was made again exactly, and if not, where and by how much it went another way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from grace_core.artifacts import Artifact, find_artifact
from grace_core.lineage.graph import Node
from grace_core.reproduction.plan import Plan


@dataclass(frozen=True)
class Divergence:
    """The first stage whose content is another."""

    stage: str
    recorded: str
    """Digest."""

    made: str
    changed_inputs: list[str]
    """Roles of inputs from outside, such as the teacher, that were others already."""

    files: list[str] | None
    """Files that differ, are missing or are new; None where the original's are not here."""

    weights: dict[str, float] | None
    """Largest absolute difference of any weight, and counts; None where none were compared."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a reproduction."""

    recorded: str
    """Digest of the model."""

    made: str
    divergence: Divergence | None

    @property
    def identical(self) -> bool:
        return self.divergence is None

    def to_dict(self) -> dict[str, Any]:
        return {
            "identical": self.identical,
            "recorded": self.recorded,
            "made": self.made,
            "divergence": None if self.divergence is None else vars(self.divergence),
        }


def judge(plan: Plan, made: Mapping[str, Artifact]) -> Verdict:
    """Compare what was made with what was recorded, stage after stage."""
    different = [node for node in plan.stages if made[node.stage].digest != node.digest]
    final = made[plan.target.stage].digest
    if final == plan.target.digest:
        # A stage before may differ in what the model does not see, such as a note in a file.
        return Verdict(plan.target.digest, final, None)
    return Verdict(plan.target.digest, final, _divergence(plan, different[0], made))


def _divergence(plan: Plan, node: Node, made: Mapping[str, Artifact]) -> Divergence:
    artifact = made[node.stage]
    original = _original(node)
    return Divergence(
        stage=node.stage,
        recorded=node.digest,
        made=artifact.digest,
        changed_inputs=_changed_inputs(plan, node, artifact),
        files=None if original is None else _different_files(original, artifact),
        weights=None if original is None else _weights(original.path, artifact.path),
    )


def _original(node: Node) -> Artifact | None:
    """The recorded artifact where its folder is here, unchanged; its digest is all else."""
    if node.path is None:
        return None
    found = find_artifact(Path(node.path))
    return found if found is not None and found.digest == node.digest else None


def _changed_inputs(plan: Plan, node: Node, artifact: Artifact) -> list[str]:
    recorded = {role: parent.digest for role, parent in plan.lineage.parents(node.id)}
    return [
        role
        for role, parent in artifact.manifest.parents.items()
        if recorded.get(role) != parent.digest
    ]


def _different_files(original: Artifact, artifact: Artifact) -> list[str]:
    one, other = original.manifest.files, artifact.manifest.files
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def _weights(original: Path, made: Path) -> dict[str, float] | None:
    """Largest difference over the tensors of the safetensors files that both folders have."""
    names = {file.relative_to(original) for file in original.rglob("*.safetensors")}
    common = sorted(name for name in names if (made / name).is_file())
    if not common:
        return None
    largest, changed, compared = 0.0, 0, 0
    for name in common:
        for one, other in _pairs(original / name, made / name):
            compared += 1
            difference = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
            changed += difference > 0
            largest = max(largest, difference)
    return {"max_abs": largest, "tensors": float(compared), "different": float(changed)}


def _pairs(one: Path, other: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tensors of equal name and shape; one pair in memory at a time."""
    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        shared = set(second.keys())
        for name in sorted(first.keys()):
            if name in shared:
                pair = first.get_tensor(name), second.get_tensor(name)
                if pair[0].shape == pair[1].shape:
                    yield pair
