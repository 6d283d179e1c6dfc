"""The quantized layer against its composed twin, and the scale bank that stays fp32."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grace_core.errors import GraceError
from grace_core.quantization.linear import QuantizedLinear
from grace_core.quantization.lsq import fake_quantize, initial_scale
from grace_core.quantization.scales import ScaleBank


def _layer(
    out_features: int = 6,
    in_features: int = 32,
    *,
    bits: int = 4,
    group_size: int = 16,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[QuantizedLinear, ScaleBank]:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    # Scales well below the best ones push a good part of the weights outside.
    theta = torch.log(initial_scale(linear.weight, group_size, bits)) - 0.5
    bank = ScaleBank({"layer": theta})
    return QuantizedLinear(linear, bank.layer("layer"), bits=bits, group_size=group_size), bank


def _twin(layer: QuantizedLinear, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the plain composition, on copies of all inputs."""
    x = x.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    theta = layer.theta.detach().clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    y = nn.functional.linear(x, fake_quantize(weight, theta, layer.bits, layer.group_size), bias)
    y.backward(upstream)
    results = {"y": y.detach(), "x": x.grad, "weight": weight.grad, "theta": theta.grad}
    if bias is not None:
        results["bias"] = bias.grad
    return {name: value for name, value in results.items() if value is not None}


def _own(layer: QuantizedLinear, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    results = {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "theta": layer.theta.grad}
    if layer.bias is not None:
        results["bias"] = layer.bias.grad
    return {name: value for name, value in results.items() if value is not None}


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    out_features=st.integers(1, 9),
    groups=st.integers(1, 3),
    group_size=st.integers(1, 8),
    bits=st.sampled_from([4, 8]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_composed_twin(
    leading: list[int],
    out_features: int,
    groups: int,
    group_size: int,
    bits: int,
    bias: bool,
    seed: int,
) -> None:
    in_features = groups * group_size
    layer, _ = _layer(
        out_features, in_features, bits=bits, group_size=group_size, bias=bias, seed=seed
    )
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(*leading, in_features, generator=generator)
    upstream = torch.randn(*leading, out_features, generator=generator)
    expected, actual = _twin(layer, x, upstream), _own(layer, x, upstream)
    assert expected.keys() == actual.keys()
    assert torch.equal(expected["y"], actual["y"])
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_bf16_layer_keeps_theta_and_its_gradient_in_fp32() -> None:
    layer, _ = _layer(64, 256, group_size=128, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    upstream = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected, actual = _twin(layer, x, upstream), _own(layer, x, upstream)
    assert torch.equal(expected["y"], actual["y"])
    assert actual["theta"].dtype == torch.float32
    assert actual["weight"].dtype == actual["x"].dtype == torch.bfloat16
    # The twin rounds its group sums' terms the same way: both start from the bf16 dW_hat.
    torch.testing.assert_close(actual["theta"], expected["theta"], rtol=1e-3, atol=1e-3)
    for name in ("x", "weight", "bias"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1.6e-2, atol=1e-2)


def test_hand_worked_layer() -> None:
    # One output, one group of three at s = 0.5: v = (1.5, 7.5, -9) gives codes (2, 7, -8).
    linear = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.75, 3.75, -4.5]]))
    bank = ScaleBank({"layer": torch.log(torch.tensor([[0.5]]))})
    layer = QuantizedLinear(linear, bank.layer("layer"), bits=4, group_size=3)
    x = torch.tensor([[1.0, 10.0, 100.0]], requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor([[2.0]]))
    assert y.item() == 1.0 + 35.0 - 400.0
    assert layer.codes().tolist() == [[2, 7, -8]]
    assert x.grad is not None and x.grad.tolist() == [[2.0, 7.0, -8.0]]
    assert layer.weight.grad is not None and layer.weight.grad.tolist() == [[2.0, 0.0, 0.0]]
    # 0.5 * (2 * 0.5 + 20 * 7 + 200 * -8)
    assert bank.flat.grad is not None and bank.flat.grad.tolist() == [pytest.approx(-729.5)]


