"""Who may import whom, held by tests so that it stays true."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "grace_core"
HEAVY = {"torch", "transformers", "deepspeed", "datasets"}
# Packages that meet through artifacts on disk only.
APART = ("training", "evaluation", "export")
ORDER = (
    *(
        "errors",
        "hardware",
        "secrets",
        "whole_files",
        "hub_transport",
        "orphans",
        "locks",
        "events",
    ),
    *("config", "data", "toy", "artifacts", "models", "quantization", "losses", "lineage"),
    *("training", "evaluation", "export", "importing", "inference", "publish"),
    *("plan", "progress", "launch", "failure", "doctor", "stages", "bench", "reproduction", "cli"),
)
"""Each may import those that come before it, never one that comes after."""

OWN = ("grace_core", "operations", "tasks", "flows", "demo")
MAY_IMPORT = {
    "operations": {"grace_core"},
    "tasks": {"operations", "grace_core"},
    "flows": {"tasks", "grace_core.config"},
    "demo": {"grace_core"},
}
"""The table of CONTRIBUTING.md."""


def imports(file: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(part: str) -> list[Path]:
    """Of a sub-package, or a module, of grace_core."""
    module = CORE / f"{part}.py"
    return [module] if module.is_file() else sorted((CORE / part).rglob("*.py"))


def packages_used(part: str) -> set[str]:
    """What else of grace_core a sub-package or module imports."""
    names = {name for file in files_of(part) for name in imports(file)}
    used = {name.split(".")[1] for name in names if name.startswith("grace_core.")}
    return used - {part, "__version__"}


def test_the_core_works_without_prefect_and_mlflow() -> None:
    program = """
import importlib, pkgutil, sys
sys.modules["prefect"] = sys.modules["mlflow"] = None
import grace_core
names = [m.name for m in pkgutil.walk_packages(grace_core.__path__, "grace_core.")]
for name in names:
    if not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            if error.name != "triton":  # PyTorch's CPU builds come without; only kernels need it
                raise
print(len(names))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 20


@pytest.mark.parametrize("package", APART)
def test_stages_meet_on_disk_only(package: str) -> None:
    assert not packages_used(package) & (set(APART) - {package})


@pytest.mark.parametrize("part", ORDER)
def test_imports_flow_one_way(part: str) -> None:
    assert packages_used(part) <= set(ORDER[: ORDER.index(part)])


def test_every_part_has_its_place() -> None:
    parts = {path.stem for path in CORE.iterdir() if path.suffix == ".py" or files_of(path.name)}
    assert parts - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_what_the_table_says(folder: str) -> None:
    names = {name for file in (ROOT / folder).rglob("*.py") for name in imports(file)}
    ours = {name for name in names if name.split(".")[0] in set(OWN) - {folder}}
    allowed = tuple(f"{name}." for name in MAY_IMPORT[folder])
    assert not {name for name in ours if not f"{name}.".startswith(allowed)}


def test_flows_only_wire() -> None:
    names = {name for file in (ROOT / "flows").rglob("*.py") for name in imports(file)}
    assert not {name for name in names if name.split(".")[0] in HEAVY | {"mlflow"}}


def test_tasks_leave_the_work_to_the_core() -> None:
    names = {name for file in (ROOT / "tasks").rglob("*.py") for name in imports(file)}
    assert not {name for name in names if name.split(".")[0] in HEAVY}


@pytest.mark.parametrize("folder", ["flows", "tasks"])
def test_module_names_hide_no_package(folder: str) -> None:
    """A flow given by its file's path puts the folder first on `sys.path`."""
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / folder]
    names = {file.stem for file in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert names
    hidden = {
        name
        for name in names
        if name in sys.stdlib_module_names
        or importlib.machinery.PathFinder.find_spec(name, elsewhere) is not None
    }
    assert not hidden


@pytest.mark.parametrize("name", ["flows", "tasks", "demo", "grace_core"])
def test_our_top_level_names_are_ours(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).parent == ROOT / name
