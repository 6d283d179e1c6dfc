"""GPUs as NVIDIA's own tool reports them; torch would take memory on them to tell."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grace_core.hardware import NotReported, nvidia_smi

DRIVER = Path("/proc/driver/nvidia/gpus")
"""One folder a GPU, where NVIDIA's driver is loaded."""

_FIELDS = "index,uuid,name,memory.total,memory.free,compute_cap"
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


def driver_gpus(folder: Path = DRIVER) -> int:
    """How many GPUs the loaded driver knows."""
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves; empty where there is no driver.

    Raises NotReported where there is a driver, but its tool does not answer.
    """
    if shutil.which("nvidia-smi") is None and not driver_gpus():
        return []
    lines = nvidia_smi(f"--query-gpu={_FIELDS}")
    programs = nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [cells for cells in lines if chosen is None or _is_visible(cells, chosen)]
    try:
        return [_gpu(cells, programs) for cells in visible]
    except (ValueError, IndexError) as error:  # "[N/A]" where a GPU tells no memory of its own
        said = "; ".join(", ".join(cells) for cells in visible)
        raise NotReported(f"nvidia-smi tells no numbers: {said}") from error


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
