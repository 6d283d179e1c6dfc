"""The toy teacher and student: small `Qwen3VLForConditionalGeneration` models.

Teacher about 5 M parameters with an output head of its own, student about 1 M with tied embeddings,
as Qwen3-VL-8B and -2B. All in-features of the decoder's linear layers are multiples of 128, so that
group-128 quantization fits. Patches are 8x8 pixels, merged 2x2: a 64x64 picture gives 16 visual
tokens.
"""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from grace_core.toy.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VOCABULARY_SIZE,
    save_tokenizer,
    shared_tokenizer,
)

Role = Literal["teacher", "student"]

PATCH_SIZE, MERGE_SIZE = 8, 2
MIN_PIXELS, MAX_PIXELS = 64 * 64, 128 * 128
"""Pictures are scaled to between 16 and 64 visual tokens."""

_TEXT: dict[Role, dict[str, Any]] = {
    "teacher": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "student": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
_VISION: dict[Role, dict[str, Any]] = {
    "teacher": {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_heads": 4,
        "deepstack_visual_indexes": [0, 1, 2],
    },
    "student": {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "deepstack_visual_indexes": [1, 2],
    },
}


def build_config(role: Role) -> Qwen3VLConfig:
    """Architecture of the role, token ids of the toy tokenizer."""
    ids = {
        token: shared_tokenizer().convert_tokens_to_ids(token)
        for token in (*(IM_END, END_OF_TEXT, IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END),)
    }
    tied = role == "student"
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tied,
            "eos_token_id": ids[IM_END],
            "pad_token_id": ids[END_OF_TEXT],
            **_TEXT[role],
        },
        vision_config={
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "num_position_embeddings": 64,
            "out_hidden_size": _TEXT[role]["hidden_size"],
            **_VISION[role],
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=tied,
    )


def build_model(role: Role, *, seed: int) -> Qwen3VLForConditionalGeneration:
    """The role's model with random fp32 weights drawn from the seed.

    Matrices get a standard deviation of 1/sqrt(in-features), those that write to the residual
    stream less by the depth; the library's 0.02 for all suits wide models and is slow here.
    """
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(build_config(role)).float()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d) and name != "lm_head":
            fan_in = module.weight[0].numel()
            depth = 2 * max(len(model.model.language_model.layers), len(model.model.visual.blocks))
            writes = name.endswith((".o_proj", ".down_proj", "attn.proj", "mlp.linear_fc2"))
            nn.init.normal_(module.weight, std=(fan_in * (depth if writes else 1)) ** -0.5)
    return model


def image_processor_settings() -> dict[str, Any]:
    """Content of preprocessor_config.json, the same for both roles."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": MERGE_SIZE,
        "patch_size": PATCH_SIZE,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "temporal_patch_size": 2,
    }


def save_checkpoint(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Write a complete Hugging Face directory: bf16 weights, tokenizer, template, image processor.

    The model's own weights are left as they are.
    """
    config = model.config
    stored = copy.deepcopy(model).cpu().to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        max_new_tokens=64,
    )
    stored.save_pretrained(folder)
    save_tokenizer(folder)
    text = json.dumps(image_processor_settings(), indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
