"""Learning rates worked by hand, parameter groups, and the clipping of theta."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from grace_core.config.training import Training
from grace_core.quantization.scales import ScaleBank
from grace_core.training.optimizer import (
    clip_flat_gradient,
    rate_at,
    scale_optimizer,
    set_rate,
    weight_optimizer,
)

TRAINING = Training(
    steps=10, weight_decay=0.05, betas=(0.8, 0.95), scale_learning_rate=2e-3, learning_rate=1e-2
)


def test_rates_worked_by_hand() -> None:
    """Ten steps, 20 % warm-up: 1/2, 1, then half a cosine wave over the eight steps left."""
    rates = [rate_at(step, 10, 0.2) for step in range(11)]
    eighth = math.cos(math.pi / 8)
    assert rates == pytest.approx(
        [
            0.5,
            1.0,
            1.0,
            (1 + eighth) / 2,
            (1 + math.sqrt(0.5)) / 2,
            (1 + math.cos(3 * math.pi / 8)) / 2,
            0.5,
            (1 - math.cos(3 * math.pi / 8)) / 2,
            (1 - math.sqrt(0.5)) / 2,
            (1 - eighth) / 2,
            0.0,
        ]
    )


def test_warm_up_is_rounded_up_and_may_be_absent() -> None:
    assert rate_at(0, 50, 0.03) == 0.5  # 1.5 steps become 2
    assert rate_at(1, 50, 0.03) == 1.0
    assert rate_at(0, 50, 0.0) == 1.0
    assert rate_at(0, 1, 0.03) == 1.0
    assert all(0 < rate_at(step, 7, 0.3) <= 1 for step in range(7))


def test_vectors_and_frozen_weights_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].weight.requires_grad_(False)
    optimizer = weight_optimizer(model, TRAINING)
    by_decay = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert {id(p) for p in by_decay[0.05]} == {id(model[0].weight)}
    assert {id(p) for p in by_decay[0.0]} == {
        id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)
    }
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)


def test_a_step_before_the_rate_is_set_changes_nothing() -> None:
    model = nn.Linear(3, 3)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = weight_optimizer(model, TRAINING)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_one_step_of_theta_by_hand() -> None:
    """AdamW's first step without decay is the rate times the gradient's sign."""
    bank = ScaleBank({"a": torch.tensor([[-5.0, -4.0]]), "b": torch.tensor([[-3.0]])})
    optimizer = scale_optimizer(bank, TRAINING)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0 and group["lr"] == 2e-3 and group["params"][0] is bank.flat
    set_rate(optimizer, 0.25 * TRAINING.scale_learning_rate)
    bank.flat.grad.copy_(torch.tensor([3.0, -0.5, 0.0]))
    optimizer.step()
    torch.testing.assert_close(
        bank.flat.detach(), torch.tensor([-5.0 - 5e-4, -4.0 + 5e-4, -3.0]), rtol=0, atol=1e-6
    )
    assert torch.equal(bank.layer("a").flatten(), bank.flat[:2])


def test_the_rate_is_set_for_every_group() -> None:
    optimizer = weight_optimizer(nn.Linear(2, 2), TRAINING)
    set_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_a_long_gradient_is_shortened_and_a_short_one_left() -> None:
    gradient = torch.tensor([3.0, 4.0])
    assert clip_flat_gradient(gradient, 1.0) == 5.0
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.8]))
    gradient = torch.tensor([0.3, 0.4])
    assert clip_flat_gradient(gradient, 1.0) == pytest.approx(0.5)
    assert gradient.tolist() == pytest.approx([0.3, 0.4])
    assert clip_flat_gradient(torch.zeros(3), 1.0) == 0.0
    assert math.isnan(clip_flat_gradient(torch.tensor([1.0, math.nan]), 1.0))
