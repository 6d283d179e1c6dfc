"""DeepSpeed's settings follow from ours."""

from __future__ import annotations

from typing import Any

import pytest

from grace_core.config.training import Training
from grace_core.training.zero import deepspeed_settings


def settings(
    processes: int = 2, device: Any = "cpu", quantized: bool = False, **training: Any
) -> dict[str, Any]:
    training = {"steps": 1, "rows_per_step": 8, **training}
    return deepspeed_settings(
        Training(**training), processes=processes, device=device, quantized=quantized
    )


@pytest.mark.parametrize(
    ("rows", "processes", "accumulation"), [(8, 1, 8), (8, 2, 4), (8, 8, 1), (6, 3, 2), (1, 1, 1)]
)
def test_rows_are_shared_out(rows: int, processes: int, accumulation: int) -> None:
    found = settings(processes, rows_per_step=rows)
    assert found["train_batch_size"] == rows
    assert found["train_micro_batch_size_per_gpu"] == 1
    assert found["gradient_accumulation_steps"] == accumulation
    assert rows == processes * accumulation


@pytest.mark.parametrize(
    ("stage", "accumulated_in"), [(0, "bf16"), (1, "fp32"), (2, "fp32"), (3, "fp32")]
)
def test_each_stage(stage: int, accumulated_in: str) -> None:
    found = settings(zero_stage=stage)
    assert found["zero_optimization"]["stage"] == stage
    assert found["bf16"] == {"enabled": True}
    assert found["data_types"] == {"grad_accum_dtype": accumulated_in}
    assert "fp16" not in found
    # The loop owns both: a second writer would fight it.
    assert "scheduler" not in found and "optimizer" not in found


def test_what_is_passed_on() -> None:
    found = settings(max_grad_norm=0.75, zero3_persistence_elements=123)
    assert found["gradient_clipping"] == 0.75
    assert found["zero_optimization"]["stage3_param_persistence_threshold"] == 123


@pytest.mark.parametrize(("device", "overlaps"), [("cpu", False), ("cuda", True)])
def test_communication_overlaps_on_gpus_only(device: str, overlaps: bool) -> None:
    assert settings(device=device)["zero_optimization"]["overlap_comm"] is overlaps


def test_it_is_a_pure_function() -> None:
    training = Training(steps=1, rows_per_step=8)
    how: dict[str, Any] = dict(processes=2, device="cpu", quantized=False)
    first = deepspeed_settings(training, **how)
    first["zero_optimization"]["stage"] = 99
    assert deepspeed_settings(training, **how) == settings()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_reduced_in_fp32_where_scales_need_it(stage: int) -> None:
    def reduced_in(processes: int, quantized: bool) -> Any:
        found = settings(processes, quantized=quantized, zero_stage=stage)
        return found["communication_data_type"]

    assert reduced_in(2, quantized=True) == ("fp32" if stage in (1, 2) else None)
    assert reduced_in(1, quantized=True) is reduced_in(2, quantized=False) is None


def test_rows_that_cannot_be_shared_out_are_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="validated"):
        settings(processes=3)
