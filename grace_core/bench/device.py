"""Which device a process of the bench computes on."""

from __future__ import annotations

import os
from typing import Literal

import torch

from grace_core.errors import GraceError


def bench_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The CPU, or the GPU that torchrun means this process to have.

    Raises:
        GraceError: `cuda` is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise GraceError(
            "torch sees no GPU here; take --device cpu (a bench then wants --shapes toy)"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
