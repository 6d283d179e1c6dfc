"""Linear layers of the same inputs as one product: queries, keys and values; gate and up.

Fewer and larger products fill a GPU better and start fewer kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grace_core.inference.packed_linear import KernelLinear, PackedLinear, lie_together

EXPANDED_BYTES = 2**28
"""Of weights that are multiplied out at a time for many rows; at least one layer."""


@dataclass(frozen=True)
class Projection:
    """What one product of a decoder layer is made with."""

    layers: tuple[nn.Module, ...]
    """One, or several that could not be joined."""

    def product(self, x: Tensor, expanded: Tensor | None = None) -> Tensor:
        """(P, M, N) partial sums of (M, K) inputs.

        Args:
            expanded: (N, K), the weight where it has been multiplied out.
        """
        if expanded is not None:
            layer = self.kernel_layer
            return F.linear(x, expanded, None if layer is None else layer.bias)[None]
        products = [
            layer.partial_products(x) if isinstance(layer, PackedLinear) else layer(x)[None]
            for layer in self.layers
        ]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    @property
    def kernel_layer(self) -> KernelLinear | None:
        """The packed layer that kernels multiply with, if that is what this is."""
        (first, *others) = self.layers
        return first if isinstance(first, KernelLinear) and not others else None


def joined(linears: Sequence[nn.Module]) -> Projection:
    """One projection of these layers; a model's own layers then share its memory.

    Dense weights are put behind one another, and the given layers become views of them.
    """
    packed = [layer for layer in linears if isinstance(layer, KernelLinear)]
    if len(packed) == len(linears):
        whole = KernelLinear.joined(packed) if len(packed) > 1 else packed[0]
        return Projection((whole,) if whole is not None else tuple(linears))
    dense = [layer for layer in linears if type(layer) is nn.Linear]
    if len(dense) == len(linears) and len(dense) > 1:
        return Projection((_joined_dense(dense),))
    return Projection(tuple(linears))


def _joined_dense(linears: Sequence[nn.Linear]) -> nn.Linear:
    first = linears[0]
    sizes = [layer.out_features for layer in linears]
    with torch.device("meta"):
        whole = nn.Linear(first.in_features, sum(sizes), bias=first.bias is not None)
    whole.weight = nn.Parameter(torch.cat([layer.weight for layer in linears]), requires_grad=False)
    for layer, own in zip(linears, whole.weight.split(sizes), strict=True):
        layer.weight = nn.Parameter(own, requires_grad=False)
    if first.bias is not None:
        whole.bias = nn.Parameter(torch.cat([layer.bias for layer in linears]), requires_grad=False)
        for layer, own in zip(linears, whole.bias.split(sizes), strict=True):
            layer.bias = nn.Parameter(own, requires_grad=False)
    return whole


class ExpandedWeights:
    """Weights of packed layers multiplied out, some decoder layers at a time, for many rows.

    One kernel multiplies out all projections of these layers: its start costs the host little
    beside the products. The room is used again for the next layers.
    """

    def __init__(self, layers: Sequence[Sequence[Projection]], dtype: torch.dtype) -> None:
        """layers: the projections of each decoder layer; see :func:`expandable`."""
        self._layers = [[_kernel_layer(one) for one in projections] for projections in layers]
        self._dtype = dtype
        counts = [
            sum(one.out_features * one.in_features for one in projections)
            for projections in self._layers
        ]
        self._at_a_time = max(1, EXPANDED_BYTES // (max(counts) * dtype.itemsize))
        self._room = self._layers[0][0].scales.new_empty(self._at_a_time * max(counts), dtype=dtype)
        self._first = -self._at_a_time
        self._weights: list[list[Tensor]] = []

    def of(self, layer: int) -> list[Tensor]:
        """The weights of a decoder layer's projections; layers are asked for in order."""
        if layer >= self._first + self._at_a_time:
            self._first = layer
            self._expand(self._layers[layer : layer + self._at_a_time])
        return self._weights[layer - self._first]

    def _expand(self, layers: Sequence[Sequence[KernelLinear]]) -> None:
        from grace_core.inference.packed_kernels import expand

        flat = [one for projections in layers for one in projections]
        first = flat[0]
        counts = [one.out_features * one.in_features for one in flat]
        room = self._room[: sum(counts)]
        words = first.words.as_strided((sum(counts) * first.bits // 32,), (1,))
        scales = first.scales.as_strided((sum(counts) // first.group_size,), (1,))
        expand(words, scales, room, bits=first.bits, group_size=first.group_size)
        weights = [
            own.view(one.out_features, one.in_features)
            for own, one in zip(room.split(counts), flat, strict=True)
        ]
        each = len(layers[0])
        self._weights = [weights[i : i + each] for i in range(0, len(weights), each)]


def expandable(layers: Sequence[Sequence[Projection]]) -> bool:
    """Whether all projections are multiplied by kernels and lie one after the other."""
    found = [one.kernel_layer for projections in layers for one in projections]
    packed = [one for one in found if one is not None]
    return len(packed) == len(found) and all(
        lie_together([getattr(one, name) for one in packed]) for name in ("words", "scales")
    )


def _kernel_layer(projection: Projection) -> KernelLinear:
    layer = projection.kernel_layer
    assert layer is not None
    return layer
