"""Qwen3-VL's deepstack features (arXiv 2406.04334) in a packed row."""

from __future__ import annotations

from torch import Tensor


def add_deepstack(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """Add Qwen3-VL's deepstack features where the image tokens are.

    Takes the place of the library's method, which finds those from a mask, on the device.

    Args:
        hidden: (1, L, d).
        places: (V,) int64.
        features: (V, d).
    """
    return hidden.index_add(1, places, features.to(hidden.dtype)[None])
