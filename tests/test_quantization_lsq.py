"""LSQ mathematics against hand-worked values and a scalar float64 brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace_core.quantization.lsq import (
    code_range,
    dequantize,
    fake_quantize,
    initial_scale,
    quantize,
    stored_scale,
)

# A scale that bf16 holds exactly, so that v = W / s is exact as well.
STEP = 0.25


def test_code_ranges() -> None:
    assert code_range(4) == (-8, 7)
    assert code_range(8) == (-128, 127)


# v, code, dW_hat/dW, dW_hat/ds at 4 bits, worked by hand from the piecewise rule.
HAND_WORKED = [
    (0.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, -0.5),  # halves round to even: 0
    (1.5, 2, 1.0, 0.5),  # ... and 2
    (2.5, 2, 1.0, -0.5),
    (-0.5, 0, 1.0, 0.5),
    (-1.5, -2, 1.0, -0.5),
    (3.25, 3, 1.0, -0.25),
    (7.0, 7, 1.0, 0.0),  # the upper edge itself is inside
    (7.25, 7, 1.0, -0.25),  # rounds to 7 before the clip: inside
    (7.5, 7, 0.0, 7.0),  # rounds to 8: outside
    (9.0, 7, 0.0, 7.0),
    (-8.0, -8, 1.0, 0.0),
    (-8.25, -8, 1.0, 0.25),
    (-8.5, -8, 1.0, 0.5),  # rounds to even, -8: inside, unlike +7.5
    (-8.75, -8, 0.0, -8.0),  # rounds to -9: outside
    (-20.0, -8, 0.0, -8.0),
]


@pytest.mark.parametrize(("v", "code", "d_weight", "d_scale"), HAND_WORKED)
def test_hand_worked_codes_and_gradients(
    v: float, code: int, d_weight: float, d_scale: float
) -> None:
    weight = torch.tensor([[v * STEP]], requires_grad=True)
    theta = torch.tensor([[math.log(STEP)]], requires_grad=True)
    assert stored_scale(theta).item() == STEP

    w_hat = fake_quantize(weight, theta, bits=4, group_size=1)
    w_hat.backward()

    assert quantize(weight, stored_scale(theta), 4, 1).item() == code
    assert w_hat.item() == code * STEP
    assert weight.grad is not None and weight.grad.item() == d_weight
    assert theta.grad is not None and theta.grad.item() == pytest.approx(STEP * d_scale, rel=1e-6)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
        ),
    ],
)
def test_the_stored_scale_is_the_same_on_every_device(device: str) -> None:
    """exp in fp32 is off by a digit here, on one device or another, and bf16 rounds elsewhere."""
    theta = torch.tensor([-3.2457222938537598, -3.0786681175231934, -3.511698007583618])
    expected = torch.tensor([math.exp(value) for value in theta.tolist()]).bfloat16()
    assert torch.equal(stored_scale(theta.to(device)).cpu(), expected)


def test_group_gradient_sums_over_the_group_with_upstream_weights() -> None:
    # Two groups of two: (7.25, -20) and (1.5, 3.25) in units of the step, upstream (2, 3, 5, 7).
    weight = torch.tensor([[7.25, -20.0, 1.5, 3.25]]) * STEP
    weight.requires_grad_()
    theta = torch.full((1, 2), math.log(STEP), requires_grad=True)
    upstream = torch.tensor([[2.0, 3.0, 5.0, 7.0]])
    (fake_quantize(weight, theta, 4, 2) * upstream).sum().backward()
    first = STEP * (2 * -0.25 + 3 * -8)
    second = STEP * (5 * 0.5 + 7 * -0.25)
    assert weight.grad is not None and weight.grad.tolist() == [[2.0, 0.0, 5.0, 7.0]]
    torch.testing.assert_close(theta.grad, torch.tensor([[first, second]]), rtol=1e-6, atol=0)


def test_forward_uses_the_scale_as_a_release_stores_it() -> None:
    theta = torch.tensor([[math.log(0.1003)]])
    stored = torch.tensor(0.1003).bfloat16()
    assert stored.item() != pytest.approx(0.1003, rel=1e-4)  # bf16 does move it
    assert torch.equal(stored_scale(theta).view(()), stored)
    weight = torch.tensor([[0.3]])
    assert fake_quantize(weight, theta, 4, 1).item() == 3 * stored.item()
    with pytest.raises(AssertionError, match="fp32"):
        stored_scale(theta.bfloat16())


def _brute_force(weight: list[float], scale: float, bits: int) -> list[tuple[int, float, float]]:
    """(code, dW_hat/dW, dW_hat/ds) of each weight, scalar by scalar in float64."""
    rows = []
    for w in weight:
        v = w / scale
        nearest = round(v)  # Python rounds halves to even
        if nearest < -(2 ** (bits - 1)):
            rows.append((-(2 ** (bits - 1)), 0.0, float(-(2 ** (bits - 1)))))
        elif nearest > 2 ** (bits - 1) - 1:
            rows.append((2 ** (bits - 1) - 1, 0.0, float(2 ** (bits - 1) - 1)))
        else:
            rows.append((nearest, 1.0, nearest - v))
    return rows


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 9),
    bits=st.sampled_from([2, 3, 4, 8]),
    spread=st.floats(0.1, 4.0),
    seed=st.integers(0, 2**20),
)
def test_odd_shapes_agree_with_brute_force(
    rows: int, groups: int, group_size: int, bits: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # bf16 values: the codes must then be exact, not merely close.
    weight = torch.randn(rows, groups * group_size, generator=generator).bfloat16().float()
    theta = torch.randn(rows, groups, generator=generator) * 0.3
    theta += math.log(spread / 2 ** (bits - 1))
    upstream = torch.randn(weight.shape, generator=generator)
    weight.requires_grad_()
    theta.requires_grad_()
    scale = stored_scale(theta)
    w_hat = fake_quantize(weight, theta, bits, group_size)
    (w_hat * upstream).sum().backward()
    codes = quantize(weight, scale, bits, group_size)

    assert weight.grad is not None and theta.grad is not None
    for o in range(rows):
        for g in range(groups):
            s = scale[o, g].item()
            span = slice(g * group_size, (g + 1) * group_size)
            up = upstream[o, span].double().tolist()
            expected = _brute_force(weight[o, span].tolist(), s, bits)
            assert codes[o, span].tolist() == [code for code, _, _ in expected]
            torch.testing.assert_close(
                w_hat[o, span].detach(),
                torch.tensor([code * s for code, _, _ in expected], dtype=torch.float64).float(),
                rtol=0,
                atol=0,
            )
            assert weight.grad[o, span].tolist() == pytest.approx(
                [u * d for u, (_, d, _) in zip(up, expected, strict=True)]
            )
            total = s * sum(u * d for u, (_, _, d) in zip(up, expected, strict=True))
            # Autograd forms round(v) - v from two terms as large as the codes themselves.
            cancelled = s * 2 ** (bits - 1) * sum(map(abs, up))
            assert theta.grad[o, g].item() == pytest.approx(total, rel=1e-5, abs=1e-6 * cancelled)


def test_dequantize_in_bf16_rounds_once() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).view(2, 128)
    scale = torch.tensor([[0.0123], [0.777]]).bfloat16()
    exact = codes.double() * scale.double()
    # float64 -> float32 is exact here (8-bit code times 8-bit mantissa), so bf16 rounds once.
    assert torch.equal(exact.float().double(), exact)
    assert torch.equal(dequantize(codes, scale, torch.bfloat16), exact.float().bfloat16())


def _brute_force_scale(group: Tensor, bits: int) -> tuple[float, float]:
    """Best (scale, squared error) over the 20 candidates, in float64."""
    values = group.double().tolist()
    qn, qp = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    base = max(abs(v) for v in values) / qp
    best = (math.inf, math.inf)
    for i in range(20):
        s = max((0.3 + i * (1.2 - 0.3) / 19) * base, 1e-8)
        error = sum((min(max(round(v / s), -qn), qp) * s - v) ** 2 for v in values)
        if error < best[1]:
            best = (s, error)
    return best


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_scale_is_the_best_candidate(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    # A heavy-tailed row makes the best candidate differ from max / Qp.
    weight = (torch.randn(6, 3 * 32, generator=generator) ** 3).to(dtype)
    scale = initial_scale(weight, 32, bits)
    assert scale.shape == (6, 3) and scale.dtype == torch.float32
    chosen = set()
    for o in range(6):
        for g in range(3):
            group = weight[o, g * 32 : (g + 1) * 32]
            expected, _ = _brute_force_scale(group, bits)
            assert scale[o, g].item() == pytest.approx(expected, rel=1e-5)
            chosen.add(round(expected / (group.abs().max().item() / (2 ** (bits - 1) - 1)), 3))
    assert len(chosen) > 1


def test_initial_scale_candidates_include_both_ends() -> None:
    # 4 bits. One outlier among many values that 0.3 * max / 7 hits exactly: the low end wins.
    low_end = 0.3 / 7
    weight = torch.cat((torch.tensor([1.0]), torch.full((4095,), low_end))).view(1, -1)
    assert initial_scale(weight, 4096, 4).item() == pytest.approx(low_end, rel=1e-5)
    # A value half as large as the maximum and 3 codes at 1.2 / 7 wide: the high end wins.
    step = 1.2 / 7
    weight = torch.cat((torch.tensor([1.0]), torch.full((4095,), 4 * step))).view(1, -1)
    assert initial_scale(weight, 4096, 4).item() == pytest.approx(step, rel=1e-5)


def test_initial_scale_of_zero_weights_is_the_floor() -> None:
    scale = initial_scale(torch.zeros(2, 8), 4, 4)
    assert scale.tolist() == [[pytest.approx(1e-8)] * 2] * 2
    assert torch.isfinite(torch.log(scale)).all()
