"""Whether the Triton kernels of the losses serve, or their plain twins do."""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float32)


def kernels_for(*matrices: Tensor) -> ModuleType | None:
    """:mod:`grace_core.losses.kernels` where it takes such matrices, else None.

    On CPUs the plain functions are the norm. On a GPU they are a loss, and the log says why.

    Args:
        matrices: logits, or the weights that they are made with.
    """
    if any(not matrix.is_cuda for matrix in matrices):
        return None
    obstacle = _obstacle(matrices)
    if obstacle is not None:
        _warn(obstacle)
        return None
    from grace_core.losses import kernels

    return kernels


def _obstacle(matrices: tuple[Tensor, ...]) -> str | None:
    for matrix in matrices:
        if matrix.dtype not in _DTYPES:
            return f"they take bf16 and fp32, not {matrix.dtype}"
        if matrix.stride(-1) != 1:
            return "they take rows without gaps between neighbours"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it to have them (pip install triton)"
    return None


@functools.cache
def _warn(obstacle: str) -> None:
    """Once for each reason."""
    log.warning("losses are computed without their kernels, several times slower: %s", obstacle)
