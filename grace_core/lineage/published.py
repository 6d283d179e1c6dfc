"""The lineage that goes out with a release: names, digests, counts and revisions, and no place.

Paths of the machine, and how the run was started and tracked there, stay behind. What has to be
known again for repeating the run becomes a variable, as in a configuration file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from grace_core.config.load import config_digest
from grace_core.lineage.graph import Lineage, Node

RELEASE_MANIFEST = "grace_manifest.json"
_SECTIONS = (
    "name",
    "seed",
    "models",
    "data",
    "teacher_fit",
    "teacher_outputs",
    "distill",
    "quantize",
    "evaluation",
)
_LAUNCH = ("processes", "threads_per_process", "device", "nodes")
"""What of the launch a result may depend on: how many ranks share the work, and on what."""
_PUBLISH = ("name", "licence", "base_model", "teacher_model", "dataset")


class PublishedManifest(BaseModel):
    """What is read back from `grace_manifest.json`; the rest of it is for people."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    repository: str
    lineage: Lineage


def published_form(lineage: Lineage, names: Mapping[str, str]) -> Lineage:
    """The lineage without anything of this machine.

    names: digest -> public name, for inputs from outside.
    """
    configs = {key: published_config(tree) for key, tree in lineage.configs.items()}
    keys = {key: config_digest(tree) for key, tree in configs.items()}
    nodes = [_node(node, names, keys) for node in lineage.nodes]
    return lineage.model_copy(
        update={
            "nodes": tuple(nodes),
            "configs": {keys[key]: tree for key, tree in configs.items()},
        }
    )


def published_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's configuration its result depends on, machine paths as variables."""
    kept = {name: tree[name] for name in _SECTIONS if tree.get(name) is not None}
    kept["launch"] = {name: v for name, v in tree["launch"].items() if name in _LAUNCH}
    kept["publish"] = {name: v for name, v in tree["publish"].items() if name in _PUBLISH}
    cleaned: dict[str, Any] = without_paths(kept)
    return cleaned


def without_paths(value: Any, key: tuple[str, ...] = ()) -> Any:
    """A configuration's value with every path of this machine replaced.

    The data root becomes `${GRACE_DATA_ROOT}`, annotation files lose their folder, any other
    absolute path becomes a variable named by its key: `${GRACE_MODELS_TEACHER_PATH}`.
    """
    if isinstance(value, dict):
        if value.get("kind") == "sharegpt4v":
            value = _data_source(value)
        return {name: without_paths(item, (*key, str(name))) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item, (*key, str(number))) for number, item in enumerate(value)]
    if isinstance(value, str) and _of_this_machine(value):
        return f"${{GRACE_{'_'.join(key).upper()}}}"
    return value


def _data_source(source: dict[str, Any]) -> dict[str, Any]:
    root = PurePosixPath(source["root"])
    files = []
    for file in map(PurePosixPath, source["annotations"]):
        below = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
        files.append(str(below if file.is_absolute() else file))
    return {**source, "root": "${GRACE_DATA_ROOT}", "annotations": files}


def _of_this_machine(text: str) -> bool:
    path = PurePosixPath(text)
    return path.is_absolute() or text.startswith("~") or ".." in path.parts


def _node(node: Node, names: Mapping[str, str], keys: Mapping[str, str]) -> Node:
    prefix = () if node.stage != "data" else ("data",)
    return node.model_copy(
        update={
            "name": names.get(node.digest, node.name) if node.from_outside else node.name,
            "path": None,
            "config": without_paths(node.config, prefix),
            "run_config": None if node.run_config is None else keys[node.run_config],
            "published": {},
        }
    )
