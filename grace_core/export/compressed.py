"""The form compressed-tensors `pack-quantized`, which transformers and vLLM load as it is.

A linear layer P with O outputs, I inputs and b-bit codes, group size g:

    P.weight_packed   int32 (O, ceil(I b / 32))   codes, see grace_core.quantization.packing
    P.weight_scale    bf16  (O, I / g)            s; the weight is code * s
    P.weight_shape    int64 (2,)                  [O, I]
    P.bias            unchanged; there is no ``weight`` and no zero point

``quantization_status`` in the configuration matters: without it transformers loads with warnings
only and computes wrong logits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grace_core.errors import GraceError
from grace_core.export.checkpoint import WeightFiles
from grace_core.export.formats import PackedLayer, StoredLayer
from grace_core.export.lazy_tensors import LazyTensor
from grace_core.quantization.packing import PACKABLE_BITS, pack_codes, unpack_codes


class CompressedTensors:
    """Weights of 4 or 8 bits, symmetric, in groups."""

    title = "compressed-tensors pack-quantized"
    widths: tuple[int, ...] = PACKABLE_BITS

    def check(self, layer: PackedLayer) -> None:
        """Any layer whose groups fit can be stored."""

    def tensors(self, layer: PackedLayer) -> list[LazyTensor]:
        packed, scale, shape = self.parts(layer.name)
        sides = (layer.out_features, layer.in_features)
        words = (sides[0], -(-sides[1] * layer.bits // 32))
        return [
            LazyTensor(packed, torch.int32, words, lambda: pack_codes(layer.codes(), layer.bits)),
            LazyTensor(scale, layer.scale.dtype, tuple(layer.scale.shape), lambda: layer.scale),
            LazyTensor(shape, torch.int64, (2,), lambda: torch.tensor(sides)),
        ]

    def codes(self, words: Tensor, bits: int, in_features: int) -> Tensor:
        return unpack_codes(words, bits, in_features)

    def parts(self, name: str) -> tuple[str, ...]:
        return (f"{name}_packed", f"{name}_scale", f"{name}_shape")

    def weights(self, names: Iterable[str]) -> list[str]:
        return [name.removesuffix("_packed") for name in names if name.endswith(".weight_packed")]

    def read(self, files: WeightFiles, name: str, bits: int, group_size: int) -> StoredLayer:
        words, scale, sides = map(files.read, self.parts(name))
        shape = sides.tolist()
        whole = (
            len(shape) == 2
            and shape[1] % group_size == 0
            and scale.is_floating_point()
            and scale.shape == (shape[0], shape[1] // group_size)
            and words.dtype == torch.int32
            and words.shape == (shape[0], -(-shape[1] * bits // 32))
        )
        if not whole:
            raise GraceError(
                f"{files.folder}: {name} of shape {shape} cannot have {bits}-bit words of shape "
                f"{tuple(words.shape)} and scales of shape {tuple(scale.shape)} at group size "
                f"{group_size}; the file is damaged or of another format"
            )
        return StoredLayer(self.codes(words, bits, shape[1]), scale)

    def quantization_config(
        self, model: nn.Module, layers: Collection[str], bits: int, group_size: int
    ) -> dict[str, Any]:
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": group_size,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ignore_patterns(model, layers),
        }


COMPRESSED = CompressedTensors()


def ignore_patterns(model: nn.Module, quantized: Collection[str]) -> list[str]:
    """Regular expressions that match exactly the linear layers that are not quantized.

    Each covers a largest subtree without quantized layers (``visual``, ``lm_head``) by the end of
    its path only: vLLM renames modules but does not rename regular expressions, so an expression
    must not depend on what stands before.
    """
    patterns = []
    for root in unquantized_roots(model, quantized):
        parts = root.split(".")
        for length in range(1, len(parts) + 1):
            tail = r"\.".join(re.escape(part) for part in parts[-length:])
            pattern = rf"(.*\.)?{tail}(\..*)?$"
            if not any(re.match(pattern, layer) for layer in quantized):
                break
        if f"re:{pattern}" not in patterns:
            patterns.append(f"re:{pattern}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            ignored = any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)
            assert ignored == (name not in quantized), f"{name}: ignored = {ignored}"
    return patterns


def unquantized_roots(model: nn.Module, quantized: Collection[str]) -> list[str]:
    """Paths of the largest subtrees that hold linear layers, none of them quantized."""
    above = {"", *(prefix for name in quantized for prefix in _paths(name))}
    roots = [
        next(path for path in _paths(name) if path not in above)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in quantized
    ]
    return list(dict.fromkeys(roots))


def _paths(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
