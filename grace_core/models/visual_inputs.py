"""From pictures to what a family's model wants, and how many tokens they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from grace_core.errors import GraceError
from grace_core.models.loading import CheckpointFolder, load_image_processor
from grace_core.models.positions import multimodal_positions, plain_positions

Grid = tuple[int, int, int]
"""Patches of a picture in time, height and width, before merging."""


class VisualInputs:
    """Pictures of one checkpoint: counting their tokens and making the model's tensors.

    Teacher and student must see the same tokens, so both are given the same instance.
    """

    def __init__(
        self,
        checkpoint: CheckpointFolder,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """Limits in pixels replace those of the checkpoint's image processor where it has any."""
        self.family = checkpoint.family
        self.image_token_id = checkpoint.image_token_id
        self.processor: Any = load_image_processor(checkpoint.path)
        self._vision: dict[str, Any] = checkpoint.config["vision_config"]
        self._keeps_class_token = (
            checkpoint.config.get("vision_feature_select_strategy", "default") == "full"
        )
        if self._has_grids:
            size = dict(self.processor.size)
            size["shortest_edge"] = min_pixels or size["shortest_edge"]
            size["longest_edge"] = max_pixels or size["longest_edge"]
            self.processor.size = size

    @property
    def pixel_limits(self) -> tuple[int, int] | None:
        """Fewest and most pixels of a resized picture; None where all have one size."""
        if not self._has_grids:
            return None
        return int(self.processor.size["shortest_edge"]), int(self.processor.size["longest_edge"])

    @property
    def _has_grids(self) -> bool:
        return self.family.positions == "multimodal"

    def grid(self, image: Image.Image) -> Grid:
        """Patches of one picture; see `grid_of_size`."""
        return self.grid_of_size(image.width, image.height)

    def grid_of_size(self, width: int, height: int) -> Grid:
        """Patches of a picture of so many pixels: (1, rows, columns).

        Raises ValueError (from the family's rule) for a picture too elongated to be resized.
        """
        if not self._has_grids:
            side = self._vision["image_size"] // self._vision["patch_size"]
            return (1, side, side)
        patch = self.processor.patch_size
        height, width = smart_resize(
            height,
            width,
            factor=patch * self.processor.merge_size,
            min_pixels=self.processor.size["shortest_edge"],
            max_pixels=self.processor.size["longest_edge"],
        )
        return (1, height // patch, width // patch)

    def tokens(self, grid: Grid) -> int:
        """Image tokens a picture of this grid takes in the sequence."""
        patches = grid[0] * grid[1] * grid[2]
        if self._has_grids:
            return patches // self.processor.merge_size**2
        return patches + int(self._keeps_class_token)

    def grid_and_tokens(self, image: Image.Image) -> tuple[Grid, int]:
        """Both of the above; what data preparation stores."""
        grid = self.grid(image)
        return grid, self.tokens(grid)

    def positions(self, length: int, starts: Sequence[int], grids: Sequence[Grid]) -> Tensor:
        """Rotary positions of a sample: (3, length) M-RoPE or (1, length) plain ones, int64.

        starts: place of each picture's first token in the sample; grids: of each, in patches.
        """
        if not self._has_grids:
            return plain_positions(length)
        merge = self.processor.merge_size
        merged = [(frames, rows // merge, columns // merge) for frames, rows, columns in grids]
        return multimodal_positions(length, list(zip(starts, merged, strict=True)))

    def tensors(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """The model's keyword arguments for these pictures, in order; CPU, fp32."""
        assert images, "a model without pictures takes no picture arguments"
        batch = self.processor(images=images, return_tensors="pt")
        if self._has_grids:
            return {
                "pixel_values": batch["pixel_values"],
                "image_grid_thw": batch["image_grid_thw"],
            }
        return {"pixel_values": batch["pixel_values"]}

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Further arguments that generation wants: 0 for text, 1 for image tokens, same shape."""
        if not self._has_grids:
            return {}
        return {"mm_token_type_ids": (input_ids == self.image_token_id).to(torch.int32)}

    def smallest_picture(self) -> Image.Image:
        """A grey picture of the fewest tokens, for rows that have none of their own."""
        if not self._has_grids:
            side = self._vision["image_size"]
        else:
            side = self.processor.patch_size * self.processor.merge_size
        return Image.new("RGB", (side, side), (128, 128, 128))


def check_same_tokens(teacher: VisualInputs, student: VisualInputs) -> None:
    """Raise unless both checkpoints cut every picture into the same tokens."""
    names = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
    differing = [
        f"{name}: teacher {getattr(teacher.processor, name, None)}, "
        f"student {getattr(student.processor, name, None)}"
        for name in names
        if getattr(teacher.processor, name, None) != getattr(student.processor, name, None)
    ]
    if not teacher._has_grids and teacher._vision["image_size"] != student._vision["image_size"]:
        differing.append(
            f"image_size: teacher {teacher._vision['image_size']}, "
            f"student {student._vision['image_size']}"
        )
    if differing:
        raise GraceError(
            "teacher and student see pictures differently, so their visual tokens cannot be "
            "compared; choose a pair with equal image processors:\n  " + "\n  ".join(differing)
        )
