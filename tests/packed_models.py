"""A tiny model of each family with one packed row, and what comes out of both."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_core.models.families import Family, set_trainable
from grace_core.models.forward import row_states
from grace_core.models.fused_forward import use_fused_forward
from grace_core.models.kernels import Kernels
from grace_core.models.loading import load_model, read_checkpoint
from grace_core.models.rows import PackedRow, packed_row
from grace_core.models.visual_inputs import VisualInputs
from tests.prepared_rows import prepared_row
from tests.tiny_models import FAMILIES, save_tiny


@dataclass(frozen=True)
class Outcome:
    """Final and penultimate states of a row, one after the other, and all gradients; fp32."""

    states: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class PackedModel:
    model: Any
    family: Family
    row: PackedRow

    def states_and_gradients(self) -> Outcome:
        """Of the sum of all states, each with a weight of its own."""
        found = row_states(self.model, self.family, self.row)
        states = torch.cat([found.predicting, *found.visual]).float()
        weights = torch.linspace(-1, 1, states.numel(), device=states.device).view(states.shape)
        self.model.zero_grad()
        (states * weights).sum().backward()
        gradients = {
            name: parameter.grad.detach().float().cpu()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        return Outcome(states.detach().cpu(), gradients)

    def fused(self, kernels: Kernels) -> PackedModel:
        model = copy.deepcopy(self.model)
        use_fused_forward(model, self.family, kernels)
        return replace(self, model=model)

    def cast(self, dtype: torch.dtype) -> PackedModel:
        model = copy.deepcopy(self.model)
        buffers = {
            (module, name): buffer
            for module in model.modules()
            for name, buffer in module._buffers.items()
        }
        model = model.to(dtype)
        for (module, name), buffer in buffers.items():
            module._buffers[name] = buffer  # rotary frequencies stay fp32, as in training
        return replace(self, model=model)

    def to(self, device: torch.device) -> PackedModel:
        return replace(self, model=copy.deepcopy(self.model).to(device), row=self.row.to(device))

    def distance_from(self, exact: Outcome) -> float:
        """L2 distance of all gradients from those of `exact`."""
        found = self.states_and_gradients().gradients
        assert found.keys() == exact.gradients.keys()
        apart = [(found[name] - gradient).norm() for name, gradient in exact.gradients.items()]
        return float(torch.stack(apart).norm())


def packed_model(name: str, folder: Path, **shape: int) -> PackedModel:
    """A trained fp32 model of a family and a row of three samples with one, no and two pictures."""
    tiny = FAMILIES[name](seed=3, **shape)
    checkpoint = read_checkpoint(save_tiny(tiny, folder))
    visual = VisualInputs(checkpoint, min_pixels=1024, max_pixels=16384)
    samples = [prepared_row(tiny, i, pictures=n) for i, n in enumerate((1, 0, 2))]
    model = load_model(checkpoint, device="cpu", dtype=torch.float32, attention="packed").train()
    set_trainable(model, checkpoint.family, "language")
    return PackedModel(model, checkpoint.family, packed_row(samples, visual))
