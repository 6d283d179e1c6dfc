"""Safetensors files written tensor by tensor, so that memory holds one of them and not the file.

The format (https://huggingface.co/docs/safetensors) begins with the offsets of all tensors. They
follow from shapes and dtypes, so the values can be made one after the other while they are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by the format's names for them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are made when they are asked for."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def save_lazily(tensors: Iterable[LazyTensor], file: Path) -> None:
    """Write a safetensors file, making each tensor just before it is written.

    Wider dtypes come first, so that every tensor is aligned in a file that is mapped into memory.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            values = tensor.make()
            assert (values.dtype, values.shape) == (tensor.dtype, tensor.shape), tensor.name
            stream.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
