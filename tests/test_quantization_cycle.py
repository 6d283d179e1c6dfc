"""An accumulation cycle with W_hat in the weights' place: the gradients are those without it.

The layers that quantize in every pass are held to the composed quantizer in
`test_quantization_linear.py`; how the trainer uses cycles, in `test_training_groups.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grace_core.quantization.convert import convert
from grace_core.quantization.cycle import QuantizationCycle
from grace_core.quantization.linear import QuantizedLinear
from grace_core.quantization.lsq import dequantize, stored_scale
from grace_core.quantization.scales import ScaleBank
from grace_core.quantization.straight_through import GradientShare
from tests.tiny_models import DECODER, FAMILIES, text_batch


class Stack(nn.Module):
    """Two quantized layers, one with a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        first, second = nn.Linear(32, 48, dtype=dtype), nn.Linear(48, 16, bias=False, dtype=dtype)
        with torch.no_grad():
            for parameter in (*first.parameters(), *second.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        thetas = {"first": torch.full((48, 2), -1.5), "second": torch.full((16, 3), -1.5)}
        self.bank = ScaleBank(thetas)
        self.first = QuantizedLinear(first, self.bank.layer("first"), bits=4, group_size=16)
        self.second = QuantizedLinear(second, self.bank.layer("second"), bits=4, group_size=16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=False)
        assert isinstance(hidden, Tensor)
        output: Tensor = self.second(torch.tanh(hidden))
        return output

    def passes(self) -> Tensor:
        """Forward and backward over three micro-batches; returns the sum of all outputs."""
        generator = torch.Generator().manual_seed(8)
        total = torch.zeros(())
        for tokens in (5, 3, 4):
            x = torch.randn(tokens, 32, generator=generator).to(self.first.weight.dtype)
            loss = self(x).float().square().sum()
            loss.backward()
            total += loss.detach()
        return total


def whole(cycle: QuantizationCycle) -> list[GradientShare | None]:
    shares: list[GradientShare | None] = []
    for weight in cycle.weights:
        assert weight.grad is not None
        shares.append(GradientShare(0, weight.grad.view(-1)))
    return shares


def gradients(model: Stack) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert model.bank.flat.grad is not None
    return {**found, "theta": model.bank.flat.grad}


def test_a_cycle_has_the_gradients_of_layers_that_quantize_in_every_pass() -> None:
    model, expected = Stack(torch.float32), Stack(torch.float32)
    cycle = QuantizationCycle(model, model.bank)
    for _ in range(2):  # another cycle after the weights have moved
        for one in (model, expected):
            one.zero_grad()
            one.bank.zero_grad()
        with cycle.weights_quantized():
            total = model.passes()
        cycle.map_gradients(whole(cycle))
        assert torch.equal(total, expected.passes())
        found, wanted = gradients(model), gradients(expected)
        assert found.keys() == wanted.keys() and len(found) == 4
        for name, value in wanted.items():
            assert value.abs().sum() > 0
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for one in (model, expected):
                for parameter in (*one.parameters(), one.bank.flat):
                    parameter.add_(wanted["theta"].mean().sign(), alpha=0.05)


def test_bf16_passes_are_those_of_layers_that_quantize_in_every_pass() -> None:
    model, expected = Stack(torch.bfloat16), Stack(torch.bfloat16)
    cycle = QuantizationCycle(model, model.bank)
    with cycle.weights_quantized():
        total = model.passes()
    cycle.map_gradients(whole(cycle))
    assert torch.equal(total, expected.passes())
    found, wanted = gradients(model), gradients(expected)
    for name in ("first.weight", "first.bias", "second.weight"):
        assert torch.equal(found[name], wanted[name])
    # One sum in bf16 is mapped here, and three bf16 gradients there.
    difference = (found["theta"] - wanted["theta"]).norm() / wanted["theta"].norm()
    assert difference < 2**-8


def test_weights_and_their_storage_are_as_before() -> None:
    model = Stack(torch.bfloat16)
    cycle = QuantizationCycle(model, model.bank)
    parameters = list(model.parameters())
    before = [(p.data_ptr(), p.detach().clone()) for p in parameters]
    with pytest.raises(ZeroDivisionError), cycle.weights_quantized():
        scale = stored_scale(model.first.theta)
        weight = model.first.weight
        assert model.first.holds_w_hat and weight is parameters[0]
        with pytest.raises(AssertionError, match="end the cycle first"):
            model.first.codes()
        raise ZeroDivisionError
    assert torch.equal(weight, before[0][1]) and not model.first.holds_w_hat
    with cycle.weights_quantized():
        assert torch.equal(weight, dequantize(_codes(before[0][1], scale), scale, torch.bfloat16))
    for parameter, (pointer, value) in zip(parameters, before, strict=True):
        assert parameter.data_ptr() == pointer and torch.equal(parameter, value)


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    """By brute force in float64."""
    steps = scale.double().repeat_interleave(16, dim=1)
    return (weight.double() / steps).round().clamp(-8, 7).to(torch.int8)


def test_misuse_is_refused() -> None:
    model = Stack(torch.float32)
    cycle = QuantizationCycle(model, model.bank)
    with pytest.raises(AssertionError, match="once in a cycle"):
        cycle.map_gradients([None, None])
    with cycle.weights_quantized():
        model.passes()
        with pytest.raises(AssertionError, match="under way"), cycle.weights_quantized():
            pass
    with torch.no_grad():
        model.bank.flat.add_(0.1)
    with pytest.raises(AssertionError, match="scales changed"):
        cycle.map_gradients(whole(cycle))
    with cycle.weights_quantized():
        model.passes()
    cycle.map_gradients(whole(cycle))
    with pytest.raises(AssertionError, match="once in a cycle"):
        cycle.map_gradients(whole(cycle))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_within_a_cycle(family: str) -> None:
    model: Any = FAMILIES[family]().bfloat16()
    bank = convert(model, decoder_prefix=DECODER, bits=4, group_size=128)
    cycle = QuantizationCycle(model, bank)
    batch = text_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        with cycle.weights_quantized():
            assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model(**batch).logits, expected)
