"""This rank's share of the accumulated gradients, where DeepSpeed keeps them until the step.

After the last backward pass of an accumulation cycle gradients are summed over rows and ranks and
neither clipped nor measured yet. Where they are then depends on the ZeRO stage (DeepSpeed 0.19):

    1   in fp32 buffers on every rank, whole: each parameter's `_hp_grad`
    2   in fp32, for this rank's partition: fragments that each parameter's `_hp_mapping` finds

Shares are wanted under these stages only, see :mod:`grace_core.training.zero`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grace_core.quantization.straight_through import GradientShare
from grace_core.training.zero import QUANTIZED_ONCE_STAGES


@dataclass(frozen=True)
class GradientShares:
    """What this rank holds of some parameters' gradients."""

    shares: list[GradientShare | None]
    """One for each parameter, None where nothing of it is held."""

    copies: int
    """Number of ranks on which the same element is held."""


def gradient_shares(engine: Any, parameters: Sequence[Tensor], processes: int) -> GradientShares:
    """The shares of `parameters`, between the last backward pass and the step.

    They may be changed in place: DeepSpeed clips and steps what it finds there.
    """
    stage = engine.zero_optimization_stage()
    assert stage in QUANTIZED_ONCE_STAGES, f"ZeRO stage {stage} keeps no such shares"
    assert engine.is_gradient_accumulation_boundary(), "the gradients are not complete yet"
    if stage == 1:
        return GradientShares([_whole(parameter) for parameter in parameters], processes)
    return GradientShares([_fragment(parameter) for parameter in parameters], 1)


def _whole(parameter: Tensor) -> GradientShare:
    gradient = getattr(parameter, "_hp_grad", None)
    assert gradient is not None and gradient.numel() == parameter.numel(), (
        "DeepSpeed's BF16_Optimizer left no whole fp32 gradient; use another DeepSpeed or ZeRO 2"
    )
    return GradientShare(0, gradient.view(-1))


def _fragment(parameter: Tensor) -> GradientShare | None:
    assert hasattr(parameter, "_hp_mapping"), (
        "DeepSpeed did not map this parameter to its partition; use another DeepSpeed or ZeRO 1"
    )
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    where = mapping.lp_fragment_address
    # DeepSpeed sets it on parameters with a mapping; a type checker cannot see it.
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
    assert gradient.numel() == where.numel, (
        f"DeepSpeed keeps {gradient.numel()} elements of a gradient where {where.numel} are meant"
    )
    return GradientShare(where.start, gradient.view(-1))
