"""DeepSpeed's settings, derived from ours so that no value is written twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from grace_core.config.training import Training

QUANTIZED_ONCE_STAGES = (1, 2)
"""ZeRO stages under which weights are quantized once an optimizer step, else in every pass.

They have whole weights on every rank and accumulate gradients in fp32: stage 0 does so in bf16, and
under stage 3 weights are whole within a layer's own passes only.
"""

BUCKET_ELEMENTS = 500_000_000
"""Gradients that are reduced together (DeepSpeed's default)."""

GATHERED_ELEMENTS = 1_000_000_000
"""Weights that ZeRO-3 may have whole at one time, and steps together (DeepSpeed's defaults)."""


@dataclass(frozen=True)
class Reduction:
    """How gradients are reduced."""

    elements: int
    element_bytes: int
    """Of what is sent: 2 in bf16, 4 in fp32."""

    @staticmethod
    def of(training: Training, *, processes: int, quantized: bool) -> Reduction:
        exact = _sent_in_fp32(training, processes=processes, quantized=quantized)
        return Reduction(BUCKET_ELEMENTS, 4 if exact else 2)


def deepspeed_settings(
    training: Training, *, processes: int, device: Literal["cpu", "cuda"], quantized: bool
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    A micro-batch is one packed row. Gradients are summed by us (losses are already divided by the
    global counts), so DeepSpeed's averaging is undone by the caller. Learning rates are set by the
    loop, step by step, hence no scheduler here.
    """
    assert training.rows_per_step % processes == 0, "validated with the configuration"
    # Without ZeRO DeepSpeed accumulates in the parameters' own dtype and refuses another.
    accumulation = "bf16" if training.zero_stage == 0 else "fp32"
    exact = _sent_in_fp32(training, processes=processes, quantized=quantized)
    return {
        "train_batch_size": training.rows_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": training.rows_per_step // processes,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": accumulation},
        "communication_data_type": "fp32" if exact else None,
        "zero_optimization": {
            "stage": training.zero_stage,
            "overlap_comm": device == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "sub_group_size": GATHERED_ELEMENTS,
            "stage3_max_live_parameters": GATHERED_ELEMENTS,
            "stage3_param_persistence_threshold": training.zero3_persistence_elements,
        },
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def sharded_teacher_settings(training: Training, *, processes: int, device: str) -> dict[str, Any]:
    """The dictionary for a frozen teacher whose weights are divided over the ranks."""
    return {
        "train_batch_size": processes,  # DeepSpeed asks for it, and nothing is made of it
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": device == "cuda",
            "stage3_max_live_parameters": GATHERED_ELEMENTS,
            "stage3_param_persistence_threshold": training.zero3_persistence_elements,
            # It would replace torch's linear function in the student too.
            "memory_efficient_linear": False,
        },
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _sent_in_fp32(training: Training, *, processes: int, quantized: bool) -> bool:
    """Whether gradients are reduced in fp32.

    The scales' gradient is made of the reduced one, which DeepSpeed would round to bf16, and must
    not depend on how rows are shared out among ranks.
    """
    return quantized and training.zero_stage in QUANTIZED_ONCE_STAGES and processes > 1
