"""Products with packed weights against float64 ones: kernels, torch's operator, blocks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace_core.inference import cpu_products, packed_linear, plans
from grace_core.inference.layout import dealt
from grace_core.inference.packed_linear import BlockedLinear, KernelLinear, OperatorLinear
from grace_core.quantization.packing import pack_codes
from tests.packed_releases import multiplied_out, random_codes, random_scales

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def kernels() -> Any:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU; see test_inference_cuda.py")
    from grace_core.inference import packed_kernels

    return packed_kernels


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_where_the_kernels_look_for_it(bits: int) -> None:
    codes = random_codes(3, 384, bits)
    words = dealt(pack_codes(codes, bits), bits)
    halves = words.view(torch.int16).int().view(3, 3, 8 * bits)  # row, slab of 128 inputs, half
    fields = codes.view(3, 3, 16 // bits, 8 * bits)
    for field in range(16 // bits):
        unsigned = (halves >> (bits * field)) & ((1 << bits) - 1)
        assert torch.equal(unsigned - (1 << (bits - 1)), fields[:, :, field].int())


def error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Largest distance from the exact product, in units of the sum of absolute products."""
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.T.abs() + (0 if bias is None else bias.double().abs())
    return float(((found.double() - exact).abs() / size).max())


@settings(max_examples=8, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("bits", [4, 8])
def test_kernels_multiply(bits: int, data: st.DataObject) -> None:
    """Odd numbers of rows and outputs, parts and steps that the inputs do not fill."""
    module = kernels()
    rows = data.draw(st.integers(1, 37))
    outputs, slabs = data.draw(st.integers(1, 35)), data.draw(st.integers(1, 4))
    groups = data.draw(st.sampled_from([g for g in (1, 2) if slabs % g == 0]))
    codes = random_codes(outputs, slabs * 128, bits)
    scales = random_scales(outputs, slabs // groups)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, slabs * 128, generator=generator)
    bias = torch.randn(outputs, generator=generator) if data.draw(st.booleans()) else None
    plan = module.Plan(
        block_n=data.draw(st.sampled_from([16, 32])),
        parts=data.draw(st.integers(1, 3)),
    )
    found = module.tiles(
        x,
        dealt(pack_codes(codes, bits), bits),
        scales,
        bias,
        plan,
        bits=bits,
        group_size=128 * groups,
    )
    assert found.shape == (plan.parts, rows, outputs) and found.dtype == torch.float32
    assert error(found.double().sum(0), x, multiplied_out(codes, scales), bias) < 1e-6


def test_rows_may_lie_apart() -> None:
    module = kernels()
    codes, scales = random_codes(5, 128, 4), random_scales(5, 1)
    apart = torch.randn(2, 300, generator=torch.Generator().manual_seed(2))[:, 7:135]
    words = dealt(pack_codes(codes, 4), 4)
    plan = module.Plan(block_n=16)
    found = module.tiles(apart, words, scales, None, plan, bits=4, group_size=128)
    assert error(found[0], apart, multiplied_out(codes, scales), None) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_multiplied_out_exactly(bits: int) -> None:
    codes, scales = random_codes(7, 384, bits), random_scales(7, 3)
    found = torch.empty(7, 384)
    words = dealt(pack_codes(codes, bits), bits)
    kernels().expand(words, scales, found, bits=bits, group_size=128)
    assert torch.equal(found.double(), multiplied_out(codes, scales))


Product = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [OperatorLinear, BlockedLinear])
@pytest.mark.parametrize("rows", [1, 3, 5, 40])
def test_linear_layers_of_a_cpu(form: type, dtype: torch.dtype, rows: int) -> None:
    """Of bf16 products the weight is rounded, and the result: 2^-9 each."""
    if form is OperatorLinear and not cpu_products.has_operator():
        pytest.skip("this build of torch has no int4 operator for CPUs, or another order of codes")
    bits = 4
    codes, scales = random_codes(128, 256, bits), random_scales(128, 2)
    words = pack_codes(codes, bits)
    bias = torch.randn(128, generator=torch.Generator().manual_seed(3)).to(dtype)
    layer = packed_linear.make(
        form, words, scales, bias, in_features=256, bits=bits, group_size=128
    )
    x = torch.randn(rows, 2, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = layer(x)
    assert found.shape == (rows, 2, 128) and found.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 2.0**-7
    weight = multiplied_out(codes, scales)
    assert error(found.flatten(0, 1), x.flatten(0, 1), weight, bias) < bound


def test_the_operator_serves_whole_blocks_of_four_bits() -> None:
    if not cpu_products.has_operator():
        pytest.skip("this build of torch has no int4 operator for CPUs, or another order of codes")
    assert packed_linear.form_for(CPU, 128, 256, 4, 128) is OperatorLinear
    assert packed_linear.form_for(CPU, 100, 256, 4, 128) is BlockedLinear
    assert packed_linear.form_for(CPU, 128, 256, 8, 128) is BlockedLinear


def test_a_gpu_takes_kernels_unless_groups_are_small(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    packed_linear._warn.cache_clear()
    cuda = torch.device("cuda")
    assert packed_linear.form_for(cuda, 100, 256, 8, 128) is KernelLinear
    assert not caplog.records
    for _ in range(2):
        assert packed_linear.form_for(cuda, 100, 256, 8, 64) is BlockedLinear
    (record,) = caplog.records
    assert "group size 64" in record.getMessage()


def test_plans_fit_the_kernels() -> None:
    """Sizes of the 2B, 7B and 8B models, every number of rows."""
    for outputs, inputs in ((4096, 2048), (2048, 6144), (22016, 4096), (4096, 11008), (256, 128)):
        for rows in range(1, plans.MOST_ROWS + 1):
            plan = plans.plan_for(rows, outputs, inputs)
            assert plan.parts <= inputs // 128
            assert rows <= plan.block_m >= 8


def test_kernels_compile_for_a_gpu() -> None:
    """Really compiled, for Hopper, without one: in a process where nothing is interpreted."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_kernels"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "spilled: 0" in done.stdout
