"""Room for the words and scales of all of a model's packed layers, one after the other.

Projections of the same inputs can so be multiplied as one, and several layers multiplied out by
one kernel. Layers that the kernels do not take are allocated one by one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grace_core.inference import packed_linear
from grace_core.inference.packed_linear import KernelLinear, PackedLinear
from grace_core.quantization.lsq import SCALE_DTYPE


class PackedStore:
    """Makes packed layers, those with kernels in one allocation."""

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        device: torch.device,
        *,
        bits: int,
        group_size: int,
    ) -> None:
        """linears: the layers to come, in the order in which they shall lie; any device."""
        self.bits, self.group_size = bits, group_size
        self._sizes = {
            name: (linear.out_features, linear.in_features) for name, linear in linears.items()
        }
        self._forms = {
            name: packed_linear.form_for(device, *size, bits, group_size)
            for name, size in self._sizes.items()
        }
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}
        kept = [name for name, form in self._forms.items() if form is KernelLinear]
        counts = [self._sizes[name][0] * self._sizes[name][1] for name in kept]
        if not kept:
            return
        words = torch.empty(sum(counts) * bits // 32, dtype=torch.int32, device=device)
        scales = torch.empty(sum(counts) // group_size, dtype=SCALE_DTYPE, device=device)
        of_words = words.split([count * bits // 32 for count in counts])
        of_scales = scales.split([count // group_size for count in counts])
        for name, own, own_scales in zip(kept, of_words, of_scales, strict=True):
            outputs = self._sizes[name][0]
            self._rooms[name] = own.view(outputs, -1), own_scales.view(outputs, -1)

    def layer(self, name: str, words: Tensor, scales: Tensor) -> PackedLinear:
        """The layer of these released tensors, already on the device; without a bias.

        Args:
            words: (N, ceil(K bits / 32)) int32; scales: (N, K / group_size) bf16.
        """
        layer = packed_linear.make(
            self._forms[name],
            words,
            scales,
            None,
            in_features=self._sizes[name][1],
            bits=self.bits,
            group_size=self.group_size,
        )
        if name in self._rooms:
            for own, room in zip((layer.words, layer.scales), self._rooms[name], strict=True):
                room.copy_(own)
            layer.words, layer.scales = self._rooms[name]
        return layer
