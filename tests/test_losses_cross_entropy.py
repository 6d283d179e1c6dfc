"""Cross-entropy against explicit probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from grace_core.losses.cross_entropy import cross_entropy_sum


def brute_force(logits: torch.Tensor, labels: torch.Tensor) -> float:
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        top = max(row)
        weights = [math.exp(value - top) for value in row]
        total -= math.log(weights[label] / sum(weights))
    return total


def example(num_tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens * 1000 + vocabulary)
    logits = 3 * torch.randn(num_tokens, vocabulary, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocabulary, (num_tokens,), generator=generator)


@pytest.mark.parametrize(("num_tokens", "vocabulary"), [(1, 2), (7, 13), (33, 257)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
def test_equals_explicit_sum(
    num_tokens: int, vocabulary: int, dtype: torch.dtype, tolerance: float
) -> None:
    logits, labels = example(num_tokens, vocabulary)
    logits = logits.to(dtype)
    result = cross_entropy_sum(logits, labels)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.item() == pytest.approx(brute_force(logits, labels), rel=tolerance)


def test_is_a_sum_over_tokens() -> None:
    logits, labels = example(9, 11)
    parts = cross_entropy_sum(logits[:2], labels[:2]) + cross_entropy_sum(logits[2:], labels[2:])
    torch.testing.assert_close(cross_entropy_sum(logits, labels), parts)


def test_gradient_is_probability_minus_one_hot() -> None:
    logits, labels = example(5, 7)
    logits.requires_grad_()
    cross_entropy_sum(logits, labels).backward()
    weights = torch.exp(logits.detach())
    expected = weights / weights.sum(-1, keepdim=True)
    expected[torch.arange(5), labels] -= 1
    torch.testing.assert_close(logits.grad, expected)


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], requires_grad=True)
    loss = cross_entropy_sum(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 2e4
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0, 0], [1.0, -1, 0]]))


def test_no_token_is_zero_with_gradient() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and logits.grad.shape == (0, 5)


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_label_outside_vocabulary_fails(label: int) -> None:
    with pytest.raises(IndexError):
        cross_entropy_sum(torch.zeros(2, 3), torch.tensor([0, label]))
