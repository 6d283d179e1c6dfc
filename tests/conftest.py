"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Tests never reach out: hub clients answer from the cache or fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# The models are tiny: threads that wait for one another cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads this where kernels are defined: without a GPU they are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real pictures and recorded answers, kept beside the checkout."""
    folder = Path(os.environ.get("GRACE_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data not found at {folder} (set GRACE_SHARED_DATA)")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that take minutes are run when they are asked for: `make slurm-test`, `-m chaos`."""
    left_out = [
        item
        for item in items
        for marker in ("slurm", "chaos")
        if item.get_closest_marker(marker) and marker not in config.option.markexpr
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
