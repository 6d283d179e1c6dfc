"""Kernels that start while the one before them ends.

A step of decoding is some hundred short kernels, one after the other, and between two of them a GPU
idles for about as long as a short one runs. From Hopper on, a kernel may be launched before the
one before it is done ("programmatic dependent launch", CUDA programming guide): it reads what no
kernel writes, such as weights, and then waits until everything before it is written.

A kernel launched so has the argument `DEPENDENT`, and every program of it calls
:func:`wait_for_earlier` before it reads or writes what other kernels touch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from triton import language as tl


@triton.jit
def wait_for_earlier(DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait, then let the next kernel be launched: so only one waits at a time."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
