"""What a vision tower would otherwise work out from its pictures' grids on the device.

Positions and interpolation weights depend on each picture's grid alone. Made here on the host, once
for each grid, and kept on the device, they cost a forward pass one concatenation; the library's own
way reads the grids back from the device, which halts the host until all work before is done.
The keys are those that `transformers.vision_utils` documents, with the prefix `image_`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from grace_core.models.segments import Segments
from grace_core.models.visual_inputs import Grid


def vision_arguments(
    tower: Any, grids: list[Grid], frames: Segments, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of `get_image_features` for a tower that takes grids.

    Args:
        tower: the vision tower (Qwen2-VL's or Qwen3-VL's).
        grids: of all pictures, in order.
        frames: patches of each frame, on `device`; attention stays within a frame.
    """
    arguments: dict[str, Any] = {
        "image_cu_seqlens": frames.cumulative,
        "image_max_seqlen": frames.longest,
        "image_segments": frames,
        "image_position_ids": torch.cat(
            [_positions(grid, tower.spatial_merge_size, device) for grid in grids]
        ),
    }
    if hasattr(tower, "num_grid_per_side"):
        found = [
            _interpolation(
                grid,
                tower.num_grid_per_side,
                tower.interpolation_mode,
                tower.interpolation_align_corners,
                tower.spatial_merge_size,
                device,
            )
            for grid in grids
        ]
        arguments["image_interp_indices"] = torch.cat([indices for indices, _ in found])
        arguments["image_interp_weights"] = torch.cat([weights for _, weights in found])
    return arguments


# A grid takes about 50 bytes a patch on the device; pictures of at most 784 patches come in about
# a thousand grids, so these hold tens of megabytes at most.
@lru_cache(maxsize=1024)
def _positions(grid: Grid, merge: int, device: torch.device) -> Tensor:
    return get_vision_position_ids(torch.tensor([grid]), merge).to(device)


@lru_cache(maxsize=1024)
def _interpolation(
    grid: Grid, side: int, mode: str, align_corners: bool, merge: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]),
        num_grid_per_side=side,
        mode=mode,
        align_corners=align_corners,
        spatial_merge_size=merge,
    )
    return indices.to(device), weights.to(device)
