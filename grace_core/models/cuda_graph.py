"""Kernels recorded once as a CUDA graph and started by one call from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UPS = 2
"""Runs before the one that is recorded: kernels are compiled, libraries choose theirs and take
their workspaces."""


def record(
    run: Callable[[], object],
    *,
    device: torch.device,
    restore: Callable[[], object] | None = None,
    pool: Any = None,
) -> torch.cuda.CUDAGraph:
    """Record what `run` launches.

    Args:
        run: reads and writes tensors that stay where they are, and never waits for the GPU.
        device: a GPU; the current one.
        restore: undoes what a run changes. Called after each warm-up; recording itself changes
            nothing.
        pool: of memory, shared among graphs that never run at the same time.

    Raises:
        RuntimeError: something in `run` cannot be recorded.
    """
    # Not on the stream that everything else runs on: libraries keep workspaces for each stream.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
            if restore is not None:
                restore()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph
