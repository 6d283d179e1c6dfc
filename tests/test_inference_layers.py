"""What lies between a decoder layer's products: kernels and plain functions against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_core.inference import layer_operations

SIZES = [
    # partial sums, rows, width, query heads, key-value heads, head width, capacity
    (1, 3, 96, 6, 2, 32, 300),
    (3, 1, 128, 4, 4, 16, 700),
    (2, 5, 64, 7, 1, 24, 40),
]


@pytest.fixture(params=["plain", "kernels"])
def operations(request: pytest.FixtureRequest) -> Any:
    if request.param == "plain":
        return layer_operations
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU; see test_inference_cuda.py")
    from grace_core.inference import layer_kernels

    return layer_kernels


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rms(states: Tensor, weight: Tensor) -> Tensor:
    size = (states.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return states.double() / size * weight.double()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_residual_and_norm(operations: Any, size: tuple[int, ...]) -> None:
    parts, rows, width, *_ = size
    product, residual, weight = drawn(parts, rows, width), drawn(rows, width, seed=1), drawn(width)
    exact = residual.double() + product.double().sum(0)
    found = operations.add_and_norm(product, residual, weight, 1e-6)
    torch.testing.assert_close(residual.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), rms(exact, weight), rtol=1e-5, atol=1e-5)
    alone = operations.add_and_norm(None, residual, weight, 1e-6)
    assert torch.equal(alone, found)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_silu_times(operations: Any, size: tuple[int, ...]) -> None:
    parts, rows, width, *_ = size
    product = drawn(parts, rows, 2 * width)
    gate, up = product.double().sum(0).chunk(2, dim=-1)
    found = operations.silu_times(product, torch.float32)
    torch.testing.assert_close(found.double(), gate * gate.sigmoid() * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_turning_and_keeping(operations: Any, size: tuple[int, ...], normed: bool) -> None:
    """A pair of channels is turned as the complex number that it is."""
    parts, rows, _, heads, kept, width, capacity = size
    product = drawn(parts, rows, (heads + 2 * kept) * width)
    norms = (drawn(width, seed=2), drawn(width, seed=3), 1e-6) if normed else None
    angles = drawn(capacity, width // 2, seed=4)
    turns = torch.arange(rows) * 3 % capacity
    places = torch.arange(rows) * capacity + torch.arange(rows) * 7 % capacity
    keys, values = drawn(2, rows * capacity, kept, width, seed=5).clone().unbind(0)
    keys, values = keys.contiguous(), values.contiguous()
    before = keys.clone(), values.clone()
    both = torch.cat((angles, angles), dim=-1)
    found = operations.turn_and_keep(
        product, norms, both.cos(), both.sin(), turns, places, keys, values
    )

    states = product.double().sum(0).view(rows, -1, width)
    query, key, value = states.split([heads, kept, kept], dim=1)
    if norms is not None:
        query, key = rms(query, norms[0]), rms(key, norms[1])
    turn = torch.polar(torch.ones(rows, width // 2).double(), angles[turns].double())[:, None]
    turned = []
    for part in (query, key):
        first, second = part.chunk(2, dim=-1)
        result = torch.complex(first.contiguous(), second.contiguous()) * turn
        turned.append(torch.cat((result.real, result.imag), dim=-1))
    expected = torch.cat((*turned, value), dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(keys[places], found[:, heads : heads + kept])
    assert torch.equal(values[places], found[:, heads + kept :])
    others = torch.ones(rows * capacity, dtype=torch.bool)
    others[places] = False
    assert torch.equal(keys[others], before[0][others])
    assert torch.equal(values[others], before[1][others])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_to_the_cache(operations: Any, size: tuple[int, ...]) -> None:
    """What lies behind a row's newest token counts for nothing, be it NaN's neighbour."""
    _, rows, _, heads, kept, width, capacity = size
    turned = drawn(rows, heads + 2 * kept, width)
    keys, values = drawn(2, rows, capacity, kept, width, seed=5).unbind(0)
    lengths = torch.arange(rows) * 11 % capacity + 1
    lengths[0] = capacity
    for row, length in enumerate(lengths.tolist()):
        keys[row, length:] = 1e4
        values[row, length:] = 1e4
    places = torch.arange(rows) * capacity + lengths - 1
    scale = 1 / math.sqrt(width)
    found = operations.attend_to_cache(
        turned, keys.contiguous(), values.contiguous(), places, scale
    )
    for row, length in enumerate(lengths.tolist()):
        for head in range(heads):
            key = keys[row, :length, head * kept // heads].double()
            value = values[row, :length, head * kept // heads].double()
            share = (key @ turned[row, head].double() * scale).softmax(0)
            own = found[row].view(heads, width)[head].double()
            torch.testing.assert_close(own, share @ value, rtol=1e-4, atol=1e-5)
