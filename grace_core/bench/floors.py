"""The least time a row of the table can take: operations and bytes, counted from the shapes.

A floor is what cannot be avoided: matrix products at the measured rate of a large dense one, plus
bytes at the measured rate of a large copy, where each input is read once and each output written
once. What overlaps or stays in caches could beat the sum; what is launched late or read twice adds
to it.

Operations are multiplications and additions. A forward pass of a matrix product of N tokens with a
weight of P numbers is 2 N P, its backward pass twice that (one product for the input, one for the
weight). Causal attention of n tokens takes half of the full one's 4 n^2 (heads x head dim).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grace_core.bench.shapes import Shapes

BF16 = 2
"""Bytes of a number."""

THETA_BYTES = 4


@dataclass(frozen=True)
class Work:
    """What a row must do, by part: operations and bytes."""

    operations: Mapping[str, float] = field(default_factory=dict)
    moved: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        return Work({**self.operations, **other.operations}, {**self.moved, **other.moved})

    def times(self, factor: float) -> Work:
        """The same so many times."""
        return Work(
            {name: factor * value for name, value in self.operations.items()},
            {name: factor * value for name, value in self.moved.items()},
        )


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best, measured in the same run."""

    operations_per_second: float
    """Of a large bf16 matrix product (fp32 on a device without a fast bf16 one)."""

    bytes_per_second: float
    """Read and written by a large copy within the device's memory."""

    def milliseconds(self, work: Work) -> float:
        """The floor of this work."""
        return 1e3 * (
            sum(work.operations.values()) / self.operations_per_second
            + sum(work.moved.values()) / self.bytes_per_second
        )


@dataclass(frozen=True)
class ModelWork:
    """Operations of one forward pass of a model over packed samples, by part."""

    decoder: float
    attention: float
    head: float
    vision: float
    connector: float
    """The merger, which is trained."""

    deepstack: float
    """The frozen mergers of Qwen3-VL's deepstack."""

    @staticmethod
    def of(
        config: Any, shapes: Shapes, samples: int, *, head_tokens: int | None = None
    ) -> ModelWork:
        """Count them.

        Args:
            config: a Qwen3-VL configuration.
            samples: packed samples, each attending to itself alone.
            head_tokens: positions that get logits; without, the supervised ones.
        """
        text, vision = config.text_config, config.vision_config
        tokens = samples * shapes.sample_tokens
        patches = samples * shapes.patches
        if head_tokens is None:
            head_tokens = samples * shapes.supervised_tokens
        wide = vision.hidden_size * vision.spatial_merge_size**2
        merger = 2 * samples * shapes.visual_tokens * wide * (wide + vision.out_hidden_size)
        block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
        patch_numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return ModelWork(
            decoder=2.0 * tokens * decoder_weights(config),
            attention=2.0
            * samples
            * shapes.sample_tokens**2
            * text.num_attention_heads
            * text.head_dim
            * text.num_hidden_layers,
            head=2.0 * head_tokens * text.vocab_size * text.hidden_size,
            vision=2.0 * patches * (vision.depth * block + patch_numbers * vision.hidden_size)
            + 4.0 * samples * shapes.patches**2 * vision.hidden_size * vision.depth,
            connector=float(merger),
            deepstack=float(merger) * len(vision.deepstack_visual_indexes),
        )

    def forward(self, name: str) -> Work:
        """One forward pass."""
        return Work({f"{name} {part}": value for part, value in vars(self).items()})

    def training(self, name: str, *, recomputed: bool) -> Work:
        """Forward and backward pass; the vision tower and the deepstack mergers are frozen.

        recomputed: the decoder's forward pass is made a second time in the backward pass.
        """
        passes = {"vision": 1, "deepstack": 1, "connector": 3, "head": 3}
        decoder = 4 if recomputed else 3
        return Work(
            {f"{name} {part}": passes.get(part, decoder) * n for part, n in vars(self).items()}
        )


def decoder_weights(config: Any) -> int:
    """Numbers in the decoder layers' projections: those that GRACE quantizes."""
    text = config.text_config
    attention = 2 * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    return int(text.num_hidden_layers * text.hidden_size * (attention + 3 * text.intermediate_size))


def step(shapes: Shapes, samples: int, *, recomputed: bool = False) -> Work:
    """One GRACE micro-batch: the teacher forward, the student forward and backward.

    Logits at supervised positions only, no optimizer, nothing quantized.
    """
    teacher = ModelWork.of(shapes.config("teacher"), shapes, samples)
    student = ModelWork.of(shapes.config("student"), shapes, samples)
    return teacher.forward("teacher") + student.training("student", recomputed=recomputed)


def fake_quantization(weights: int, group_size: int) -> Work:
    """Once per optimizer step: W_hat of all layers, and the map of its gradient to (W, theta).

    W_hat reads W and theta and writes W_hat; the map reads W, theta and the gradient, and writes
    the weights' gradient and theta's. All bf16 but theta and its gradient.
    """
    theta = THETA_BYTES * weights / group_size
    return Work(
        moved={
            "W_hat": 2 * BF16 * weights + theta,
            "map of the gradient": 3 * BF16 * weights + 2 * theta,
        }
    )


def distillation(tokens: int, vocabulary: int, *, sweeps: int = 3) -> Work:
    """GDKD from logits, forward and backward: bf16 sweeps over tokens x vocabulary.

    Three are the least: both models' logits read and the gradient written. Without room to keep a
    row of logits between the normalisers and the gradient it is five: both are read twice.
    """
    return Work(moved={"logits": float(sweeps * BF16 * tokens * vocabulary)})


def heads(shapes: Shapes, tokens: int) -> Work:
    """Cross-entropy and GDKD from final states: products of both heads, forward and backward."""
    teacher, student = (shapes.config(role).text_config for role in ("teacher", "student"))
    student_head = 2.0 * tokens * student.vocab_size * student.hidden_size
    return Work(
        {
            "teacher head": 2.0 * tokens * teacher.vocab_size * teacher.hidden_size,
            "student head": 3 * student_head,
        }
    )


def adamw(parameters: int) -> Work:
    """One step of AdamW on fp32 weights and moments, from fp32 gradients to bf16 weights."""
    read, written = 4 * 4, 3 * 4 + BF16
    return Work(moved={"AdamW": float(parameters * (read + written))})