def test_backward_reads_the_weight_again_rather_than_a_copy() -> None:
    """ZeRO-3 frees ``weight.data`` between the passes and gathers it into new storage."""
    layer, _ = _layer()
    x = torch.randn(3, 32)
    upstream = torch.randn(3, 6)
    expected = _twin(layer, x, upstream)
    x.requires_grad_()
    y = layer(x)
    whole = layer.weight.data.clone()
    layer.weight.data = torch.empty(0)
    layer.weight.data = whole
    y.backward(upstream)
    torch.testing.assert_close(x.grad, expected["x"])
    torch.testing.assert_close(layer.weight.grad, expected["weight"])


def test_keeps_nothing_of_the_weights_size_for_the_backward_pass() -> None:
    layer, _ = _layer(64, 128)
    x = torch.randn(3, 128, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    owned = {x.data_ptr(), layer.weight.data_ptr(), layer.theta.data_ptr()}
    assert kept and {tensor.data_ptr() for tensor in kept} <= owned


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)))
def test_any_input_may_be_frozen(frozen: tuple[bool, bool, bool]) -> None:
    layer, _ = _layer()
    x = torch.randn(2, 32)
    upstream = torch.randn(2, 6)
    expected = _twin(layer, x, upstream)
    tensors = {"x": x, "weight": layer.weight, "theta": layer.theta}
    for (_, tensor), fixed in zip(tensors.items(), frozen, strict=True):
        tensor.requires_grad_(not fixed)
    layer.theta.grad = None
    layer(x).backward(upstream)
    for (name, tensor), fixed in zip(tensors.items(), frozen, strict=True):
        if fixed:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected[name])


def test_without_gradients() -> None:
    layer, _ = _layer()
    x = torch.randn(2, 32)
    with torch.no_grad():
        assert not layer(x).requires_grad
        no_grad = layer(x)
    with torch.inference_mode():
        inference = layer(x)
    assert torch.equal(no_grad, layer(x).detach())
    assert torch.equal(no_grad, inference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(dtype: torch.dtype) -> None:
    def run(checkpointed: bool) -> list[Tensor]:
        first, bank_1 = _layer(32, 32, dtype=dtype, seed=1)
        second, bank_2 = _layer(32, 32, dtype=dtype, seed=2)
        block = nn.Sequential(first, nn.GELU(), second)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
        x.requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        assert isinstance(y, Tensor)
        y.float().square().sum().backward()
        grads = [x.grad, bank_1.flat.grad, bank_2.flat.grad, *(p.grad for p in block.parameters())]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
        return [y.detach(), *(grad for grad in grads if grad is not None)]

    for plain, checkpointed in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, checkpointed)


# --- the scale bank -------------------------------------------------------------------------------


def _bank() -> ScaleBank:
    return ScaleBank({"a": torch.randn(3, 2), "b": torch.randn(1, 5), "c": torch.randn(4, 1)})


def test_flat_tensor_and_layers_share_values_and_gradients() -> None:
    bank = _bank()
    assert bank.flat.shape == (15,) and isinstance(bank.flat, nn.Parameter)
    assert all(bank.layer(name).is_leaf and bank.layer(name).requires_grad for name in bank)
    (2 * bank.layer("a").sum() + 3 * bank.layer("c").sum()).backward()
    bank.layer("c").sum().backward()
    assert bank.flat.grad is not None
    assert bank.flat.grad.tolist() == [2.0] * 6 + [0.0] * 5 + [4.0] * 4

    with torch.no_grad():
        bank.flat.mul_(0).add_(torch.arange(15))
    assert bank.layer("b").tolist() == [[6.0, 7.0, 8.0, 9.0, 10.0]]

    bank.zero_grad()
    assert bank.flat.grad.abs().sum() == 0
    bank.layer("b").sum().backward()
    assert bank.flat.grad.sum() == 5


def test_zero_grad_mends_a_dropped_gradient() -> None:
    bank = _bank()
    torch.optim.AdamW([bank.flat]).zero_grad(set_to_none=True)
    assert bank.flat.grad is None
    bank.zero_grad()
    bank.layer("a").sum().backward()
    assert bank.flat.grad is not None and bank.flat.grad.sum() == 6


