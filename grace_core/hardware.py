"""What this machine computes with: recorded beside every result, because numbers depend on it."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
from collections import Counter
from pathlib import Path


@functools.cache
def hardware() -> dict[str, str]:
    """CPU and, where the NVIDIA driver answers, GPUs ("8 x NVIDIA H100 80GB HBM3") and driver.

    Read without torch, which would take seconds and memory on the GPU. The machine's name is left
    out: what is published quotes this.
    """
    found = {"cpu": _cpu()}
    gpus = _query("name")
    if gpus:
        counted = Counter(gpus)
        found["gpu"] = ", ".join(f"{count} x {name}" for name, count in counted.items())
        found["driver"] = _query("driver_version")[0]
    return found


def _cpu() -> str:
    """The processor's name as Linux tells it; elsewhere the architecture."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _query(field: str) -> list[str]:
    """One line a GPU; none where there is no driver, or none that answers."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [line.strip() for line in lines if line.strip()]
