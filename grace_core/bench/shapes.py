"""What the bench computes: the real models' shapes, or tiny ones for a test on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import Qwen3VLConfig

from grace_core.toy.checkpoints import MAX_PIXELS, MERGE_SIZE, PATCH_SIZE, Role, build_config

ShapesName = Literal["real", "toy"]

REAL_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
"""Control tokens of Qwen's published tokenizer, by the names that the toy tokenizer shares."""

_REAL_TEXT: dict[Role, dict[str, Any]] = {
    "teacher": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "student": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
}
_REAL_VISION: dict[Role, dict[str, Any]] = {
    "teacher": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    "student": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}


def real_config(role: Role) -> Qwen3VLConfig:
    """Qwen3-VL-8B (teacher, untied head) or -2B (student, tied), as published."""
    tied = role == "student"
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151_936,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tied,
            "eos_token_id": REAL_TOKENS["<|im_end|>"],
            "pad_token_id": REAL_TOKENS["<|endoftext|>"],
            **_REAL_TEXT[role],
        },
        vision_config={
            "num_heads": 16,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "out_hidden_size": _REAL_TEXT[role]["hidden_size"],
            **_REAL_VISION[role],
        },
        image_token_id=REAL_TOKENS["<|image_pad|>"],
        video_token_id=REAL_TOKENS["<|video_pad|>"],
        vision_start_token_id=REAL_TOKENS["<|vision_start|>"],
        vision_end_token_id=REAL_TOKENS["<|vision_end|>"],
        tie_word_embeddings=tied,
    )


GROUP_SIZE = 128
"""Weights to a scale, in every row that quantizes."""


@dataclass(frozen=True)
class Shapes:
    """Models and amounts of one bench."""

    name: ShapesName
    picture_side: int
    """Pixels; every sample has one square picture."""

    prompt_tokens: int
    supervised_tokens: int
    samples: int
    """Of the rows named after the whole step."""

    micro_samples: int
    """Of the published recipe's micro-batch."""

    accumulation: int
    """Micro-batches of an optimizer step, in the rows that spread something over it."""

    loss_tokens: int
    """Supervised tokens of the rows that measure losses alone."""

    step_rows: int
    """Packed rows a process of the row with the optimizer."""

    @property
    def patch_size(self) -> int:
        return 16 if self.name == "real" else PATCH_SIZE

    @property
    def merge_size(self) -> int:
        return 2 if self.name == "real" else MERGE_SIZE

    def config(self, role: Role) -> Qwen3VLConfig:
        """The role's configuration."""
        return real_config(role) if self.name == "real" else build_config(role)

    @property
    def patches(self) -> int:
        """Of a picture, before merging."""
        return (self.picture_side // self.patch_size) ** 2

    @property
    def visual_tokens(self) -> int:
        """Of a picture, after merging."""
        return self.patches // self.merge_size**2

    @property
    def sample_tokens(self) -> int:
        """Two vision markers, the picture, the prompt and the answer."""
        return 2 + self.visual_tokens + self.prompt_tokens + self.supervised_tokens


REAL = Shapes(
    "real",
    picture_side=448,
    prompt_tokens=50,
    supervised_tokens=250,
    samples=16,
    micro_samples=2,
    accumulation=16,
    loss_tokens=4096,
    step_rows=4,
)
TOY = Shapes(
    "toy",
    picture_side=64,
    prompt_tokens=5,
    supervised_tokens=9,
    samples=4,
    micro_samples=2,
    accumulation=3,
    loss_tokens=64,
    step_rows=2,
)
SHAPES: dict[ShapesName, Shapes] = {"real": REAL, "toy": TOY}

assert TOY.picture_side**2 <= MAX_PIXELS, "the toy image processor would shrink it"
