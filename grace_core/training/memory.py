"""What a GPU holds at the peak of a training, worked out from sizes alone, without torch or a GPU.

Mixed-precision Adam keeps 4 + 4 + 4 bytes of fp32 weights and both moments for every trained
weight, and ZeRO divides parts of the whole by the number of ranks (Rajbhandari et al. 2020, arXiv
1910.02054, section 3.1). What comes on top is read from DeepSpeed 0.19.8's sources (named below by
their files in `deepspeed/runtime`) and from ours; `tests/test_training_memory.py` compares it with
what trainings allocate on a CPU, `grace bench memory` on a GPU.

Amounts are upper bounds where they depend on the samples: rows are full, and every token of a row
is supervised or belongs to a picture. Left out: gaps between allocations, the teacher's forward
pass, which takes less than the student's, and a trained vision tower's (`trainable: all`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grace_core.config.training import Training
from grace_core.models.activations import LayerActivations, layer_activations
from grace_core.models.families import Family
from grace_core.training.zero import GATHERED_ELEMENTS, QUANTIZED_ONCE_STAGES, Reduction

BF16, FP32, FP64 = 2, 4, 8

ADAM = 3 * FP32
"""Bytes of fp32 weights and both moments."""

SCALE_BYTES = 6 * FP32 + BF16
"""Of one scale: theta, its gradient, two moments, two temporaries of its step; as it is stored."""

LIBRARIES = 1e9
"""Bytes of CUDA's context, cuBLAS and NCCL on each GPU: what they commonly take, not measured."""

