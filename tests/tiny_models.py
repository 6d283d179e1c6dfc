"""Tiny random vision-language models of each supported family, and complete checkpoints of them.

Every input size of a quantized layer is a multiple of 128. The vision towers are deliberately
narrower, so that a quantizer that strays into them fails.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from grace_core.toy.checkpoints import image_processor_settings
from grace_core.toy.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    SPECIAL_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VOCABULARY_SIZE,
    save_tokenizer,
    shared_tokenizer,
)

DECODER = "model.language_model"
PATCH = 8
MERGE = 2
LLAVA_PICTURE = 32
"""Side of LLaVA's fixed picture in pixels: (32 / 8)^2 = 16 image tokens."""


def _text(hidden: int, layers: int, vocab: int) -> dict[str, object]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index(IM_END),
        "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    }


SPECIAL_IDS = {
    "image_token_id": SPECIAL_TOKENS.index(IMAGE_PAD),
    "video_token_id": SPECIAL_TOKENS.index(VIDEO_PAD),
    "vision_start_token_id": SPECIAL_TOKENS.index(VISION_START),
    "vision_end_token_id": SPECIAL_TOKENS.index(VISION_END),
}
"""The toy tokenizer numbers its special tokens from 0; `save_tiny` checks that."""


def tiny_qwen3_vl(
    seed: int = 0, hidden: int = 128, layers: int = 4, vocab: int = VOCABULARY_SIZE
) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL with tied embeddings and two deepstack mergers, fp32."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 6, 6]}
    config = Qwen3VLConfig(
        text_config={
            **_text(hidden, layers, vocab),
            "head_dim": 32,
            "rope_parameters": {**rope, "mrope_interleaved": True},
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "deepstack_visual_indexes": [1, 2],
            "out_hidden_size": hidden,
            "num_position_embeddings": 64,
        },
        tie_word_embeddings=True,
        **SPECIAL_IDS,
    )
    return _seeded(Qwen3VLForConditionalGeneration, config, seed)


def tiny_qwen2_vl(
    seed: int = 0, hidden: int = 128, layers: int = 4, vocab: int = VOCABULARY_SIZE
) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL with tied embeddings and biases in q, k and v, fp32."""
    config = Qwen2VLConfig(
        text_config={
            **_text(hidden, layers, vocab),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": hidden,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
        tie_word_embeddings=True,
        **SPECIAL_IDS,
    )
    return _seeded(Qwen2VLForConditionalGeneration, config, seed)


def tiny_llava(
    seed: int = 0, hidden: int = 128, layers: int = 4, vocab: int = VOCABULARY_SIZE
) -> LlavaForConditionalGeneration:
    """LLaVA-1.5, a CLIP vision tower before a Llama decoder with its own ``lm_head``, fp32."""
    config = LlavaConfig(
        text_config={"model_type": "llama", **_text(hidden, layers, vocab)},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "patch_size": PATCH,
            "image_size": LLAVA_PICTURE,
            "projection_dim": 64,
        },
        image_token_index=SPECIAL_IDS["image_token_id"],
        image_seq_length=(LLAVA_PICTURE // PATCH) ** 2,
    )
    return _seeded(LlavaForConditionalGeneration, config, seed)


FAMILIES = {"qwen3_vl": tiny_qwen3_vl, "qwen2_vl": tiny_qwen2_vl, "llava": tiny_llava}


def _seeded(kind: type, config: object, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config)
        # The usual initialisation leaves biases and norms constant; errors there would not show.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def save_weights(model: PreTrainedModel, folder: Path) -> Path:
    """Write config and weights only, in bf16; the given model is left as it is."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_tiny(model: PreTrainedModel, folder: Path) -> Path:
    """Write a complete checkpoint: bf16 weights, byte-level tokenizer, chat template, processor."""
    ids = shared_tokenizer().convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(SPECIAL_TOKENS)))
    save_weights(model, folder)
    save_tokenizer(folder)
    settings = image_processor_settings()
    if model.config.model_type == "llava":
        settings = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": LLAVA_PICTURE},
            "crop_size": {"height": LLAVA_PICTURE, "width": LLAVA_PICTURE},
        }
    else:
        assert (settings["patch_size"], settings["merge_size"]) == (PATCH, MERGE)
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return folder


def text_batch(model: PreTrainedModel, tokens: int = 12, rows: int = 2) -> dict[str, torch.Tensor]:
    """Random text without image tokens."""
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(len(SPECIAL_TOKENS), vocab, (rows, tokens), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def image_batch(model: PreTrainedModel, side: int = 32) -> dict[str, torch.Tensor]:
    """One row of text around one random picture of ``side`` pixels (LLaVA: always 32)."""
    config = model.config
    generator = torch.Generator().manual_seed(2)
    batch: dict[str, torch.Tensor] = {}
    if config.model_type == "llava":
        batch["pixel_values"] = torch.randn(1, 3, LLAVA_PICTURE, LLAVA_PICTURE, generator=generator)
        num_tokens = config.image_seq_length
    else:
        grid = side // PATCH
        batch["pixel_values"] = torch.randn(grid * grid, 3 * 2 * PATCH * PATCH, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, grid, grid]])
        num_tokens = (grid // MERGE) ** 2
    vocab = config.get_text_config().vocab_size
    text = torch.randint(len(SPECIAL_TOKENS), vocab, (10,), generator=generator)
    image = torch.full((num_tokens,), config.image_token_id)
    input_ids = torch.cat((text[:4], image, text[4:])).unsqueeze(0)
    batch["input_ids"] = input_ids
    batch["attention_mask"] = torch.ones_like(input_ids)
    if config.model_type != "llava":
        batch["mm_token_type_ids"] = (input_ids == config.image_token_id).int()
    return batch
