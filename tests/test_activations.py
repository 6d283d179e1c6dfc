"""The estimate of activations against the tensors that autograd keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grace_core.models.activations import LayerActivations, layer_activations, layers_to_recompute
from grace_core.models.families import FAMILIES as DATA
from grace_core.models.families import decoder_layers
from tests.packed_models import packed_model
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_estimate_counts_what_autograd_keeps(name: str, tmp_path: Path) -> None:
    packed = packed_model(name, tmp_path)
    decoder = packed.model.get_submodule(packed.family.decoder)
    tokens = sum(packed.row.samples.lengths)
    config = packed.model.config.get_text_config()
    states = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
    angles = decoder.rotary_emb(states, packed.row.position_ids)
    shared = {t.untyped_storage().data_ptr() for t in (*angles, *packed.model.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layer = decoder_layers(packed.model, packed.family)[1]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(states, position_embeddings=angles, segments=packed.row.samples)
    estimate = layer_activations(config, packed.family, fused=False, element_bytes=4)
    assert output.requires_grad
    assert sum(kept.values()) == pytest.approx(tokens * estimate.kept, rel=0.01)
    assert estimate.recomputed == 4 * config.hidden_size


def test_a_layer_of_qwen3_vl_2b_worked_by_hand() -> None:
    config = SimpleNamespace(
        hidden_size=2048,
        intermediate_size=6144,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    # bf16: two norms' inputs and outputs 4 * 2048; queries 2048 and keys 1024, each before its
    # norm and turned; values 1024; attention's output 2048; gate, up and product 3 * 6144. fp32:
    # a scale for two norms and 24 heads, log-sum-exps of 16 heads.
    elements = 8192 + 2 * (2048 + 1024) + 1024 + 2048 + 18432
    expected = 2 * elements + 4 * (2 + 24 + 16)
    found = layer_activations(config, DATA["qwen3_vl"], fused=True)
    assert (found.kept, found.recomputed) == (expected, 4096)


@given(
    layers=st.integers(1, 40),
    tokens=st.integers(1, 10_000),
    free=st.integers(-10, 10**10),
)
def test_the_fewest_layers_are_recomputed(layers: int, tokens: int, free: int) -> None:
    each = LayerActivations(kept=70_000, recomputed=4_000)

    def taken(count: int) -> int:
        return tokens * (max(layers - count, 1) * each.kept + count * each.recomputed)

    count, bytes_taken = layers_to_recompute(layers, tokens, each, free)
    assert bytes_taken == taken(count)
    assert bytes_taken <= free or count == layers
    assert all(taken(fewer) > free for fewer in range(count))
