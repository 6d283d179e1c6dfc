"""Which layers are computed once more in the backward pass instead of keeping their activations."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from grace_core.config.training import Training
from grace_core.models.activations import layer_activations, layers_to_recompute
from grace_core.models.families import Family, decoder_layers
from grace_core.training.memory import Trained

log = logging.getLogger(__name__)

_GIB = 2**30
_RESERVED_SHARE = 0.1
"""Of a GPU's memory: logits, the teacher's and the vision tower's passes, communication, gaps."""


def choose_recomputed_layers(
    model: Any, family: Family, training: Training, *, later_bytes: int
) -> int:
    """Number of decoder layers to recompute; the same on every rank.

    Called by all ranks of the group, once the weights and the optimizer's copies of them exist.

    later_bytes: that gradients, moments and the like will still take.
    """
    layers = len(decoder_layers(model, family))
    if training.recompute == "all":
        return layers
    if training.recompute == "none" or (training.recompute == "auto" and not _on_gpu(model)):
        return 0
    if training.recompute != "auto":
        return min(training.recompute, layers)
    free = _free_bytes(model.device) - later_bytes
    each = layer_activations(
        model.config.get_text_config(), family, fused=training.kernels == "auto"
    )
    count, taken = layers_to_recompute(layers, training.row_tokens, each, free)
    # Recomputation under ZeRO-3 gathers parameters, which all ranks must do alike.
    agreed = torch.tensor(count, device=model.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    log.info(
        "recompute auto: %d of %d layers; a row of %d tokens keeps %.1f GiB, %.1f GiB are free "
        "for it",
        int(agreed),
        layers,
        training.row_tokens,
        taken / _GIB,
        free / _GIB,
    )
    if taken > free:
        log.warning(
            "even with every layer recomputed a row may not fit: lower row_tokens or raise "
            "zero_stage"
        )
    return int(agreed)


def trained_sizes(model: Any) -> Trained:
    """Sizes of a model whose `requires_grad` is set; ZeRO-3 may have emptied its parameters."""
    sizes = {
        parameter: getattr(parameter, "ds_numel", parameter.numel())
        for parameter in model.parameters()
    }
    trained = [size for parameter, size in sizes.items() if parameter.requires_grad]
    return Trained(weights=sum(sizes.values()), trained=sum(trained), largest=max(trained))


def recompute_layers(model: Any, family: Family, count: int) -> None:
    """Recompute the first `count` decoder layers; the vision tower's too, where they are trained.

    Results are the same to the bit.
    """
    for index, layer in enumerate(decoder_layers(model, family)):
        _recompute(layer, index < count)
    for module in model.get_submodule(family.vision).modules():
        if isinstance(module, GradientCheckpointingLayer):
            trained = any(parameter.requires_grad for parameter in module.parameters())
            _recompute(module, count > 0 and trained)


def _recompute(layer: Any, recomputed: bool) -> None:
    layer.gradient_checkpointing = recomputed
    # Not reentrant: the penultimate states are read inside the checkpointed layers. ZeRO-3 empties
    # parameters between passes, which the shape check would object to. No supported family draws
    # random numbers.
    layer._gradient_checkpointing_func = partial(
        checkpoint, use_reentrant=False, determinism_check="none", preserve_rng_state=False
    )


def _on_gpu(model: Any) -> bool:
    return bool(model.device.type == "cuda")


def _free_bytes(device: torch.device) -> int:
    """What torch can still hand out on a GPU, less a reserve."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached - _RESERVED_SHARE * total)
