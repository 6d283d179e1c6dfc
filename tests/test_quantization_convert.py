"""Which layers are taken in each family, and that conversion changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from grace_core.errors import GraceError
from grace_core.models.families import family_of
from grace_core.quantization.checkpoint import is_quantized, load_scales, save_scales
from grace_core.quantization.convert import (
    check_group_size,
    convert,
    convert_with_scales,
    quantizable_linears,
)
from grace_core.quantization.linear import QuantizedLinear
from grace_core.quantization.lsq import fake_quantize, initial_scale
from tests.tiny_models import DECODER, FAMILIES, image_batch, tiny_llava, tiny_qwen3_vl


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_decoder_projections_are_quantized(family: str) -> None:
    model = FAMILIES[family](layers=3)
    assert family_of(model.config.model_type).decoder == DECODER
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    state = list(model.state_dict())
    bank = convert(model, decoder_prefix=DECODER, bits=4, group_size=128)

    expected = {
        f"model.language_model.layers.{layer}.{projection}"
        for layer in range(3)
        for projection in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    }
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(quantized) == set(bank) == expected
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert {name: module.training for name, module in model.named_modules()} == training
    assert list(model.state_dict()) == state
    for name, layer in quantized.items():
        assert layer.theta is bank.layer(name)
        assert torch.equal(bank.layer(name), torch.log(initial_scale(layer.weight, 128, 4)))


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_a_model_with_the_fake_quantized_weights(family: str) -> None:
    model, twin = FAMILIES[family](), FAMILIES[family]()
    bank = convert(model, decoder_prefix=DECODER, bits=4, group_size=128)
    with torch.no_grad():
        for name in bank:
            weight = twin.get_parameter(f"{name}.weight")
            weight.copy_(fake_quantize(weight, bank.layer(name), 4, 128))
        batch = image_batch(model)
        logits, expected = model(**batch).logits, twin(**batch).logits
        plain = FAMILIES[family]()(**batch).logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, plain, atol=1e-3)


def test_every_layer_receives_gradients_through_gradient_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny_qwen3_vl().train()
        bank = convert(model, decoder_prefix=DECODER, bits=4, group_size=128)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = image_batch(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        for name in bank:
            grad = bank.layer(name).grad
            assert grad is not None and grad.abs().sum() > 0, name
        weight = model.get_parameter(f"{next(iter(bank))}.weight")
        grads.append((bank.flat.grad, weight.grad))
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-8)


def test_all_layers_that_do_not_fit_are_listed_at_once() -> None:
    linears = {
        "fits": nn.Linear(256, 3),
        "first": nn.Linear(200, 5),
        "second": nn.Linear(64, 7),
    }
    with pytest.raises(GraceError) as caught:
        check_group_size(linears, 128)
    message = str(caught.value)
    assert "first: 200 -> 5, 200 = 1 x 128 + 72" in message
    assert "second: 64 -> 7, 64 = 0 x 128 + 64" in message
    assert "2 of 3 layers" in message and "fits:" not in message
    check_group_size({"fits": linears["fits"]}, 128)


def test_a_model_that_does_not_fit_is_left_alone() -> None:
    model = tiny_llava(hidden=64)
    with pytest.raises(GraceError, match="28 layers"):
        convert(model, decoder_prefix=DECODER, bits=4, group_size=256)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_nothing_to_quantize_is_an_error_that_names_the_lists() -> None:
    with pytest.raises(GraceError, match=r"model\.language_model\.layers") as caught:
        quantizable_linears(tiny_qwen3_vl(layers=1), "model.decoder")
    assert "model.decoder.layers.<number>" in str(caught.value)


def test_saved_scales_rebuild_the_same_model(tmp_path: Path) -> None:
    model = tiny_qwen3_vl()
    bank = convert(model, decoder_prefix=DECODER, bits=4, group_size=128)
    with torch.no_grad():
        bank.flat.add_(torch.randn_like(bank.flat) * 0.1)
    assert not is_quantized(tmp_path)
    save_scales(tmp_path, bank, bits=4, group_size=128)
    assert is_quantized(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "quantization.json",
        "scales.safetensors",
    ]
    trained = load_scales(tmp_path)
    assert (trained.bits, trained.group_size) == (4, 128)
    assert list(trained.scales) == list(bank)

    twin = tiny_qwen3_vl()
    twin_bank = convert_with_scales(twin, trained.scales, bits=4, group_size=128)
    assert torch.equal(twin_bank.flat, bank.flat)
    batch = image_batch(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, twin(**batch).logits)


def test_scales_of_another_model_are_refused() -> None:
    model = tiny_qwen3_vl(layers=2)
    scales = {
        f"{DECODER}.layers.0.mlp.up_proj": torch.zeros(256, 1),
        f"{DECODER}.layers.1.mlp.up_proj": torch.zeros(256, 2),
        f"{DECODER}.layers.2.mlp.up_proj": torch.zeros(256, 1),
    }
    with pytest.raises(GraceError) as caught:
        convert_with_scales(model, scales, bits=4, group_size=128)
    message = str(caught.value)
    assert "layers.1.mlp.up_proj: scales of shape (256, 2) do not fit 128 -> 256" in message
    assert "layers.2.mlp.up_proj: the model has no such linear layer" in message
    assert "layers.0" not in message


def test_damaged_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match=r"no quantization\.json"):
        load_scales(tmp_path)
    model = tiny_qwen3_vl(layers=1)
    bank = convert(model, decoder_prefix=DECODER, bits=8, group_size=128)
    save_scales(tmp_path, bank, bits=8, group_size=128)

    description = (tmp_path / "quantization.json").read_text()
    (tmp_path / "quantization.json").write_text(description.replace("q_proj", "z_proj"))
    with pytest.raises(GraceError, match="name different layers"):
        load_scales(tmp_path)
    (tmp_path / "quantization.json").write_text(description)

    whole = (tmp_path / "scales.safetensors").read_bytes()
    (tmp_path / "scales.safetensors").write_bytes(whole[:-100])
    with pytest.raises(GraceError, match="damaged"):
        load_scales(tmp_path)

    with torch.no_grad():
        bank.flat[0] = torch.nan
    save_scales(tmp_path, bank, bits=8, group_size=128)
    with pytest.raises(GraceError, match="finite"):
        load_scales(tmp_path)
