"""The objective of one optimizer step written out from its equations, in float64.

Every sample goes alone through transformers' own forward pass, which yields logits at all
positions; probabilities, entropies and centring matrices are formed as they stand in the paper.
Slow and wasteful, and independent of packing, rows, ranks and chunks. Gradients flow to the
student.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grace_core.config.objective import Distillation
from grace_core.models.rows import packed_row
from grace_core.models.visual_inputs import VisualInputs


def opinionated(model: Any) -> Any:
    """The same random model with sharper logits, so that tokens differ in loss and confidence."""
    decoder = model.model.language_model
    with torch.no_grad():
        decoder.norm.weight.mul_(12.0 if decoder.config.hidden_size < 256 else 9.0)
    return model


@dataclass(frozen=True)
class StepTerms:
    """The three terms of Eq. 21 over a whole step, float64 scalars, and what they divide by."""

    cross_entropy: Tensor
    distillation: Tensor
    relational: Tensor
    tokens: int
    gates: float
    pictures: int

    def detached(self) -> StepTerms:
        """The same without the graph."""
        return replace(
            self,
            cross_entropy=self.cross_entropy.detach(),
            distillation=self.distillation.detach(),
            relational=self.relational.detach(),
        )


@dataclass(frozen=True)
class _Sample:
    logits: Tensor
    """(N, V) that predict the supervised tokens."""

    labels: Tensor
    visual: list[Tensor]
    """(n, d) of each picture, output of decoder layer L-2."""


def step_terms(
    student: Any,
    teacher: Any,
    samples: Sequence[Mapping[str, Any]],
    visual: VisualInputs,
    distillation: Distillation,
) -> StepTerms:
    """All samples of a step; `student` and `teacher` are float64 models with plain attention."""
    cross_entropy, distilled, gates = [], [], []
    relations = []
    for sample in samples:
        of_student = _forward(student, sample, visual)
        with torch.no_grad():
            of_teacher = _forward(teacher, sample, visual)
        for z_s, z_t, label in zip(
            of_student.logits, of_teacher.logits, of_student.labels.tolist(), strict=True
        ):
            cross_entropy.append(-torch.log(torch.softmax(z_s, 0)[label]))
            distilled.append(_token_distillation(z_s, z_t, label, distillation))
            gated = distillation.kind == "gated-decoupled"
            gates.append(_gate(z_t) if gated else torch.ones((), dtype=torch.float64))
        for h_s, h_t in zip(of_student.visual, of_teacher.visual, strict=True):
            if len(h_t) >= 4:
                relations.append(1 - _alignment(h_t, h_s))
    weights = torch.stack(gates)
    zero = torch.zeros((), dtype=torch.float64)
    return StepTerms(
        cross_entropy=torch.stack(cross_entropy).mean(),
        distillation=(weights * torch.stack(distilled)).sum() / weights.sum(),
        relational=torch.stack(relations).mean() if relations else zero,
        tokens=len(cross_entropy),
        gates=float(weights.sum()),
        pictures=len(relations),
    )


def _forward(model: Any, sample: Mapping[str, Any], visual: VisualInputs) -> _Sample:
    ids = torch.tensor([sample["input_ids"]])
    pictures = {}
    if sample["images"]:
        alone = packed_row([sample], visual)
        pictures = {**alone.pictures, **visual.token_types(ids)}
        pictures["pixel_values"] = pictures["pixel_values"].to(model.dtype)
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False, **pictures)
    supervised = [i for i, flag in enumerate(sample["labels_mask"]) if flag]
    places = (ids[0] == visual.image_token_id).nonzero().flatten()
    counts = [visual.tokens(tuple(grid)) for grid in sample["image_grids"]]
    penultimate = output.hidden_states[-2][0]
    return _Sample(
        logits=output.logits[0, [i - 1 for i in supervised]],
        labels=ids[0, supervised],
        visual=[penultimate[part] for part in places.split(counts)] if counts else [],
    )


def _token_distillation(z_s: Tensor, z_t: Tensor, label: int, settings: Distillation) -> Tensor:
    if settings.kind == "none":
        return torch.zeros((), dtype=torch.float64)
    temperature = settings.temperature
    p_s, p_t = torch.softmax(z_s / temperature, 0), torch.softmax(z_t / temperature, 0)
    if settings.kind == "plain":
        return temperature**2 * (p_t * torch.log(p_t / p_s)).sum()
    target = p_t[label] * torch.log(p_t[label] / p_s[label])
    target = target + (1 - p_t[label]) * torch.log((1 - p_t[label]) / (1 - p_s[label]))
    others = torch.arange(len(p_t)) != label
    q_s, q_t = p_s[others] / (1 - p_s[label]), p_t[others] / (1 - p_t[label])
    rest = (q_t * torch.log(q_t / q_s)).sum()
    return temperature**2 * (settings.alpha * target + settings.beta_dkd * rest)


def _gate(z_t: Tensor) -> Tensor:
    p = torch.softmax(z_t, 0)
    return torch.exp((p * torch.log(p)).sum() / math.log(len(p)))


def _alignment(h_t: Tensor, h_s: Tensor) -> Tensor:
    n = len(h_t)
    centring = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64) / n
    grams = []
    for states in (h_t, h_s):
        rows = states / states.norm(dim=1, keepdim=True)
        grams.append(centring @ rows @ rows.T @ centring)
    k_t, k_s = grams
    return torch.trace(k_t @ k_s) / torch.sqrt(torch.trace(k_t @ k_t) * torch.trace(k_s @ k_s))
