"""The confidence gate against explicit entropies, and Theorem 3.1."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_core.losses.gate import confidence_gate, normalised_entropy


def brute_force_entropy(row: list[float]) -> float:
    """H / log V from explicit probabilities."""
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    probabilities = [weight / sum(weights) for weight in weights]
    return -sum(p * math.log(p) for p in probabilities if p > 0) / math.log(len(row))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 9),
    vocabulary=st.integers(2, 67),
    spread=st.sampled_from([0.0, 0.01, 1.0, 10.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_equals_explicit_entropy(
    num_tokens: int, vocabulary: int, spread: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(num_tokens, vocabulary, generator=generator)).to(dtype)
    entropy = normalised_entropy(logits)
    gate = confidence_gate(logits)
    assert entropy.dtype == gate.dtype == torch.promote_types(dtype, torch.float32)
    assert entropy.shape == gate.shape == (num_tokens,)
    assert bool(((entropy >= 0) & (entropy <= 1)).all())
    for row, h, g in zip(logits.tolist(), entropy.tolist(), gate.tolist(), strict=True):
        expected = brute_force_entropy(row)
        assert h == pytest.approx(expected, abs=2e-6)
        assert g == pytest.approx(math.exp(-expected), abs=2e-6)


def test_uniform_and_certain_teachers() -> None:
    vocabulary = 151_936
    logits = torch.full((2, vocabulary), -3.0, dtype=torch.bfloat16)
    logits[1, 77] = 1e4
    torch.testing.assert_close(
        normalised_entropy(logits), torch.tensor([1.0, 0.0]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        confidence_gate(logits), torch.tensor([math.exp(-1), 1.0]), rtol=0, atol=1e-5
    )


def test_two_equally_likely_of_sixteen() -> None:
    logits = torch.full((1, 16), -1e4)
    logits[0, :2] = 5.0
    # log 2 / log 16 = 1/4.
    assert normalised_entropy(logits).item() == pytest.approx(0.25, abs=1e-6)
    assert confidence_gate(logits).item() == pytest.approx(0.7788008, abs=1e-6)


def test_no_gradient_and_input_untouched() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    assert not confidence_gate(logits.requires_grad_()).requires_grad
    assert torch.equal(logits, before)


def test_gated_mean_is_plain_mean_plus_covariance() -> None:
    """Theorem 3.1: sum_i w_i L_i = mean(L) + N Cov(w, L), w = g / sum g, 1/N covariance."""
    generator = torch.Generator().manual_seed(3)
    num_tokens = 41
    spread = torch.rand(num_tokens, 1, generator=generator, dtype=torch.float64) * 8
    logits = spread * torch.randn(num_tokens, 19, generator=generator, dtype=torch.float64)
    losses = torch.rand(num_tokens, generator=generator, dtype=torch.float64) * 30
    gate = confidence_gate(logits)

    # The quotient of sums, with tokens dealt out unevenly over three micro-batches.
    parts = [slice(0, 5), slice(5, 6), slice(6, num_tokens)]
    numerator = sum((gate[part] * losses[part]).sum() for part in parts)
    gated = float(numerator / sum(gate[part].sum() for part in parts))

    weights = [g / sum(gate.tolist()) for g in gate.tolist()]
    values = losses.tolist()
    mean_weight, mean_value = sum(weights) / num_tokens, sum(values) / num_tokens
    covariance = (
        sum((w - mean_weight) * (v - mean_value) for w, v in zip(weights, values, strict=True))
        / num_tokens
    )
    assert abs(num_tokens * covariance) > 1e-3  # the gate does something here
    assert gated == pytest.approx(mean_value + num_tokens * covariance, rel=1e-12)
