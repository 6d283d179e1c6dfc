"""Fused forward passes against the library's own, on the CPU; on a GPU see test_models_cuda.py."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.activations import ACT2FN

from grace_core.models import kernels
from grace_core.models.families import decoder_layers
from grace_core.models.fused_forward import choose_forward, use_fused_forward
from grace_core.models.kernels import PLAIN
from tests.packed_models import PackedModel, packed_model
from tests.tiny_models import FAMILIES


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return packed_model(request.param, tmp_path_factory.mktemp("m"))


def test_fused_modules_compute_what_the_librarys_do(packed: PackedModel) -> None:
    """fp32; the only differences are the order of sums and where a norm's weight is applied."""
    plain = packed.states_and_gradients()
    fused = packed.fused(PLAIN)
    assert any(
        "forward" in vars(layer.self_attn) for layer in decoder_layers(fused.model, fused.family)
    )
    found = fused.states_and_gradients()
    torch.testing.assert_close(found.states, plain.states, atol=2e-5, rtol=1e-5)
    assert found.gradients.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_bf16_gradients_are_no_further_from_fp32_than_the_plain_ones(packed: PackedModel) -> None:
    exact = packed.states_and_gradients()
    plain = packed.cast(torch.bfloat16)
    fused = plain.fused(PLAIN)
    assert fused.distance_from(exact) <= 1.2 * plain.distance_from(exact)


def test_other_models_of_the_class_stay_as_they_are(packed: PackedModel) -> None:
    before = packed.states_and_gradients()
    fused = packed.fused(PLAIN)
    assert list(fused.model.state_dict()) == list(packed.model.state_dict())
    after = packed.states_and_gradients()
    assert torch.equal(after.states, before.states)
    assert not any("forward" in vars(module) for module in packed.model.modules())


def test_a_copy_of_a_fused_model_uses_its_own_weights(packed: PackedModel) -> None:
    fused = packed.fused(PLAIN)
    twin = copy.deepcopy(fused)
    before = twin.states_and_gradients().states
    with torch.no_grad():
        for parameter in fused.model.parameters():
            parameter.zero_()
    assert torch.equal(twin.states_and_gradients().states, before)


def test_the_plain_forward_is_kept_on_the_cpu(packed: PackedModel) -> None:
    for choice in ("auto", "plain"):
        model = copy.deepcopy(packed.model)
        choose_forward(model, packed.family, choice)
        assert not any("forward" in vars(module) for module in model.modules())


def test_an_unknown_structure_keeps_its_forward_and_says_so(
    packed: PackedModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(packed.model)
    odd = decoder_layers(model, packed.family)[1].mlp
    odd.act_fn = ACT2FN["gelu"]
    with caplog.at_level(logging.WARNING):
        use_fused_forward(model, packed.family, PLAIN)
    assert "forward" not in vars(odd)
    assert type(odd).__name__ in caplog.text and "the device is cpu" in caplog.text


def test_without_liger_the_reason_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    kernels.best_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert kernels.best_kernels() is PLAIN
        assert kernels.best_kernels() is PLAIN
    kernels.best_kernels.cache_clear()
    assert len(caplog.records) == 1 and "extra `gpu`" in caplog.text


@pytest.mark.parametrize("width", [32, 72])
@pytest.mark.parametrize("states, angles", [("float32", "float32"), ("bfloat16", "float32")])
def test_ligers_rotary_kernel_equals_its_twin(width: int, states: str, angles: str) -> None:
    """Interpreted on the CPU, which must be asked for before Triton is imported."""
    pytest.importorskip("triton", reason="needs Triton")
    pytest.importorskip("liger_kernel", reason="needs Liger-Kernel")
    script = Path(__file__).with_name("interpreted_rotary.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(width), states, angles],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
