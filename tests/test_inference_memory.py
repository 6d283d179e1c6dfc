"""What packed weights take beside BF16 ones at published shapes, without any weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaConfig, PretrainedConfig

from grace_core.bench.decode import model_bytes
from grace_core.bench.shapes import real_config
from grace_core.inference import packed_linear
from grace_core.inference.packed_linear import KernelLinear
from grace_core.models.families import family_of
from grace_core.quantization.convert import quantizable_linears

META = torch.device("meta")
GROUP = 128


def llava_7b() -> LlavaConfig:
    """LLaVA-1.5-7B: Vicuna 7B and CLIP ViT-L/14 at 336 pixels, as published."""
    return LlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32064,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    )


def model_of(config: PretrainedConfig) -> Any:
    with META:
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "bits", "most"),
    [
        (real_config("student"), 4, 0.52),
        (real_config("student"), 8, 0.69),
        (llava_7b(), 4, 0.34),
        (llava_7b(), 8, 0.56),
    ],
    ids=["2b-w4", "2b-w8", "llava-7b-w4", "llava-7b-w8"],
)
def test_share_of_bf16(config: PretrainedConfig, bits: int, most: float) -> None:
    model = model_of(config)
    dense = model_bytes(model)
    for name, linear in quantizable_linears(model, family_of(config.model_type).decoder).items():
        outputs, inputs = linear.weight.shape
        packed = packed_linear.make(
            KernelLinear,
            torch.empty(outputs, inputs * bits // 32, dtype=torch.int32, device=META),
            torch.empty(outputs, inputs // GROUP, dtype=torch.bfloat16, device=META),
            None,
            in_features=inputs,
            bits=bits,
            group_size=GROUP,
        )
        model.set_submodule(name, packed)
    assert model_bytes(model) <= most * dense
