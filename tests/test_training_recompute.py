"""Recomputation changes what is kept, never what comes out."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from grace_core.config.training import Training
from grace_core.models.families import decoder_layers, set_trainable
from grace_core.models.kernels import PLAIN
from grace_core.training.memory import later_bytes
from grace_core.training.recompute import (
    choose_recomputed_layers,
    recompute_layers,
    trained_sizes,
)
from grace_core.training.zero import BUCKET_ELEMENTS
from tests.packed_models import PackedModel, packed_model
from tests.tiny_models import FAMILIES

LAYERS = 4


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return packed_model(request.param, tmp_path_factory.mktemp("m"), layers=LAYERS)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_to_the_bit(
    packed: PackedModel, dtype: torch.dtype, fused: bool
) -> None:
    packed = packed.cast(dtype)
    if fused:
        packed = packed.fused(PLAIN)
    expected = packed.states_and_gradients()
    for count in (1, LAYERS):
        recompute_layers(packed.model, packed.family, count)
        found = packed.states_and_gradients()
        assert torch.equal(found.states, expected.states)
        assert found.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert torch.equal(found.gradients[name], gradient), name


@pytest.mark.parametrize("count", [0, 1, LAYERS])
def test_so_many_layers_run_twice(packed: PackedModel, count: int) -> None:
    packed = replace(packed, model=copy.deepcopy(packed.model))
    recompute_layers(packed.model, packed.family, count)
    passes: list[int] = []
    for index, layer in enumerate(decoder_layers(packed.model, packed.family)):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: passes.append(index))
    packed.states_and_gradients()
    assert sorted(passes) == sorted([*range(LAYERS), *range(count)])


def test_a_trained_vision_tower_is_recomputed_too(packed: PackedModel) -> None:
    packed = replace(packed, model=copy.deepcopy(packed.model))
    set_trainable(packed.model, packed.family, "all")
    expected = packed.states_and_gradients()
    recompute_layers(packed.model, packed.family, 1)
    tower = packed.model.get_submodule(packed.family.vision)
    assert any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
    found = packed.states_and_gradients()
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name


def test_the_setting_decides(packed: PackedModel) -> None:
    def chosen(setting: object) -> int:
        training = Training(steps=1, recompute=setting)
        return choose_recomputed_layers(packed.model, packed.family, training, later_bytes=0)

    found = [chosen(setting) for setting in ("none", "all", "auto", 0, 2, 99)]
    assert found == [0, LAYERS, 0, 0, 2, LAYERS], "auto on a CPU recomputes nothing"


def test_gradients_and_moments_are_counted(packed: PackedModel) -> None:
    sizes = trained_sizes(packed.model)
    assert sizes.trained == sum(p.numel() for p in packed.model.parameters() if p.requires_grad)
    assert sizes.weights == sum(p.numel() for p in packed.model.parameters())

    def bytes_of(zero: int, processes: int) -> float:
        training = Training(steps=1, zero_stage=zero)
        found = later_bytes(sizes, training, processes=processes, on_gpu=False)
        return (found - (2 * BUCKET_ELEMENTS if zero == 2 else 0)) / sizes.trained

    # Gradients in bf16 and a partition's in fp32, and two moments in fp32; under ZeRO-1 the fp32
    # gradients are there before.
    assert bytes_of(0, 1) == 2 + 8
    assert bytes_of(1, 2) == pytest.approx(2 + 4, abs=1e-4)
    assert bytes_of(2, 1) == pytest.approx(4 + 8, abs=1e-4)
    assert bytes_of(2, 2) == pytest.approx(2 + 4, abs=1e-4)
