"""Saving a run in the middle and going on exactly there.

A checkpoint is a directory `step-<n>` of safetensors and JSON, no pickle:

    model.safetensors          bf16 weights, whole (gathered under ZeRO-3)
    optimizer-<rank>.safetensors  this rank's fp32 master weights and moments
    scales.safetensors         theta with its moments (quantized training)
    state.json                 step, controller, layout; written last, with every file's SHA-256
                               and its own

It is written under a temporary name and renamed when all ranks are done, so a directory of the
final name is whole; on reading, every digest is compared and a damaged one is passed over for the
one before. Sharded states are kept as they are, so a run goes on with the same number of processes
and the same ZeRO stage; another layout is refused with what to do.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist

from grace_core.artifacts import sha256_of
from grace_core.quantization.scales import ScaleBank
from grace_core.training.saved import STATE_FILE, STEP_PREFIX, Layout, Saved, with_checksum

_BYTES_A_WEIGHT = 2 + 4 + 4 + 4
"""bf16 weight, fp32 master weight, two fp32 moments."""


def save_checkpoint(
    folder: Path,
    engine: Any,
    model: nn.Module,
    *,
    step: int,
    layout: Layout,
    controller: Mapping[str, float | None],
    scales: tuple[ScaleBank, torch.optim.Optimizer] | None,
    keep: int,
) -> float:
    """Write a checkpoint after `step` optimizer steps; called by every rank.

    Returns the seconds it took. Older checkpoints beyond `keep` are removed afterwards.
    """
    started = time.monotonic()
    rank = dist.get_rank()
    final = folder / f"{STEP_PREFIX}{step:08d}"
    partial = folder / f".{final.name}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    weights = whole_weights(model)
    save_file(_master_tensors(engine), partial / f"optimizer-{rank:05d}.safetensors")
    if rank == 0:
        save_file(weights, partial / "model.safetensors")
        if scales is not None:
            save_file(_scale_tensors(*scales), partial / "scales.safetensors")
    dist.barrier()
    if rank == 0:
        state = {
            "step": step,
            "controller": dict(controller),
            "layout": vars(layout),
            "sha256": {file.name: sha256_of(file) for file in sorted(partial.iterdir())},
        }
        with (partial / STATE_FILE).open("w", encoding="utf-8") as stream:
            stream.write(with_checksum(state))
            stream.flush()
            os.fsync(stream.fileno())
        for path in _checkpoints(folder):
            if path.name >= final.name:  # damaged, and passed over when this run resumed
                shutil.rmtree(path)
        os.replace(partial, final)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return time.monotonic() - started


def _checkpoints(folder: Path) -> list[Path]:
    """Whole and damaged ones, oldest first."""
    return sorted(path for path in folder.glob(f"{STEP_PREFIX}*") if path.is_dir())


def measured_write_seconds(folder: Path, model: nn.Module) -> float:
    """Seconds a checkpoint of `model` should take, from a timed write of up to 64 MiB.

    Good until the first real checkpoint has been timed.
    """
    # A parameter that ZeRO-3 has sharded has no elements of its own.
    elements = sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for _, parameter in unique_parameters(model)
    )
    size = elements * _BYTES_A_WEIGHT
    folder.mkdir(parents=True, exist_ok=True)
    content = os.urandom(min(size, 2**26))
    started = time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as stream:  # has no name: a crash leaves nothing
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        seconds = time.monotonic() - started
    return seconds * size / len(content)


def load_optimizer(saved: Saved, engine: Any) -> None:
    """Put this rank's master weights and moments back into DeepSpeed's optimizer."""
    file = saved.path / f"optimizer-{dist.get_rank():05d}.safetensors"
    tensors = load_file(file)
    state = engine.basic_optimizer.state
    for index, master in enumerate(_masters(engine)):
        master.data.copy_(tensors.pop(f"{index}.master"))
        state[master] = {
            name.partition(".")[2]: tensors.pop(name).to(
                "cpu" if name.endswith(".step") else master.device
            )
            for name in [key for key in tensors if key.startswith(f"{index}.")]
        }
    assert not tensors, f"unused entries in {file}: {sorted(tensors)[:3]}"


def load_scales(saved: Saved, bank: ScaleBank, optimizer: torch.optim.Optimizer) -> None:
    """Put theta and its moments back, bit for bit."""
    tensors = load_file(saved.path / "scales.safetensors")
    with torch.no_grad():
        bank.flat.copy_(tensors.pop("theta"))
    optimizer.state[bank.flat] = {
        name: value.to("cpu" if name == "step" else bank.flat.device)
        for name, value in tensors.items()
    }


def load_weights(saved: Saved, model: nn.Module) -> None:
    """Put the bf16 weights back, before DeepSpeed takes the model over."""
    with safe_open(saved.path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for name, parameter in unique_parameters(model):
            with torch.no_grad():
                parameter.copy_(file.get_tensor(name))
            names.remove(name)
    assert not names, f"unused weights in {saved.path}: {sorted(names)[:3]}"


def unique_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters by name, tied ones once."""
    return list(model.named_parameters(remove_duplicate=True))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU, gathered under ZeRO-3; complete on rank 0, empty on the others.

    Collective under ZeRO-3: every rank must call it.
    """
    weights = {}
    for name, parameter in unique_parameters(model):
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    weights[name] = parameter.detach().cpu().clone()
        elif dist.get_rank() == 0:
            weights[name] = parameter.detach().cpu().clone()
    return weights


def _masters(engine: Any) -> list[Tensor]:
    """The fp32 tensors that the base optimizer steps on this rank, in a fixed order."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in engine.basic_optimizer.param_groups for tensor in group["params"]]


def _master_tensors(engine: Any) -> dict[str, Tensor]:
    tensors = {}
    for index, master in enumerate(_masters(engine)):
        tensors[f"{index}.master"] = master.detach().cpu().contiguous()
        for name, value in engine.basic_optimizer.state[master].items():
            tensors[f"{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _scale_tensors(bank: ScaleBank, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"theta": bank.flat.detach().cpu()}
    for name, value in optimizer.state[bank.flat].items():
        tensors[name] = torch.as_tensor(value).detach().cpu()
    return tensors
