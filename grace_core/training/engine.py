"""Modules in DeepSpeed's hands, their fp32 buffers (rotary frequencies) kept in fp32.

DeepSpeed's bf16 mode has cast buffers as well as parameters; rotary frequencies rounded to bf16
would train a slightly different model from the one that is released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn

from grace_core.training.job import TrainingJob
from grace_core.training.optimizer import weight_optimizer
from grace_core.training.zero import deepspeed_settings


def deepspeed_engine(
    student: nn.Module, job: TrainingJob, processes: int, device: torch.device
) -> Any:
    """Hand the student to DeepSpeed."""
    settings = deepspeed_settings(
        job.training,
        processes=processes,
        device="cuda" if device.type == "cuda" else "cpu",
        quantized=job.precision is not None,
    )
    engine = initialized(student, settings, weight_optimizer(student, job.training))
    # Without ZeRO that step on zero gradients has been made, and Adam's bias correction would
    # start at two.
    engine.basic_optimizer.state.clear()
    return engine


def initialized(
    module: nn.Module,
    settings: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """An engine of DeepSpeed over the process group that there is; without optimizer, to infer."""
    join_process_group()
    with _fp32_buffers_kept(module):
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=dict(settings), dist_init_required=False
        )
    return engine


def join_process_group() -> None:
    """Let DeepSpeed use torch's process group."""
    # DeepSpeed would compile an operator that its inference alone uses. The lock of that build
    # outlives a killed process, and every later start would wait for it, for ever and silently.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = deepspeed.accelerator.get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)


@contextmanager
def _fp32_buffers_kept(module: nn.Module) -> Iterator[None]:
    buffers = {
        (owner, name): buffer
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and buffer.dtype == torch.float32
    }
    yield
    for (owner, name), buffer in buffers.items():
        owner._buffers[name] = buffer
