"""What a packed form of a quantized model is: which tensors stand on disk for a layer's weight.

The export writes, the gate and the import read through this, whatever the form. The forms
themselves are :mod:`~grace_core.export.compressed` and :mod:`~grace_core.export.awq`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from grace_core.export.checkpoint import WeightFiles
from grace_core.export.lazy_tensors import LazyTensor


@dataclass(frozen=True)
class PackedLayer:
    """One quantized linear layer of O outputs and I inputs.

    Attributes:
        name: its weight's name on disk, before packing; it ends in `.weight`.
        bits, group_size: of its quantizer.
        scale: stored scales, (O, I / group_size) bf16.
        codes: makes the int8 codes (O, I).
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    scale: Tensor
    codes: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredLayer:
    """What a packed file holds of a layer: the weight is codes * scale, group by group.

    Attributes:
        codes: (O, I) int8.
        scale: (O, I / group_size), in the dtype of the file.
    """

    codes: Tensor
    scale: Tensor


class PackedForm(Protocol):
    """A form in which runtimes read quantized weights."""

    title: str
    """For people."""

    widths: tuple[int, ...]
    """Bits of a code that the form can hold."""

    def check(self, layer: PackedLayer) -> None:
        """Raise GraceError where the form cannot hold the layer, before anything is written."""

    def tensors(self, layer: PackedLayer) -> list[LazyTensor]:
        """What stands for the layer's weight on disk; the first one holds the codes."""

    def codes(self, words: Tensor, bits: int, in_features: int) -> Tensor:
        """The int8 codes (O, I) in the first of the tensors."""

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the tensors that stand for a weight, the codes' first."""

    def weights(self, names: Iterable[str]) -> list[str]:
        """Names of the weights, ending in `.weight`, that stand packed among tensors' names."""

    def read(self, files: WeightFiles, name: str, bits: int, group_size: int) -> StoredLayer:
        """A packed weight by its name; raises GraceError where its tensors make no layer."""

    def quantization_config(
        self, model: nn.Module, layers: Collection[str], bits: int, group_size: int
    ) -> Mapping[str, Any]:
        """`quantization_config` of config.json.

        Args:
            model: the whole model, for the layers that are not quantized.
            layers: names of the quantized modules.
        """
