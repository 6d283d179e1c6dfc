"""The configuration: what users get wrong is found before any work, named, and all at once."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from grace_core.config import GraceConfig, load_config
from grace_core.config.load import config_digest, validate_config
from grace_core.config.tree import RULES_BROKEN
from grace_core.config.yaml_text import read_yaml
from grace_core.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
LETTERS = "abcdefghijklmnopqrstuvwxyz_"

TRAINING = {"steps": 10, "row_tokens": 512, "rows_per_step": 4}
FULL: dict[str, Any] = {
    "name": "full",
    "run_dir": "runs/full",
    "seed": 1,
    "models": {
        "teacher": {"path": "big", "revision": "a"},
        "student": {"path": "small", "revision": "b"},
    },
    "data": {
        "source": {"kind": "sharegpt4v", "root": "pictures", "annotations": ["one.json"]},
        "max_tokens": 512,
        "held_out_share": 0.1,
    },
    "teacher_fit": {"training": dict(TRAINING)},
    "teacher_outputs": {"top_k": 64},
    "distill": {
        "training": dict(TRAINING),
        "objective": {
            "distillation": {"kind": "plain"},
            "relational": {"omega": 1.0},
            "controller": {"kind": "fixed"},
        },
    },
    "quantize": {"variants": ["w4"], "training": dict(TRAINING)},
    "launch": {"processes": 2},
    "evaluation": {"items": 5},
    "publish": {
        "name": "Model",
        "base_model": "owner/small",
        "teacher_model": "owner/big",
        "dataset": "pictures",
        "destination": {"kind": "hub", "namespace": "owner"},
    },
    "tracking": {"experiment": "x"},
}
"""Names every section at least once; valid."""


def key_paths(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a tree of mappings."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield (*path, name)
            yield from key_paths(value, (*path, name))


def changed(path: tuple[str, ...] | str, value: Any) -> dict[str, Any]:
    """FULL with one value replaced, or added."""
    tree = copy.deepcopy(FULL)
    node = tree
    *parents, last = path.split(".") if isinstance(path, str) else path
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    return tree


def problems(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        validate_config(tree, "test")
    return raised.value.problems


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_example_names_every_section() -> None:
    config = validate_config(FULL, "test")
    assert {name for name in GraceConfig.model_fields if name not in FULL} == set()
    assert config.quantize.variants == ("w4",)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configurations_are_valid_anywhere(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GRACE_DATA_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    config = load_config(file)
    assert config.run_dir.parts[0] == "runs"
    again = GraceConfig.model_validate(config.model_dump(mode="json"))
    assert again == config
    assert config_digest(again) == config_digest(config)
    assert GraceConfig.model_validate_json(config.model_dump_json()) == config


def test_the_real_recipe_has_the_papers_hyperparameters() -> None:
    config = load_config(ROOT / "configs" / "qwen3vl-8b-to-2b.yaml")
    for stage in (config.distill, config.quantize):
        training, objective = stage.training, stage.objective
        assert (training.epochs, training.learning_rate) == (1, 1e-5)
        assert (training.scale_learning_rate, training.weight_decay) == (1e-4, 1e-3)
        assert (training.warmup_share, training.max_grad_norm) == (0.03, 1.0)
        assert (training.zero_stage, training.row_tokens) == (2, 8192)
        assert training.recompute == "auto"
        terms = objective.distillation
        assert (terms.temperature, terms.alpha, terms.beta_dkd) == (2, 1, 4)
        assert (objective.relational.omega, objective.relational.warmup_steps) == (3, 400)
        beta = objective.controller
        assert (beta.beta_init, beta.beta_min, beta.beta_max) == (0.5, 0.1, 1.0)
        assert (beta.tau, beta.eta, beta.ema_decay) == (3.0, 0.003, 0.99)
    assert (config.data.min_pixels, config.data.max_pixels) == (784, 200_704)
    assert (config.quantize.variants, config.quantize.group_size) == (("w8", "w4"), 128)


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from(sorted(key_paths(FULL))),
    position=st.integers(0, 20),
    letter=st.sampled_from(LETTERS),
)
def test_a_typing_error_in_any_key_is_reported_by_its_name(
    path: tuple[str, ...], position: int, letter: str
) -> None:
    *parents, name = path
    at = position % (len(name) + 1)
    typo = name[:at] + letter + name[at:]
    tree = copy.deepcopy(FULL)
    node = tree
    for parent in parents:
        node = node[parent]
    node[typo] = node.pop(name)
    key = ".".join((*parents, typo))
    found = problems(tree)
    if path in (("data", "source", "kind"), ("publish", "destination", "kind")):
        # Without it, nobody knows which keys the section has.
        assert any(p.startswith(f"{'.'.join(path)}: required, but missing") for p in found), found
        return
    assert any(p.startswith(f"{key}: unknown key") and repr(name) in p for p in found), found


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("name", "My Run", "lower-case"),
        ("run_dir", ".", "the working directory itself"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", True, "a number is meant"),
        ("models.teacher.path", "", "at least 1 character"),
        ("data.max_tokens", 0, "greater than 0"),
        ("data.held_out_share", 1, "less than 1"),
        ("data.held_out_share", 10, "0.1 is 10 %"),
        ("data.source.kind", "sharegpt", "did you mean 'sharegpt4v'?"),
        ("data.source.annotations", [], "at least 1 item"),
        ("data.source.recods", 3, "unknown key"),
        ("distill.training.learning_rate", 10, "less than or equal to 1"),
        ("distill.training.learning_rate", 0, "greater than 0"),
        ("distill.training.learning_rate", math.inf, "finite"),
        ("distill.training.warmup_share", 400, "0.03 is 3 %"),
        ("distill.training.steps", 1.5, "integer"),
        ("distill.training.zero_stage", 4, "use one of 0, 1, 2, 3"),
        ("distill.training.betas", [0.9], "betas"),
        ("distill.learning_rate", 1e-5, "it belongs to distill.training.learning_rate"),
        ("distill.objective.distillation.kind", "kl", "gated-decoupled, decoupled, plain, none"),
        ("distill.objective.controller.tau", 0, "greater than 0"),
        ("quantize.variants", [], "at least 1 item"),
        ("quantize.variants.", 1, "variants"),
        ("launch.timeout_hours", 7200, "not seconds"),
        ("launch.grace_seconds", 60, "less than 30"),
        ("launch.device", "gpu", "use one of auto, cpu, cuda"),
        ("evaluation.benchmarks", ["toy-choise"], "did you mean 'toy-choice'?"),
        ("evaluation.items", 0, "greater than 0"),
        ("publish.name", "owner/Model", "without their owner"),
        ("publish.destination.endpoint", "huggingface.co", "endpoint"),
        ("publish.destination", {"path": "x"}, "missing; add kind: directory or hub"),
        ("tracking", 3, "expected keys below it: experiment"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(path: str, value: Any, said: str) -> None:
    if path.endswith("."):  # a mapping where a list is meant
        path, value = path[:-1], {"w4": value}
    (found,) = problems(changed(path, value))
    assert found.startswith(path), found
    assert said in found, found


COMBINATIONS = [
    ("data.min_pixels", {"data.min_pixels": 900, "data.max_pixels": 800}),
    (
        "evaluation.min_pixels (900) is above",
        {"evaluation.min_pixels": 900, "evaluation.max_pixels": 800},
    ),
    (
        "evaluation.max_pixels: vLLM",
        {"evaluation.engine": "vllm", "evaluation.max_pixels": 800},
    ),
    ("data.source.annotations", {"data.source.annotations": ["a.json", "a.json"]}),
    ("quantize.variants", {"quantize.variants": ["w4", "w8", "w4"]}),
    ("evaluation.benchmarks", {"evaluation.benchmarks": ["toy-yesno"] * 2}),
    ("quantize.group_size", {"quantize.group_size": 100}),
    (
        "teacher_outputs: outputs are recorded for one temperature",
        {"teacher_outputs": {}, "quantize.objective": {"distillation": {"temperature": 3}}},
    ),
    ("teacher_fit.objective", {"teacher_fit.objective": {}}),
    ("distill.training: its length is given twice", {"distill.training.epochs": 1}),
    ("quantize.training: its length is missing", {"quantize.training.steps": None}),
    ("distill.training.rows_per_step", {"distill.training.rows_per_step": 5}),
    ("teacher_fit.training.row_tokens", {"teacher_fit.training.row_tokens": 511}),
    (
        "distill.objective: every term",
        {
            "distill.objective.cross_entropy": False,
            "distill.objective.distillation.kind": "none",
            "distill.objective.relational": {"enabled": False},
        },
    ),
    (
        "quantize.objective.controller.beta_init",
        {"quantize.objective": {"controller": {"beta_min": 0.6}}},
    ),
    (
        "quantize.objective.distillation",
        {"quantize.objective": {"distillation": {"alpha": 0, "beta_dkd": 0, "kind": "decoupled"}}},
    ),
    ("distill.objective.controller.beta_init", {"distill.objective.controller.beta_init": 0}),
    ("distill.objective.relational.omega", {"distill.objective.relational.omega": 0}),
]


def combined(changes: dict[str, Any], tree: dict[str, Any] = FULL) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    for path, value in changes.items():
        node = tree
        *parents, last = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


@pytest.mark.parametrize(("start", "changes"), COMBINATIONS, ids=[s for s, _ in COMBINATIONS])
def test_an_impossible_combination_is_named(start: str, changes: dict[str, Any]) -> None:
    (found,) = problems(combined(changes))
    assert found.startswith(start), found


@pytest.mark.parametrize(("start", "changes"), COMBINATIONS, ids=[s for s, _ in COMBINATIONS])
def test_a_wrong_value_hides_no_combination(start: str, changes: dict[str, Any]) -> None:
    """One mistake beside it in the same sections, one in the root."""
    elsewhere = {
        "sead": 3,
        "launch.divice": "cpu",
        "data.max_decoded_pixels": -1,
        "distill.training.warmup_share": 3,
        "quantize.training.warmup_share": 3,
        "teacher_fit.training.warmup_share": 3,
        "evaluation.items": 0,
    }
    found = problems(combined(changes | elsewhere))
    assert len(found) == len(elsewhere) + 1
    assert sum(problem.startswith(start) for problem in found) == 1, found


def test_rules_about_a_wrong_value_wait_until_it_is_mended() -> None:
    (found,) = problems(combined({"launch.processes": 0, "distill.training.rows_per_step": 5}))
    assert found.startswith("launch.processes")


def test_rules_hold_for_a_configuration_from_anywhere() -> None:
    with pytest.raises(ValidationError) as raised:
        GraceConfig.model_validate(combined({"quantize.group_size": 100}))
    assert raised.value.errors()[0]["type"] == RULES_BROKEN


def test_bounds_do_not_bind_a_fixed_beta() -> None:
    tree = combined({"distill.objective.controller": {"kind": "fixed", "beta_init": 2.0}})
    assert validate_config(tree, "test").distill.objective.controller.beta_init == 2.0


def test_the_tree_is_frozen() -> None:
    config = validate_config(FULL, "test")
    with pytest.raises(ValidationError, match="frozen"):
        config.distill.training.steps = 3  # type: ignore[misc]


def shuffled(tree: Any, order: list[int]) -> Any:
    if not isinstance(tree, dict):
        return tree
    names = sorted(tree, key=lambda name: order[sum(map(ord, name)) % len(order)])
    return {name: shuffled(tree[name], order) for name in names}


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(17)))
def test_the_digest_does_not_depend_on_the_order_of_keys(order: list[int]) -> None:
    plain = validate_config(FULL, "test")
    assert config_digest(validate_config(shuffled(FULL, order), "test")) == config_digest(plain)
    assert config_digest(shuffled(FULL, order)) == config_digest(FULL)


def test_the_digest_is_sha256_of_canonical_json() -> None:
    # printf '{"a":[1,2],"b":"é"}' | sha256sum
    expected = "d902c5ef87c42c33059e8d7b7aa30485809a5c0ff84b8d0d285616d5b03f23ea"
    assert config_digest({"b": "é", "a": [1, 2]}) == expected


@pytest.mark.parametrize(
    "path", [p for p in key_paths(FULL) if p[-1] in ("seed", "steps", "items")]
)
def test_every_value_counts_in_the_digest(path: tuple[str, ...]) -> None:
    assert config_digest(validate_config(changed(path, 8), "test")) != config_digest(
        validate_config(FULL, "test")
    )


def test_a_default_and_the_same_value_given_are_one_configuration() -> None:
    given = validate_config(changed("quantize.group_size", 128), "test")
    assert given == validate_config(FULL, "test")
    assert config_digest(given) == config_digest(validate_config(FULL, "test"))


def test_overrides_replace_add_and_remove(tmp_path: Path) -> None:
    file = write(tmp_path, yaml.safe_dump(FULL))
    config = load_config(
        file,
        [
            "seed=3",
            "quantize.variants=[w8, w4]",
            "evaluation.items=null",
            "distill.training.learning_rate=2e-5",
            "publish.destination={kind: directory}",
            "teacher_fit=null",
        ],
    )
    assert (config.seed, config.quantize.variants) == (3, ("w8", "w4"))
    assert (config.evaluation.items, config.teacher_fit) == (None, None)
    assert config.distill.training.learning_rate == 2e-5
    assert config.publish.destination.kind == "directory"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "write it as dotted.key=value"),
        ("=3", "write it as dotted.key=value"),
        ("distill..steps=3", "write it as dotted.key=value"),
        ("seed.x=3", "seed is no section"),
        ("seed=[1", "not readable as YAML"),
        ("distil.training.steps=3", "did you mean 'distill'?"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    file = write(tmp_path, yaml.safe_dump(FULL))
    with pytest.raises(ConfigError) as raised:
        load_config(file, [override, "evaluation.items=0"])
    assert any(said in problem for problem in raised.value.problems)
    assert any(problem.startswith("evaluation.items") for problem in raised.value.problems)


def test_the_environment_fills_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = combined({"data.source.root": "${GRACE_A:-here}/x", "data.source.limit": "${GRACE_B}"})
    file = write(tmp_path, yaml.safe_dump(tree))
    monkeypatch.delenv("GRACE_A", raising=False)
    monkeypatch.delenv("GRACE_B", raising=False)
    with pytest.raises(ConfigError, match=r"data\.source\.limit: environment variable GRACE_B"):
        load_config(file)
    monkeypatch.setenv("GRACE_B", "7")
    source = load_config(file).data.source
    assert source.kind == "sharegpt4v"
    assert (source.root, source.limit) == ("here/x", 7)
    monkeypatch.setenv("GRACE_A", "/there")
    assert "/there/x" in load_config(file).model_dump_json()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not readable as YAML"),
        ("- a", "expected a mapping of sections"),
        ("", "expected a mapping of sections"),
        ("seed: 1\nname: x\nseed: 2\n", "'seed' stands here twice"),
        ("models:\n  teacher: {path: a, path: b}\n", "'path' stands here twice"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path, text))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-300, 300))
def test_numbers_with_exponents_are_numbers(value: float, exponent: int) -> None:
    assert read_yaml(repr(value)) == value
    found = read_yaml(f"3e{exponent}")
    assert isinstance(found, float)
    assert found == float(f"3e{exponent}")


def test_yaml_aliases_and_merges_work() -> None:
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n"
    assert read_yaml(text)["c"] == {"x": 1, "y": 3}


def test_all_problems_are_in_the_message() -> None:
    tree = combined({"seed": -1, "evaluation.items": 0})
    with pytest.raises(ConfigError) as raised:
        validate_config(tree, "some.yaml")
    text = str(raised.value)
    assert text.startswith("some.yaml: 2 problems")
    assert json.dumps(raised.value.problems[0])[1:20] in text
    assert all(problem in text for problem in raised.value.problems)