_STATES_OUTSIDE_LAYERS = 12
"""Of the decoder's width, for every token: embeddings, final norm, what the losses read."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What a decoder's activations depend on."""

    layers: int
    width: int
    mlp_width: int
    vocabulary: int
    layer: LayerActivations

    @staticmethod
    def of(text_config: Any, family: Family, *, fused: bool) -> Decoder:
        """By the decoder's configuration; `fused` as `layer_activations` takes it."""
        return Decoder(
            layers=text_config.num_hidden_layers,
            width=text_config.hidden_size,
            mlp_width=text_config.intermediate_size,
            vocabulary=text_config.vocab_size,
            layer=layer_activations(text_config, family, fused=fused),
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The model that is trained, in numbers of weights."""

    weights: int
    trained: int
    largest: int
    """Of the trained tensors."""

    quantized: int = 0
    group_size: int = 128
    decoder: Decoder | None = None
    """None where it is not known; passes are then not counted."""


@dataclass(frozen=True, kw_only=True)
class FrozenTeacher:
    """The model that teaches, in numbers of weights."""

    weights: int
    head: int = 0
    """Of the head's matrix; 0 where it is not known."""

    shards: int = 1
    """Ranks over which the weights are divided."""

    @property
    def held(self) -> float:
        """Bytes of a rank's share."""
        return BF16 * self.weights / self.shards

    @property
    def gathered(self) -> float:
        """Bytes that are whole at one time while the teacher computes, at most."""
        return _gathered(self.weights) if self.shards > 1 else 0.0

    @property
    def gathered_head(self) -> float:
        """Bytes of the head where it is whole in the student's forward pass alone."""
        return float(BF16 * self.head) if self.shards > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU."""

    held: dict[str, float]
    """From the first optimizer step on, at all times."""

    moments: dict[str, float] = field(default_factory=dict)
    """What comes on top, at one moment or another."""

    @property
    def state(self) -> float:
        """What is always held."""
        return sum(self.held.values())

    @property
    def peak(self) -> float:
        return self.state + max(self.moments.values(), default=0.0)


TEACHER, WEIGHTS, QUANTIZED = "teacher's weights", "trained model's weights", "W_hat and scales"
GRADIENTS, OPTIMIZER, ROWS = "gradients", "fp32 weights and moments", "rows of a step"
TEACHER_PASS = "teacher's pass"
FORWARD, BACKWARD, STEP = "forward pass", "backward pass", "optimizer's step"


def training_memory(
    model: Trained,
    training: Training,
    *,
    processes: int,
    teacher: FrozenTeacher | None = None,
    row_bytes: int = 0,
    recomputed: int | None = None,
    on_gpu: bool = True,
) -> Memory:
    """What one rank of a training holds.

    Args:
        model: the student, or the teacher that is fitted.
        processes: ranks that ZeRO divides by.
        row_bytes: of a token of a row, on the device for the length of a step: its pixels, or the
            teacher's final state.
        recomputed: decoder layers; None: as `training.recompute` says, all of them under `auto`.
        on_gpu: communication overlaps computation there.
    """
    stage, share = training.zero_stage, 1 / processes
    rows = training.rows_per_step // processes
    held = {
        TEACHER: teacher.held if teacher is not None else 0.0,
        WEIGHTS: BF16 * model.weights * (share if stage == 3 else 1.0),
        QUANTIZED: _quantized(model, stage),
        GRADIENTS: model.trained * _gradient_bytes(stage, share),
        OPTIMIZER: ADAM * model.trained * (share if stage >= 1 else 1.0),
        ROWS: float(rows * training.row_tokens * row_bytes),
    }
    reduction = Reduction.of(training, processes=processes, quantized=bool(model.quantized))
    if stage == 3:
        held[GRADIENTS] += reduction.elements * reduction.element_bytes
    moments = {STEP: _step(model, stage, share, reduction)}
    if model.decoder is not None:
        passes = _Passes(model, model.decoder, training, reduction, recomputed, on_gpu)
        forward = passes.forward() + (teacher.gathered_head if teacher is not None else 0.0)
        moments = {FORWARD: forward, BACKWARD: passes.backward(), **moments}
    if teacher is not None and teacher.gathered:
        moments = {TEACHER_PASS: teacher.gathered, **moments}
    return Memory(held=held, moments=moments)


def recording_memory(teacher: FrozenTeacher) -> Memory:
    """What one rank holds while the teacher's outputs are recorded; activations are not counted."""
    moments = {TEACHER_PASS: teacher.gathered} if teacher.gathered else {}
    return Memory(held={TEACHER: teacher.held}, moments=moments)


def later_bytes(
    model: Trained,
    training: Training,
    *,
    processes: int,
    on_gpu: bool = True,
) -> int:
    """Bytes that a rank takes only from the first step on, activations apart.

    DeepSpeed makes fp32 weights when it is given the model, and under ZeRO-1 and -3 the fp32
    gradients too.
    """
    stage, share = training.zero_stage, 1 / processes
    moments = 2 * FP32 * model.trained * (share if stage >= 1 else 1.0)
    gradients = {0: BF16, 1: BF16, 2: FP32 * share, 3: 0}[stage] * model.trained
    reduction = Reduction.of(training, processes=processes, quantized=bool(model.quantized))
    passes = _bucket_bytes(stage, reduction, on_gpu)
    if stage == 3:
        passes += _gathered(model.weights)
    return int(moments + gradients + passes)


def recomputed_layers(training: Training, layers: int) -> int:
    """Decoder layers that the setting recomputes; all of them where it depends on the GPU."""
    setting = training.recompute
    if isinstance(setting, int):
        return min(setting, layers)
    return 0 if setting == "none" else layers


def _quantized(model: Trained, stage: int) -> float:
    w_hat = BF16 * model.quantized if stage in QUANTIZED_ONCE_STAGES else 0
    return w_hat + SCALE_BYTES * model.quantized / model.group_size


def _gradient_bytes(stage: int, share: float) -> float:
    """Of one trained weight, at the end of a backward pass.

    0: the parameters' own. 1: these, and an fp32 sum of all (bf16_optimizer.py). 2 and 3: an fp32
    sum of the partition (zero/stage_1_and_2.py, zero/stage3.py).
    """
    return {0: BF16, 1: BF16 + FP32, 2: FP32 * share, 3: FP32 * share}[stage]


def _step(model: Trained, stage: int, share: float, reduction: Reduction) -> float:
    """Temporaries between the last backward pass and the next forward pass.

    AdamW takes one of the size of what it steps (the root of the second moment, `foreach`).
    """
    if stage == 0:
        return 2.0 * FP32 * model.trained  # fp32 gradients are made for the step
    own = model.trained * share
    if stage == 1:
        # Sums are cast to be reduced, one parameter's gradient to be added to them.
        cast = reduction.element_bytes * model.trained if reduction.element_bytes != FP32 else 0
        return max(FP32 * own, cast, FP32 * model.largest)
    if stage == 2:
        return max(FP32 * own, FP64 * min(model.largest, own))  # norms are taken in fp64
    return 2.0 * FP32 * min(own, GATHERED_ELEMENTS)  # gradients are laid side by side, in groups


def _bucket_bytes(stage: int, reduction: Reduction, on_gpu: bool) -> float:
    """ZeRO-2's buckets hold bf16 gradients, two of them where communication overlaps."""
    return float(BF16 * reduction.elements * (1 + on_gpu)) if stage == 2 else 0.0


def _gathered(weights: int) -> float:
    """Bytes that ZeRO-3 has whole at one time, at most."""
    return float(BF16 * min(GATHERED_ELEMENTS, weights))


class _Passes:
    """A row's forward and backward pass through the trained model."""

    def __init__(
        self,
        model: Trained,
        decoder: Decoder,
        training: Training,
        reduction: Reduction,
        recomputed: int | None,
        on_gpu: bool,
    ) -> None:
        self.decoder, self.stage = decoder, training.zero_stage
        self.tokens = training.row_tokens
        self.recomputed = (
            recomputed_layers(training, decoder.layers) if recomputed is None else recomputed
        )
        self.logits_bytes = training.logits_mib * 2**20
        self.head = decoder.vocabulary * decoder.width
        self.per_layer = max(1, (model.trained - self.head) // decoder.layers)
        self.trained = model.trained
        self.reduction = reduction
        self.fixed = _gathered(model.weights) if self.stage == 3 else 0.0
        self.bucket_bytes = _bucket_bytes(self.stage, reduction, on_gpu)

    def forward(self) -> float:
        """Its end, when both heads' logits exist chunk by chunk (:mod:`..losses.fused_head`)."""
        logits = self.tokens * self.decoder.vocabulary * BF16 * 1.2  # a fifth of it the teacher's
        gradient = float(BF16 * self.head)
        if logits > self.logits_bytes:  # summed over chunks in fp32, then rounded
            losses = FP32 * self.head + max(self.logits_bytes, gradient)
        else:
            losses = logits + gradient
        return self.fixed + self._kept(0) + losses

    def backward(self) -> float:
        """The largest of its beginning, its first reduction and its end."""
        held = self.fixed + self.bucket_bytes
        head, layer = BF16 * self.head, self.decoder.layer
        working = self.tokens * 2 * BF16 * (self.decoder.mlp_width + self.decoder.width)
        if self.recomputed == self.decoder.layers:
            working += self.tokens * layer.kept
        begins = self._kept(0) + head + working
        # The embeddings' gradient joins the head's, or is another one.
        ends = 2.0 * head
        if self.stage < 2:
            return held + max(begins, ends)
        full = min(self.reduction.elements, self.trained)
        reduced = BF16 * full
        if self.reduction.element_bytes == FP32:
            first = last = reduced + FP32 * full
        else:
            # The result is added to an fp32 sum parameter by parameter.
            first = reduced + FP32 * self.decoder.mlp_width * self.decoder.width
            last = reduced + FP32 * self.head
        done = full // self.per_layer
        return held + max(begins, self._kept(done) + head + first, ends, last)

    def _kept(self, done: int) -> float:
        """Activations when so many layers have been through the backward pass, from the last."""
        left = max(0, self.decoder.layers - done)
        recomputed = min(self.recomputed, left)
        layer = self.decoder.layer
        of_layers = (left - recomputed) * layer.kept + recomputed * layer.recomputed
        outside = _STATES_OUTSIDE_LAYERS * BF16 * self.decoder.width
        return float(self.tokens * (of_layers + outside))
