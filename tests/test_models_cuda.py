"""Fused forward passes on a GPU against the library's own there.

pytest tests/test_models_cuda.py -s     # also prints the counts of kernel starts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grace_core.models.activations import layer_activations
from grace_core.models.families import decoder_layers
from grace_core.models.forward import row_states
from grace_core.models.fused_forward import choose_forward
from grace_core.models.kernels import PLAIN, best_kernels
from grace_core.models.packed_attention import attend, attend_each, flash_obstacle
from grace_core.models.segments import Segments
from grace_core.training.recompute import recompute_layers
from tests.packed_models import PackedModel, packed_model
from tests.tiny_models import FAMILIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """cuDNN rounds fp32 convolutions to TF32 unless told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """fp32, with the library's forward passes."""
    return packed_model(request.param, tmp_path_factory.mktemp("m")).to(DEVICE)


def cross_entropy(packed: PackedModel) -> float:
    with torch.no_grad():
        states = row_states(packed.model, packed.family, packed.row).predicting
        logits = packed.model.lm_head(states).float()
    return float(F.cross_entropy(logits, packed.row.labels))


@pytest.mark.parametrize("rows, width", [(40_000, 128), (2100, 2048), (1031, 4104)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    """Against fp64; bf16 no further from it than torch's own backward pass."""
    torch.manual_seed(0)
    x = (3 * torch.randn(rows, width, device=DEVICE)).to(dtype).requires_grad_()
    weight = (1 + 0.3 * torch.randn(width, device=DEVICE)).to(dtype).requires_grad_()
    gradient = torch.randn(rows, width, device=DEVICE).to(dtype)
    inputs = {"exact": [t.detach().double().requires_grad_() for t in (x, weight)]}
    inputs |= {"torch": [x, weight], "fused": [x, weight]}
    found = {}
    for name, (of, by) in inputs.items():
        norm = best_kernels().rms_norm if name == "fused" else PLAIN.rms_norm
        normed = norm(of, by, 1e-6)
        if name == "fused":
            assert type(normed.grad_fn).__name__ == "LongRMSNormBackward"
        gradients = torch.autograd.grad(normed, (of, by), gradient.to(of.dtype))
        found[name] = [normed.detach(), *gradients]
    for exact, of_torch, fused in zip(*found.values(), strict=True):
        assert fused.dtype == dtype
        errors = [float((one.double() - exact).norm()) for one in (of_torch, fused)]
        assert errors[1] <= 1.2 * errors[0] + 1e-6 * float(exact.norm()), errors


def test_every_kernel_is_at_hand(packed: PackedModel) -> None:
    """Else the tests below would compare plain with plain."""
    assert best_kernels() is not PLAIN, "install the extra `gpu`"
    assert flash_obstacle(DEVICE, torch.bfloat16, 72) is None
    model = packed.cast(torch.bfloat16).model
    choose_forward(model, packed.family, "auto")
    assert all("forward" in vars(layer.mlp) for layer in decoder_layers(model, packed.family))


def test_fp32_agrees(packed: PackedModel) -> None:
    plain, fused = packed.states_and_gradients(), packed.fused(best_kernels())
    found = fused.states_and_gradients()
    torch.testing.assert_close(found.states, plain.states, atol=5e-5, rtol=1e-4)
    for name, gradient in plain.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
    assert cross_entropy(fused) == pytest.approx(cross_entropy(packed), rel=1e-5)


def test_bf16_is_as_close_to_fp32_as_the_plain_forward(packed: PackedModel) -> None:
    exact = packed.states_and_gradients()
    plain = packed.cast(torch.bfloat16)
    fused = plain.fused(best_kernels())
    assert fused.distance_from(exact) <= 1.2 * plain.distance_from(exact)
    assert cross_entropy(fused) == pytest.approx(cross_entropy(plain), rel=1e-3)


def test_recomputation_changes_nothing(packed: PackedModel) -> None:
    """Flash attention's backward pass adds up in no fixed order, so not to the bit on a GPU."""
    fused = packed.cast(torch.bfloat16).fused(best_kernels())
    expected = fused.states_and_gradients()
    recompute_layers(fused.model, fused.family, 3)
    found = fused.states_and_gradients()
    assert torch.equal(found.states, expected.states)
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-6, name


def test_no_pass_halts_the_host(packed: PackedModel) -> None:
    fused = packed.cast(torch.bfloat16).fused(best_kernels())
    recompute_layers(fused.model, fused.family, 1)
    fused.states_and_gradients()  # compiles kernels, fills the caches of each picture's grid
    weights = torch.ones((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            row_states(fused.model, fused.family, fused.row)
        states = row_states(fused.model, fused.family, fused.row)
        (torch.cat([states.predicting, *states.visual]).float().sum() * weights).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fewer_kernels_are_started(packed: PackedModel) -> None:
    plain = packed.cast(torch.bfloat16)
    before, after = kernel_starts(plain), kernel_starts(plain.fused(best_kernels()))
    print(f"\n{packed.family.model_type}: {before} kernels started plain, {after} fused")
    assert after < 0.8 * before


def kernel_starts(packed: PackedModel) -> int:
    packed.states_and_gradients()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        packed.states_and_gradients()
    names = ("cudaLaunchKernel", "cuLaunchKernel")
    found = sum(event.name.startswith(names) for event in profile.events())
    if found == 0:
        pytest.skip("the profiler sees no kernel starts on this machine")
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width, heads, kv_heads", [(128, 16, 8), (72, 16, 16), (64, 4, 4)])
def test_one_flash_call_equals_a_call_a_segment(
    causal: bool, width: int, heads: int, kv_heads: int
) -> None:
    segments = Segments.of([300, 1, 7, 196]).moved(lambda tensor: tensor.to(DEVICE))
    tokens = sum(segments.lengths)
    torch.manual_seed(0)

    def made(count: int) -> Tensor:
        return torch.randn(tokens, count, width, device=DEVICE)

    inputs = [made(heads), made(kv_heads), made(kv_heads)]
    outer = made(heads)

    def outcome(function: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        found = function(*leaves, segments, scale=width**-0.5, causal=causal)
        return [
            x.float() for x in (found, *torch.autograd.grad(found, leaves, outer.to(found.dtype)))
        ]

    exact = outcome(attend_each, torch.float32)
    plain, flash = outcome(attend_each, torch.bfloat16), outcome(attend, torch.bfloat16)
    for expected, other, found in zip(exact, plain, flash, strict=True):
        assert (found - expected).norm() <= 1.2 * (other - expected).norm() + 1e-6


def test_a_row_equals_its_samples_alone(packed: PackedModel) -> None:
    """Attention of one call stays within samples: another sample's tokens change nothing."""
    fused = packed.cast(torch.bfloat16).fused(best_kernels())
    row = fused.row
    with torch.no_grad():
        before = row_states(fused.model, fused.family, row).predicting
        ids = row.input_ids.clone()
        first = row.samples.lengths[0]
        ids[0, 0] += 1  # a token of the first sample
        changed = replace(fused, row=replace(row, input_ids=ids))
        after = row_states(changed.model, changed.family, changed.row).predicting
    elsewhere = (row.predicting >= first).cpu()
    assert torch.equal(before.cpu()[elsewhere], after.cpu()[elsewhere])
    assert not torch.equal(before.cpu()[~elsewhere], after.cpu()[~elsewhere])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_estimate_of_activations_is_what_the_gpu_keeps(name: str, tmp_path: Path) -> None:
    packed = packed_model(name, tmp_path, hidden=512).to(DEVICE).cast(torch.bfloat16)
    packed = packed.fused(best_kernels())
    config = packed.model.config.get_text_config()
    segments = Segments.of([1024] * 4).moved(lambda tensor: tensor.to(DEVICE))
    positions = torch.arange(4096, device=DEVICE)[None]
    if packed.family.positions == "multimodal":
        positions = positions.expand(3, 1, -1)
    states = torch.randn(1, 4096, config.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    states.requires_grad_()
    decoder = packed.model.get_submodule(packed.family.decoder)
    angles = decoder.rotary_emb(states, positions)
    layer = decoder_layers(packed.model, packed.family)[0]
    layer(states, position_embeddings=angles, segments=segments)  # compiles
    before = torch.cuda.memory_allocated()
    output = layer(states, position_embeddings=angles, segments=segments)
    kept = torch.cuda.memory_allocated() - before
    # The layer's input was there before; its output is the next layer's input.
    assert output.shape == states.shape
    estimate = 4096 * layer_activations(config, packed.family, fused=True).kept
    assert kept == pytest.approx(estimate, rel=0.05)
