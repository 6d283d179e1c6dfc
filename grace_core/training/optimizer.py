"""Parameter groups and learning rates.

Weights are stepped by DeepSpeed's AdamW. The quantizer's log-scales theta have an optimizer of
their own: fp32 and whole on every rank (one scale for 128 weights), no weight decay, their own
rate. DeepSpeed clips the norm of the weights' gradient; theta's is clipped separately, to the same
norm (the official code clips the two together).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from grace_core.config.training import Training
from grace_core.quantization.scales import ScaleBank


def weight_optimizer(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW over the trained weights; vectors (norms, biases) are not decayed.

    Its rate is zero until the loop sets it: DeepSpeed may step an optimizer once on zero gradients
    while it sets up, which must change nothing.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim >= 2],
            "weight_decay": training.weight_decay,
        },
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=training.betas,
        foreach=True,
    )


def scale_optimizer(bank: ScaleBank, training: Training) -> torch.optim.AdamW:
    """AdamW over theta, fp32."""
    return torch.optim.AdamW(
        [bank.flat],
        lr=training.scale_learning_rate,
        betas=training.betas,
        weight_decay=0.0,
    )


def rate_at(step: int, steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate at a 0-based step: linear warm-up, then cosine to zero."""
    warmup = math.ceil(steps * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_flat_gradient(gradient: Tensor, max_norm: float) -> float:
    """Scale a flat gradient in place to at most `max_norm`; returns its norm before."""
    norm = torch.linalg.vector_norm(gradient)
    gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return float(norm)