def test_adamw_on_the_flat_tensor_equals_adamw_on_separate_ones() -> None:
    bank = _bank()
    separate = {name: value.clone().requires_grad_() for name, value in bank.state_dict().items()}
    flat_optimizer = torch.optim.AdamW([bank.flat], lr=0.1, weight_decay=0.0)
    separate_optimizer = torch.optim.AdamW(separate.values(), lr=0.1, weight_decay=0.0)
    for step in range(3):
        bank.zero_grad()
        separate_optimizer.zero_grad()
        for name, tensor in separate.items():
            ((tensor - step) ** 2).sum().backward()
            ((bank.layer(name) - step) ** 2).sum().backward()
        flat_optimizer.step()
        separate_optimizer.step()
    for name, tensor in separate.items():
        torch.testing.assert_close(bank.layer(name), tensor)


def test_changing_scales_between_the_passes_is_refused() -> None:
    layer, bank = _layer()
    y = layer(torch.randn(2, 32))
    with torch.no_grad():
        bank.flat.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_casting_or_moving_the_model_leaves_the_bank_alone() -> None:
    layer, bank = _layer()
    model = nn.Sequential(layer)
    before = bank.state_dict()["layer"]
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert not list(model.named_buffers()) and "0.theta" not in model.state_dict()
    for cast in (nn.Module.bfloat16, nn.Module.half, nn.Module.float):
        cast(model)
    model.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.theta is bank.layer("layer") and layer.theta.dtype == torch.float32
    assert torch.equal(layer.theta, before)
    layer(torch.randn(2, 32).bfloat16()).sum().backward()
    assert bank.flat.grad is not None and bank.flat.grad.abs().sum() > 0


def test_a_deep_copy_trains_scales_of_its_own() -> None:
    layer, bank = _layer()
    twin = copy.deepcopy(layer)
    twin(torch.randn(2, 32)).sum().backward()
    assert twin.theta.grad is not None and twin.theta.grad.abs().sum() > 0
    assert bank.flat.grad is not None and bank.flat.grad.abs().sum() == 0
    assert twin.theta.dtype == torch.float32 and torch.equal(twin.theta, layer.theta)
    with pytest.raises(TypeError, match="load_state_dict"):
        copy.deepcopy(bank)


def test_state_round_trip_is_exact_and_does_not_alias() -> None:
    bank, other = _bank(), _bank()
    state = bank.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other.flat, bank.flat)
    with torch.no_grad():
        bank.flat.zero_()
    assert state["a"].abs().sum() > 0


def test_state_that_does_not_fit_is_refused_whole() -> None:
    bank = _bank()
    before = bank.flat.detach().clone()
    state = bank.state_dict()
    state["a"] = torch.zeros(2, 3)
    state["b"] = torch.zeros(1, 5).bfloat16()
    del state["c"]
    state["d"] = torch.zeros(1, 1)
    with pytest.raises(GraceError) as caught:
        bank.load_state_dict(state)
    for part in (
        "a: shape (2, 3), expected (3, 2)",
        "b: dtype",
        "c: missing",
        "d: not a quantized",
    ):
        assert part in str(caught.value)
    assert torch.equal(bank.flat, before)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
        ),
    ],
)
def test_moving_the_bank_keeps_every_reference(device: str) -> None:
    layer, bank = _layer()
    flat, leaf, before = bank.flat, layer.theta, bank.state_dict()["layer"].to(device)
    layer(torch.randn(2, 32)).sum().backward()
    assert flat.grad is not None
    gradient = flat.grad.clone()
    bank.to(device)
    assert bank.flat is flat and bank.layer("layer") is leaf is layer.theta
    assert leaf.device.type == flat.device.type == device and torch.equal(leaf, before)
    assert flat.grad is not None and torch.equal(flat.grad, gradient.to(device))
    bank.zero_grad()
    layer.to(device)(torch.randn(2, 32, device=device)).sum().backward()
    assert flat.grad.abs().sum() > 0
    with torch.no_grad():
        flat.add_(1.0)
    assert torch.equal(leaf, before + 1.0)
