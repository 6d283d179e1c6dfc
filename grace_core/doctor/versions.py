"""Installed packages: within the declared ranges, as locked, and fitting one another.

Reads the metadata of what is installed and imports none of it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from grace_core.doctor.findings import Finding, ok, problem, unchecked, warning

AREA = "environment"
DISTRIBUTION = "grace-pipeline"

_CHECKOUT = Path(__file__).resolve().parents[2]
_LOCKED = re.compile(r"([A-Za-z0-9._-]+)==(\S+)")
_SHOWN = 6
# What a version outside of its range is known to do.
_KNOWN = {"fastapi": "the Prefect server does not start with it, or refuses deployments"}


def check_versions(*locks: Path) -> Iterator[Finding]:
    """Everything about this Python and its packages.

    locks: files of locked versions, of which the one that fits best counts; without any, those of
    this checkout.
    """
    yield from _python()
    yield from _declared_ranges()
    files = locks or (_CHECKOUT / "requirements.lock", _CHECKOUT / "requirements-gpu.lock")
    compared = [_differences(lock) for lock in files if lock.is_file()]
    if compared:
        yield _locked(min(compared, key=lambda each: len(each.differing)))
    yield from _torch_and_torchvision()
    yield from _deepspeed()


def installed(name: str) -> Version | None:
    """The installed version of a distribution, or None."""
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    try:
        wanted = metadata.metadata(DISTRIBUTION).json.get("requires_python")
    except metadata.PackageNotFoundError:
        yield unchecked(
            AREA,
            f"Python {version}; {DISTRIBUTION} is not installed, so its ranges are not known",
            "run `make setup`",
        )
        return
    if wanted and not Requirement(f"python{wanted}").specifier.contains(version, prereleases=True):
        yield problem(AREA, f"Python {version} is outside {wanted}", "install a newer Python")
    else:
        yield ok(AREA, f"Python {version}")


def _declared_ranges() -> Iterator[Finding]:
    """The ranges of pyproject.toml, as the installed distribution repeats them.

    Packages of the extras `orchestrate` and `gpu` count where they are installed.
    """
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return
    checked, wrong = 0, 0
    for line in lines:
        wanted = Requirement(line)
        optional = not _applies(wanted, extra="")
        if optional and not any(_applies(wanted, extra) for extra in ("orchestrate", "gpu")):
            continue
        version = installed(wanted.name)
        if version is None and optional:
            continue
        checked += 1
        if version is None:
            wrong += 1
            yield problem(AREA, f"{wanted.name} is not installed", _install(wanted))
        elif not wanted.specifier.contains(version, prereleases=True):
            wrong += 1
            known = _KNOWN.get(canonicalize_name(wanted.name))
            text = f"{wanted.name} {version} is outside {wanted.specifier}"
            yield problem(AREA, f"{text}: {known}" if known else text, _install(wanted))
    if not wrong:
        yield ok(AREA, f"{checked} packages within the ranges of pyproject.toml")


def _applies(wanted: Requirement, extra: str) -> bool:
    if wanted.marker is None:
        return True
    environment: dict[str, Any] = {**default_environment(), "extra": extra}
    return wanted.marker.evaluate(environment)


def _install(wanted: Requirement) -> str:
    return f"run `make setup`, or pip install '{wanted.name}{wanted.specifier}'"


@dataclass(frozen=True)
class _Compared:
    lock: Path
    pinned: int
    differing: list[str]


def _differences(lock: Path) -> _Compared:
    """Other versions than the tested ones; a local version such as +cpu does not count."""
    pinned = _LOCKED.findall(lock.read_text(encoding="utf-8"))
    differing = []
    for name, version in pinned:
        found = installed(name)
        if found is not None and found.public != Version(version).public:
            differing.append(f"{name} {found} (locked {version})")
        elif found is None:
            differing.append(f"{name} absent (locked {version})")
    return _Compared(lock, len(pinned), differing)


def _locked(compared: _Compared) -> Finding:
    lock, pinned, differing = compared.lock, compared.pinned, compared.differing
    if not differing:
        return ok(AREA, f"{pinned} packages as in {lock.name}")
    shown = ", ".join(differing[:_SHOWN])
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return warning(
        AREA,
        f"{len(differing)} of {pinned} packages differ from {lock.name}: {shown}{more}",
        f"run `make setup LOCK={lock.name}` for the versions that the tests ran with",
    )


def _torch_and_torchvision() -> Iterator[Finding]:
    """torchvision is optional; one that was built for another torch breaks transformers' import."""
    torch, vision = installed("torch"), installed("torchvision")
    if torch is None or vision is None:
        return
    for line in metadata.requires("torchvision") or []:
        wanted = Requirement(line)
        if canonicalize_name(wanted.name) == "torch" and not wanted.specifier.contains(
            torch, prereleases=True
        ):
            yield problem(
                AREA,
                f"torchvision {vision} was built for torch{wanted.specifier}, installed is {torch}",
                "install the torchvision of this torch, or uninstall torchvision",
            )
            return
    if torch.local != vision.local:
        yield problem(
            AREA,
            f"torch {torch} and torchvision {vision} come from different builds "
            f"({torch.local or 'CUDA of PyPI'}, {vision.local or 'CUDA of PyPI'})",
            "install both from one index, or uninstall torchvision",
        )
        return
    yield ok(AREA, f"torch {torch} and torchvision {vision} of one build")


def _deepspeed() -> Iterator[Finding]:
    """DeepSpeed is loaded without compiling anything: no stage uses an operator of its own.

    Operators that were built at its installation are loaded, and then have to fit torch.
    """
    version = installed("deepspeed")
    spec = importlib.util.find_spec("deepspeed")
    if version is None or spec is None or not spec.submodule_search_locations:
        return  # told by the ranges
    facts = _assignments(Path(spec.submodule_search_locations[0]) / "git_version_info_installed.py")
    built = sorted(name for name, there in facts.get("installed_ops", {}).items() if there)
    made_for = facts.get("torch_info", {}).get("version", "0.0")
    torch = installed("torch")
    if built and torch and made_for != f"{torch.major}.{torch.minor}":
        yield problem(
            AREA,
            f"deepspeed {version} holds operators built for torch {made_for} "
            f"({', '.join(built)}), installed is {torch}",
            "install deepspeed again, without DS_BUILD_OPS",
        )
        return
    yield ok(AREA, f"deepspeed {version} loads without compiling")


def _assignments(file: Path) -> dict[str, Any]:
    """The literals that a Python file assigns, without running it; none where there is no file."""
    if not file.is_file():
        return {}
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
