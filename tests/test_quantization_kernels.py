"""The maps of all layers at once: against the differentiable oracle, and kernels against twins."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace_core.quantization import straight_through
from grace_core.quantization.lsq import (
    dequantize,
    fake_quantize,
    initial_scale,
    quantize,
    stored_scale,
)
from grace_core.quantization.straight_through import (
    GradientShare,
    plain_map_gradients,
    plain_quantize_layers,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU kernels are interpreted, see `conftest.py`."""

W_HAT_DTYPES = [torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]
"""Triton's interpreter truncates to bf16 where a GPU rounds."""

SHAPES = ((6, 32), (3, 48), (1, 16), (40, 64))
GROUP = 16


def kernels() -> Any:
    pytest.importorskip("triton")
    from grace_core.quantization import kernels

    return kernels


def layers(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    *,
    bits: int = 4,
    group_size: int = GROUP,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Weights and theta of all layers; scales so small that many weights are outside."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    thetas = [torch.log(initial_scale(weight, group_size, bits)) - 0.5 for weight in weights]
    theta = torch.cat([theta.flatten() for theta in thetas])
    return [weight.to(DEVICE) for weight in weights], theta.to(DEVICE)


def upstream(weights: list[Tensor], dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(w.shape, generator=generator).to(DEVICE, dtype) for w in weights]


def oracle(
    weights: list[Tensor], theta: Tensor, gradients: list[Tensor], bits: int, group_size: int
) -> tuple[list[Tensor], Tensor]:
    """Gradients of weights and theta by autograd through the composed quantizer, in fp32."""
    of_weights, of_theta = [], []
    counts = [weight.numel() // group_size for weight in weights]
    for weight, gradient, part in zip(weights, gradients, theta.split(counts), strict=True):
        latent = weight.float().requires_grad_()
        leaf = part.view(weight.shape[0], -1).clone().requires_grad_()
        fake_quantize(latent, leaf, bits, group_size).backward(gradient.float())
        assert latent.grad is not None and leaf.grad is not None
        inside = latent.grad != 0
        # There autograd multiplies by s and divides by it again, which rounds.
        torch.testing.assert_close(latent.grad[inside], gradient[inside].float())
        of_weights.append(torch.where(inside, gradient.float(), 0.0))
        of_theta.append(leaf.grad.flatten())
    return of_weights, torch.cat(of_theta)


@pytest.fixture(params=["plain", "kernel"])
def quantize_layers(request: pytest.FixtureRequest) -> Callable[..., None]:
    plain = request.param == "plain"
    return plain_quantize_layers if plain else kernels().quantize_layers


@pytest.fixture(params=["plain", "kernel"])
def map_gradients(request: pytest.FixtureRequest) -> Callable[..., None]:
    return plain_map_gradients if request.param == "plain" else kernels().map_gradients


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("result", W_HAT_DTYPES)
def test_w_hat_is_that_of_the_released_codes(
    quantize_layers: Callable[..., None], bits: int, dtype: torch.dtype, result: torch.dtype
) -> None:
    weights, theta = layers(bits=bits, dtype=dtype)
    scales = stored_scale(theta)
    w_hat = torch.empty(sum(weight.numel() for weight in weights), dtype=result, device=DEVICE)
    quantize_layers(weights, scales, w_hat, bits=bits, group_size=GROUP)
    parts = w_hat.split([weight.numel() for weight in weights])
    of_layers = scales.split([weight.numel() // GROUP for weight in weights])
    for weight, part, scale in zip(weights, parts, of_layers, strict=True):
        scale = scale.view(weight.shape[0], -1)
        expected = dequantize(quantize(weight, scale, bits, GROUP), scale, result)
        assert torch.equal(part.view_as(weight), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("result", W_HAT_DTYPES)
def test_ties_and_edges_have_the_released_codes(
    quantize_layers: Callable[..., None], bits: int, result: torch.dtype
) -> None:
    """Halves, 7.3 and numbers far outside, times a few scales."""
    ratios = torch.arange(-300, 301, dtype=torch.float32).div(2)
    ratios = torch.cat([ratios, torch.tensor([7.3, -8.4, 127.4, 1e30, -1e30, 0.0, 0.499, 2.501])])
    ratios = torch.nn.functional.pad(ratios, (0, -len(ratios) % 16)).view(1, -1)
    weight = torch.cat([ratios * scale for scale in (1.0, 0.5, 0.0371, 3e-5)]).bfloat16().to(DEVICE)
    of_rows = torch.tensor([1.0, 0.5, 0.0371, 3e-5]).bfloat16().to(DEVICE)
    scale = of_rows[:, None].expand(-1, weight.shape[1] // 16).contiguous()
    w_hat = torch.empty(weight.numel(), dtype=result, device=DEVICE)
    quantize_layers([weight], scale.view(-1), w_hat, bits=bits, group_size=16)
    expected = dequantize(quantize(weight, scale, bits, 16), scale, result)
    assert torch.equal(w_hat.view_as(weight), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_gradients_are_mapped_as_by_autograd(
    map_gradients: Callable[..., None], bits: int, dtype: torch.dtype
) -> None:
    weights, theta = layers(bits=bits)
    gradients = upstream(weights, dtype)
    expected, of_theta = oracle(weights, theta, gradients, bits, GROUP)
    found = torch.full_like(theta, torch.nan)
    shares = [GradientShare(0, gradient.view(-1)) for gradient in gradients]
    map_gradients(weights, stored_scale(theta), shares, found, bits=bits, group_size=GROUP)
    for gradient, value in zip(gradients, expected, strict=True):
        assert (value == 0).any() and torch.equal(gradient.float(), value)
    torch.testing.assert_close(found, of_theta, rtol=1e-5, atol=1e-5)


def cut(gradients: list[Tensor], bounds: tuple[int, int]) -> list[GradientShare | None]:
    """What one of several ranks holds of the layers' gradients, which lie behind one another."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])[slice(*bounds)].clone()
    shares: list[GradientShare | None] = []
    begin = 0
    for gradient in gradients:
        first, last = max(begin, bounds[0]), min(begin + gradient.numel(), bounds[1])
        part = flat[first - bounds[0] : last - bounds[0]]
        shares.append(GradientShare(first - begin, part) if first < last else None)
        begin += gradient.numel()
    return shares


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["plain", "kernel"])
def test_shares_cut_anywhere_add_up(kind: str, data: st.DataObject) -> None:
    apply = plain_map_gradients if kind == "plain" else kernels().map_gradients
    weights, theta = layers()
    gradients = upstream(weights, torch.float32)
    size = sum(gradient.numel() for gradient in gradients)
    cuts = data.draw(st.lists(st.integers(0, size), max_size=4))
    bounds = [0, *sorted(cuts), size]
    expected, of_theta = oracle(weights, theta, gradients, 4, GROUP)
    sums, pieces = torch.zeros_like(theta), []
    for first, last in itertools.pairwise(bounds):
        shares = cut(gradients, (first, last))
        found = torch.zeros_like(theta)
        apply(weights, stored_scale(theta), shares, found, bits=4, group_size=GROUP)
        sums += found
        pieces += [share.gradient for share in shares if share is not None]
    assert torch.equal(torch.cat(pieces), torch.cat([value.flatten() for value in expected]))
    torch.testing.assert_close(sums, of_theta, rtol=1e-5, atol=1e-5)


def test_groups_out_of_reach_are_left_alone(map_gradients: Callable[..., None]) -> None:
    weights, theta = layers()
    gradients = upstream(weights, torch.float32)
    found = torch.full_like(theta, torch.nan)
    # The second layer's elements 20 to 40, in its groups 1 and 2.
    begin = weights[0].numel()
    shares = cut(gradients, (begin + 20, begin + 40))
    map_gradients(weights, stored_scale(theta), shares, found, bits=4, group_size=GROUP)
    group = begin // GROUP
    assert found.isfinite().nonzero().flatten().tolist() == [group + 1, group + 2]


def test_kernels_and_twins_agree_where_weights_and_gradients_are_apart() -> None:
    """Different storages, odd addresses and a NaN."""
    weights, theta = layers(((128, 128), (64, 256)), group_size=128)
    weights[1][3, 5] = torch.nan
    scattered = []
    for weight in weights:
        storage = torch.empty(weight.numel() + 3, dtype=weight.dtype, device=DEVICE)
        scattered.append(storage[3:].view(weight.shape).copy_(weight))
    scales = stored_scale(theta)
    size = sum(weight.numel() for weight in weights)
    results: list[tuple[Tensor, Tensor, list[Tensor]]] = []
    for of_weights, quantize_all, map_all in (
        (weights, plain_quantize_layers, plain_map_gradients),
        (scattered, kernels().quantize_layers, kernels().map_gradients),
    ):
        w_hat = torch.empty(size, dtype=W_HAT_DTYPES[-1], device=DEVICE)
        quantize_all(of_weights, scales, w_hat, bits=4, group_size=128)
        gradients = upstream(weights, torch.bfloat16)
        shares = [GradientShare(0, gradient.view(-1)) for gradient in gradients]
        of_theta = torch.empty_like(theta)
        map_all(of_weights, scales, shares, of_theta, bits=4, group_size=128)
        results.append((w_hat, of_theta, gradients))
    (w_hat, of_theta, gradients), (w_hat_1, of_theta_1, gradients_1) = results
    assert int(w_hat.isnan().sum()) == 1 and int(of_theta.isnan().sum()) == 1
    torch.testing.assert_close(w_hat_1, w_hat, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(of_theta_1, of_theta, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(gradients_1[0], gradients[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_takes_the_kernels(caplog: pytest.LogCaptureFixture) -> None:
    straight_through._kernels_for.cache_clear()
    assert straight_through._kernels_for("cuda", 128) is kernels()
    assert not caplog.records


def test_a_group_size_without_kernels_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    straight_through._kernels_for.cache_clear()
    for _ in range(2):
        assert straight_through._kernels_for("cuda", 96) is None
    (record,) = caplog.records
    assert "power of two as group size, not 96" in record.getMessage()
    assert straight_through._kernels_for("cpu", 96) is None
