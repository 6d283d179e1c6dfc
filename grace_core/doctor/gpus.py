"""GPUs as NVIDIA's own tool reports them; torch would take memory on them to tell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/gpus")
"""One folder a GPU, where NVIDIA's driver is loaded."""

_FIELDS = "index,uuid,name,memory.total,memory.free,compute_cap"
_SECONDS = 20.0
_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU that a run may use."""

    index: int
    name: str
    total: int
    """Bytes."""
    free: int
    """Bytes."""
    compute_capability: tuple[int, int]
    processes: Mapping[int, str] = field(default_factory=dict)
    """Programs that compute on it, by process id."""


class NotReported(Exception):
    """The tool is absent or failed; says which."""


def driver_gpus(folder: Path = DRIVER) -> int:
    """How many GPUs the loaded driver knows."""
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves; empty where there is no driver.

    Raises NotReported where there is a driver, but its tool does not answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        if driver_gpus():
            raise NotReported("nvidia-smi is not on the PATH")
        return []
    lines = _ask(tool, f"--query-gpu={_FIELDS}")
    programs = _ask(tool, "--query-compute-apps=gpu_uuid,pid,process_name")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [cells for cells in lines if chosen is None or _is_visible(cells, chosen)]
    try:
        return [_gpu(cells, programs) for cells in visible]
    except (ValueError, IndexError) as error:  # "[N/A]" where a GPU tells no memory of its own
        said = "; ".join(", ".join(cells) for cells in visible)
        raise NotReported(f"nvidia-smi tells no numbers: {said}") from error


def _ask(tool: str, question: str) -> list[list[str]]:
    """Rows of cells."""
    try:
        done = subprocess.run(
            [tool, question, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotReported(f"nvidia-smi did not answer ({type(error).__name__})") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise NotReported(f"nvidia-smi failed: {said[0] if said else f'exit {done.returncode}'}")
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line]


def _gpu(cells: Sequence[str], programs: Sequence[Sequence[str]]) -> Gpu:
    index, uuid, name, total, free, capability = cells
    major, _, minor = capability.partition(".")
    return Gpu(
        int(index),
        name,
        int(total) * _MIB,
        int(free) * _MIB,
        (int(major), int(minor)),
        {int(row[1]): row[2] for row in programs if row[0] == uuid},
    )


def _is_visible(cells: Sequence[str], chosen: str) -> bool:
    """As CUDA reads the variable: numbers or the beginnings of identifiers."""
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return any(
        name == cells[0] or (not name.isdigit() and cells[1].startswith(name)) for name in names
    )
