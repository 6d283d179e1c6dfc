"""Reading a configuration file, overrides included, and listing every problem at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from grace_core.config.problems import problems_of
from grace_core.config.tree import GraceConfig
from grace_core.config.yaml_text import read_yaml
from grace_core.errors import ConfigError, GraceError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> GraceConfig:
    """Read `path` (YAML), apply `overrides` and return the validated tree.

    An override is `dotted.key=value`; the value is read as YAML, so `seed=3`,
    `quantize.variants=[w4]` and `data.source.limit=null` mean what they look like.
    `${NAME}` and `${NAME:-default}` in strings are taken from the environment.

    Raises ConfigError listing every problem with its key and its remedy.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(str(path), ["no such file; name a YAML file such as configs/toy.yaml"])
    try:
        tree = read_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"not readable as YAML: {error}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError(str(path), ["expected a mapping of sections at the top level"])
    return resolve_config(tree, str(path), overrides)


def resolve_config(tree: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> GraceConfig:
    """Apply `overrides` to a plain mapping (in place), expand variables and validate it.

    source: what the mapping was read from, for messages. Raises ConfigError as `load_config`.
    """
    problems: list[str] = []
    for override in overrides:
        problem = _apply_override(tree, override)
        if problem:
            problems.append(problem)
    tree = _expand(tree, (), problems)
    return validate_config(tree, source, problems)


def validate_config(
    tree: Mapping[str, Any], source: str, problems: Sequence[str] = ()
) -> GraceConfig:
    """Validate a plain mapping, adding what is wrong with it to `problems` found before."""
    found = list(problems)
    try:
        config = GraceConfig.model_validate(tree)
    except ValidationError as error:
        found += problems_of(tree, error)
        raise ConfigError(source, found) from None
    if found:
        raise ConfigError(source, found)
    return config


def config_digest(section: BaseModel | Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a section's canonical JSON: sorted keys, no white space."""
    value = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def require_environment(value: str, key: str) -> None:
    """Raise when a string still holds an unset `${NAME}`."""
    match = _VARIABLE.search(value)
    if match:
        raise GraceError(f"{key}: environment variable {match.group(1)} is not set; export it")


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        return f"override {override!r}: write it as dotted.key=value, for instance seed=3"
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        return f"override {override!r}: its value is not readable as YAML: {error}"
    node = tree
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            return f"override {override!r}: {part} is no section and has no keys below it"
        node = child
    node[parts[-1]] = value
    return None


def _expand(value: Any, path: tuple[str, ...], problems: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, (*path, str(key)), problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, (*path, str(i)), problems) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name, default)
        if found is None:
            problems.append(
                f"{'.'.join(path)}: environment variable {name} is not set; export it, or "
                f"override the key"
            )
            return match.group(0)
        return found

    return _VARIABLE.sub(replace, value)
