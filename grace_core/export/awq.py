"""The form AWQ GEMM, for runtimes that read AutoAWQ's files.

`grace_core.quantization.awq` describes the tensors: ``P.qweight``, ``P.qzeros`` and ``P.scales`` of
a layer P. Plain transformers runs them on a GPU with gptqmodel only; the gate loads them densely.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grace_core.errors import GraceError
from grace_core.export.checkpoint import WeightFiles
from grace_core.export.compressed import unquantized_roots
from grace_core.export.formats import PackedLayer, StoredLayer
from grace_core.export.lazy_tensors import LazyTensor
from grace_core.quantization.awq import (
    BITS,
    PER_WORD,
    ZERO_POINT,
    ZERO_WORD,
    awq_scales,
    not_in_fp16,
    pack_awq,
    unpack_awq,
)


class AwqGemm:
    """Weights of 4 bits with zero point 8 and fp16 scales."""

    title = "AWQ GEMM"
    widths: tuple[int, ...] = (BITS,)

    def check(self, layer: PackedLayer) -> None:
        """Raise GraceError where outputs do not fill words, or fp16 cannot hold a scale."""
        name = layer.name.removesuffix(".weight")
        if layer.out_features % PER_WORD:
            raise GraceError(
                f"{name}: its {layer.out_features} outputs do not fill AWQ's words of 8; release "
                "this model without AWQ (quantize.awq: false)"
            )
        lost = not_in_fp16(layer.scale)
        if lost.numel():
            first = lost[0].float()
            raise GraceError(
                f"{name}: {lost.numel()} of {layer.scale.numel()} scales cannot be stored exactly "
                f"in AWQ's fp16, first {first.item():.8g}, which would become "
                f"{first.half().item():.8g}; release this model without AWQ (quantize.awq: false)"
            )

    def tensors(self, layer: PackedLayer) -> list[LazyTensor]:
        qweight, qzeros, scales = self.parts(layer.name)
        words = layer.out_features // PER_WORD
        groups = layer.in_features // layer.group_size
        zeros = partial(torch.full, (groups, words), ZERO_WORD, dtype=torch.int32)
        return [
            LazyTensor(
                qweight,
                torch.int32,
                (layer.in_features, words),
                lambda: pack_awq(layer.codes()),
            ),
            LazyTensor(qzeros, torch.int32, (groups, words), zeros),
            LazyTensor(
                scales,
                torch.float16,
                (groups, layer.out_features),
                lambda: awq_scales(layer.scale),
            ),
        ]

    def codes(self, words: Tensor, bits: int, in_features: int) -> Tensor:
        return unpack_awq(words)

    def parts(self, name: str) -> tuple[str, ...]:
        stem = name.removesuffix("weight")
        return (f"{stem}qweight", f"{stem}qzeros", f"{stem}scales")

    def weights(self, names: Iterable[str]) -> list[str]:
        return [
            name.removesuffix("qweight") + "weight" for name in names if name.endswith(".qweight")
        ]

    def read(self, files: WeightFiles, name: str, bits: int, group_size: int) -> StoredLayer:
        stem = name.removesuffix("weight")
        words, zeros, scales = map(files.read, self.parts(name))
        groups, outputs = words.shape[0] // group_size, words.shape[1] * PER_WORD
        whole = (
            bits == BITS
            and words.dtype == zeros.dtype == torch.int32
            and words.shape[0] % group_size == 0
            and zeros.shape == (groups, words.shape[1])
            and scales.is_floating_point()
            and scales.shape == (groups, outputs)
        )
        if not whole:
            raise GraceError(
                f"{files.folder}: {stem}qweight of shape {tuple(words.shape)}, qzeros of "
                f"{tuple(zeros.shape)} and scales of {tuple(scales.shape)} are no {bits}-bit AWQ "
                f"layer of group size {group_size}; the file is damaged or of another format"
            )
        if (zeros != ZERO_WORD).any():
            raise GraceError(
                f"{files.folder}: {stem}qzeros holds zero points other than {ZERO_POINT}; GRACE's "
                "quantizer is symmetric, so this model was not quantized by it"
            )
        return StoredLayer(unpack_awq(words), scales.t().contiguous())

    def quantization_config(
        self, model: nn.Module, layers: Collection[str], bits: int, group_size: int
    ) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": bits,
            "group_size": group_size,
            "zero_point": True,
            "modules_to_not_convert": not_converted(model, layers),
        }


AWQ = AwqGemm()


def not_converted(model: nn.Module, quantized: Collection[str]) -> list[str]:
    """Names by which runtimes recognise the layers that are not quantized.

    transformers compares a name with the beginning of a module's path, vLLM looks for it anywhere
    in the path, after renaming modules. So each subtree without quantized layers is listed by its
    whole path, and by the end of it that is in no quantized layer's.
    """
    names = []
    for root in unquantized_roots(model, quantized):
        parts = root.split(".")
        tails = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        free = [tail for tail in tails if not any(tail in layer for layer in quantized)]
        if not free:
            raise GraceError(
                f"{root} is not quantized, but its name is part of quantized layers' names; AWQ's "
                "configuration cannot tell them apart; release without AWQ (quantize.awq: false)"
            )
        names += [root, free[0]]
    return list(dict.fromkeys(names))
