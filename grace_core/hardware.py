"""What this machine computes with: recorded beside every result, because numbers depend on it."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
from collections import Counter
from pathlib import Path

_SECONDS = 20.0


class NotReported(Exception):
    """NVIDIA's tool is absent or failed; says which."""


@functools.cache
def hardware() -> dict[str, str]:
    """CPU and, where the NVIDIA driver answers, GPUs ("8 x NVIDIA H100 80GB HBM3") and driver.

    Read without torch, which would take seconds and memory on the GPU. The machine's name is left
    out: what is published quotes this.
    """
    found = {"cpu": _cpu()}
    try:
        gpus = nvidia_smi("--query-gpu=name,driver_version")
    except NotReported:  # no driver here, or one that `grace doctor` tells of
        gpus = []
    if gpus:
        counted = Counter(name for name, _ in gpus)
        found["gpu"] = ", ".join(f"{count} x {name}" for name, count in counted.items())
        found["driver"] = gpus[0][1]
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


def nvidia_smi(question: str) -> list[list[str]]:
    """Rows of cells that NVIDIA's tool answers, such as to `--query-gpu=name,driver_version`.

    Raises NotReported where the tool is absent, fails, or does not answer within 20 s.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise NotReported("nvidia-smi is not on the PATH")
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
