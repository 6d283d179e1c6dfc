"""Linear layers whose weights stay packed.

Three forms of one layer, chosen when it is made, by the device and the layer's size:

    KernelLinear     on a GPU: the project's kernels, words in their order
    OperatorLinear   on a CPU, 4 bits: torch's operator for few rows
    BlockedLinear    anything else, slower: blocks of W multiplied out in every forward pass
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from grace_core.inference import cpu_products, layout
from grace_core.quantization.packing import unpack_codes

log = logging.getLogger(__name__)

# dims: M rows, N outputs, K inputs, P partial sums


class PackedLinear(nn.Module):
    """What the three forms share. Takes the place of `nn.Linear`; no gradients."""

    words: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        words: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        *,
        in_features: int,
        bits: int,
        group_size: int,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = len(words)
        self.bits = bits
        self.group_size = group_size
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def partial_products(self, x: Tensor) -> Tensor:
        """x W^T + bias of (M, K) inputs: (P, M, N), to be summed over the first dimension."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias, (..., N) in the dtype of x."""
        parts = self.partial_products(x.reshape(-1, self.in_features))
        product = parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)
        return product.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self.group_size}, bias={self.bias is not None}"
        )


class KernelLinear(PackedLinear):
    """Words in the kernels' order (`layout.dealt`), on a GPU."""

    def partial_products(self, x: Tensor) -> Tensor:
        from grace_core.inference import plans
        from grace_core.inference.packed_kernels import tiles

        if len(x) > plans.MOST_ROWS:
            product = torch.nn.functional.linear(x, self.dense(x.dtype), self.bias)
            return product[None]
        return tiles(
            x if x.stride(-1) == 1 else x.contiguous(),
            self.words,
            self.scales,
            self.bias,
            plans.plan_for(len(x), self.out_features, self.in_features),
            bits=self.bits,
            group_size=self.group_size,
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, (N, K)."""
        from grace_core.inference.packed_kernels import expand

        weight = self.words.new_empty(self.out_features, self.in_features, dtype=dtype)
        expand(self.words, self.scales, weight, bits=self.bits, group_size=self.group_size)
        return weight

    @staticmethod
    def joined(layers: list[KernelLinear]) -> KernelLinear | None:
        """Layers of the same inputs as one, over the same memory; None where they lie apart."""
        first = layers[0]
        if not (
            lie_together([layer.words for layer in layers])
            and lie_together([layer.scales for layer in layers])
            and all(layer.in_features == first.in_features for layer in layers)
        ):
            return None
        outputs = sum(layer.out_features for layer in layers)
        biases = [
            layer.scales.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in layers
        ]
        return KernelLinear(
            first.words.as_strided((outputs, first.words.shape[1]), first.words.stride()),
            first.scales.as_strided((outputs, first.scales.shape[1]), first.scales.stride()),
            None if all(layer.bias is None for layer in layers) else torch.cat(biases),
            in_features=first.in_features,
            bits=first.bits,
            group_size=first.group_size,
        )


class OperatorLinear(PackedLinear):
    """Codes as torch's operator packs them, on a CPU."""

    def partial_products(self, x: Tensor) -> Tensor:
        if len(x) <= cpu_products.OPERATOR_ROWS and x.dtype == torch.bfloat16:
            product = cpu_products.operator_product(x, self.words, self.scales, self.group_size)
        else:
            product = cpu_products.operator_blocked_product(x, self.words, self.scales)
        return (product if self.bias is None else product + self.bias)[None]


class BlockedLinear(PackedLinear):
    """Words as released, on any device."""

    def partial_products(self, x: Tensor) -> Tensor:
        product = cpu_products.blocked_product(x, self.words, self.scales, self.bits)
        return (product if self.bias is None else product + self.bias)[None]


def form_for(
    device: torch.device, out_features: int, in_features: int, bits: int, group_size: int
) -> type[PackedLinear]:
    """The fastest form that such a layer can have; a slow one on a GPU is logged, once."""
    if device.type == "cuda":
        obstacle = layout.obstacle(in_features, group_size)
        if obstacle is None and importlib.util.find_spec("triton") is None:
            obstacle = "Triton is not installed"
        if obstacle is None:
            return KernelLinear
        _warn(obstacle)
    elif cpu_products.fits_operator(out_features, in_features, bits, group_size):
        return OperatorLinear
    return BlockedLinear


def make(
    form: type[PackedLinear],
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    *,
    in_features: int,
    bits: int,
    group_size: int,
) -> PackedLinear:
    """A layer from released tensors on their final device.

    Args:
        words: (N, ceil(K bits / 32)) int32; scales: (N, K / group_size) bf16.
    """
    sizes: dict[str, Any] = {"in_features": in_features, "bits": bits, "group_size": group_size}
    if form is KernelLinear:
        words = layout.dealt(words, bits)
    elif form is OperatorLinear:
        words = cpu_products.operator_words(unpack_codes(words, bits, in_features))
        scales = cpu_products.operator_scales(scales)
    return form(words, scales, bias, **sizes)


def lie_together(tensors: list[Tensor]) -> bool:
    """Whether each tensor begins where the one before ends, in one storage."""
    return all(
        one.is_contiguous()
        and one.untyped_storage().data_ptr() == next_one.untyped_storage().data_ptr()
        and one.data_ptr() + one.nbytes == next_one.data_ptr()
        for one, next_one in pairwise(tensors)
    )


@functools.cache
def _warn(obstacle: str) -> None:
    log.warning("packed layers are multiplied out in every forward pass, slowly: %s", obstacle)
