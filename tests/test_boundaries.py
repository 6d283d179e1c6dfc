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
# Each package may import those that come before it, never one that comes after.
ORDER = ("config", "data", "models", "quantization", "losses", "training")


def imports(file: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_used(package: str) -> set[str]:
    """Sub-packages of grace_core that a sub-package imports."""
    names = {name for file in (CORE / package).rglob("*.py") for name in imports(file)}
    return {name.split(".")[1] for name in names if name.startswith("grace_core.")} - {package}


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


@pytest.mark.parametrize("position", range(len(ORDER)))
def test_imports_flow_one_way(position: int) -> None:
    assert not packages_used(ORDER[position]) & set(ORDER[position + 1 :])


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
