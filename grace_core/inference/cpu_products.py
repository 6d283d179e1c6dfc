"""Products with packed weights on a CPU.

Codes of 4 bits have an operator of torch's, which reads them as they are packed and pays for few
rows; it keeps them in an order of its own. Everything else is multiplied out in blocks: some rows
of W at a time, rounded to bf16, then a dense product, so that W never exists whole.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from grace_core.quantization.lsq import dequantize
from grace_core.quantization.packing import unpack_codes

OPERATOR_ROWS = 4
"""Rows up to which the operator is faster than a dense bf16 product (docs/inference.md)."""

_BLOCK = 64
"""Outputs that the operator packs together."""

_BLOCK_ELEMENTS = 2**22
"""Of W, multiplied out at a time."""

# dims: M rows, N outputs, K inputs, G groups


@functools.cache
def has_operator() -> bool:
    """Whether torch's operator is here and packs codes in the order that is undone below.

    The order depends on the processor's vector width, so it is tried.
    """
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return False
    codes = torch.arange(_BLOCK * 32).mul(7).remainder(16).sub(8).view(_BLOCK, 32).to(torch.int8)
    return torch.equal(operator_codes(operator_words(codes)), codes)


def fits_operator(out_features: int, in_features: int, bits: int, group_size: int) -> bool:
    """Whether a layer of this size can be given to the operator."""
    whole = out_features % _BLOCK == 0 and in_features % group_size == 0
    return bits == 4 and whole and group_size in (32, 64, 128, 256) and has_operator()


def operator_words(codes: Tensor) -> Tensor:
    """int8 codes (N, K) of 4 bits as the operator wants them: uint8 (N, K / 2)."""
    unsigned = codes.to(torch.int32) + 8
    words: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    return words


def operator_codes(words: Tensor) -> Tensor:
    """Inverse of :func:`operator_words`, where :func:`has_operator` says so."""
    blocks = words.view(len(words) // _BLOCK, -1, _BLOCK // 2)
    halves = (blocks & 0xF).transpose(1, 2), (blocks >> 4).transpose(1, 2)
    return (torch.cat(halves, dim=1).reshape(len(words), -1).to(torch.int8)) - 8


def operator_scales(scales: Tensor) -> Tensor:
    """Scales (N, G) and zero points, all zero, side by side: (G, N, 2)."""
    return torch.stack((scales, torch.zeros_like(scales)), dim=-1).transpose(0, 1).contiguous()


def operator_product(x: Tensor, words: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """x W^T, (M, N) in bf16.

    Args:
        x: (M, K) bf16; words and scales as made above.
    """
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, group_size, scales)
    return product


def operator_blocked_product(x: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    """The same by dense products of blocks of W; for many rows."""
    out = x.new_empty(len(x), len(words))
    step = _rows_a_block(x.shape[1])
    for begin in range(0, len(words), step):
        rows = slice(begin, begin + step)
        weight = dequantize(
            operator_codes(words[rows]), scales[:, rows, 0].t().contiguous(), x.dtype
        )
        torch.mm(x, weight.t(), out=out[:, rows])
    return out


def blocked_product(x: Tensor, words: Tensor, scales: Tensor, bits: int) -> Tensor:
    """x W^T, (M, N) in the dtype of x, by dense products of blocks of W.

    Args:
        x: (M, K), bf16 or fp32, on any device.
        words: (N, ceil(K bits / 32)) int32, as released; scales: (N, G) bf16.
    """
    step = _rows_a_block(x.shape[1])
    products = [
        F.linear(x, dequantize(unpack_codes(some, bits, x.shape[1]), of_them, x.dtype))
        for some, of_them in zip(words.split(step), scales.split(step), strict=True)
    ]
    return torch.cat(products, dim=1)


def _rows_a_block(inputs: int) -> int:
    return max(_BLOCK, _BLOCK_ELEMENTS // inputs // _BLOCK * _BLOCK)
