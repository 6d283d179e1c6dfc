"""4-bit codes as the GEMM form of AWQ stores them.

A linear layer with O outputs, I inputs and group size g (AutoAWQ's `WQLinear_GEMM`, which vLLM,
SGLang and gptqmodel read as well):

    qweight   int32 (I, O / 8)       codes
    qzeros    int32 (I / g, O / 8)   zero points
    scales    fp16  (I / g, O)       the weight is (code - zero point) * scale

Matrices lie transposed. Eight codes of neighbouring outputs fill a word; nibble i of word w,
counted from the lowest bits, holds output 8 w + :data:`ORDER` [i]. Codes are unsigned: a symmetric
code q of -8 .. 7 is stored as q + 8 beside the zero point 8, so nothing is lost but what fp16
cannot hold of a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grace_core.quantization.packing import unsigned_codes

BITS = 4
PER_WORD = 32 // BITS
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs a nibble holds, from the lowest bits of a word."""

ZERO_POINT = 8
ZERO_WORD = -0x77777778
"""Eight zero points of 8 in one word, 0x88888888 as int32."""


def pack_awq(codes: Tensor) -> Tensor:
    """Pack int8 codes (O, I) into int32 words (I, O / 8); O must be a multiple of 8."""
    assert codes.dtype == torch.int8 and codes.ndim == 2
    assert codes.shape[0] % PER_WORD == 0, f"{codes.shape[0]} outputs do not fill words of 8 codes"
    nibbles = unsigned_codes(codes, BITS).unflatten(0, (-1, PER_WORD))
    pairs = zip(ORDER[0::2], ORDER[1::2], strict=True)
    every_byte = [nibbles[:, low] | (nibbles[:, high] << 4) for low, high in pairs]
    words = torch.stack(every_byte, dim=-1).view(torch.int32).squeeze(-1)  # (O / 8, I)
    return words.t().contiguous()


def unpack_awq(words: Tensor) -> Tensor:
    """Inverse of :func:`pack_awq`: int32 words (I, O / 8) back to int8 codes (O, I)."""
    assert words.dtype == torch.int32 and words.ndim == 2
    every_byte = words.t().contiguous().view(torch.uint8).unflatten(1, (-1, 4))  # (O / 8, I, 4)
    nibbles = torch.empty(
        (words.shape[1], PER_WORD, words.shape[0]), dtype=torch.uint8, device=words.device
    )
    for byte in range(4):
        nibbles[:, ORDER[2 * byte]] = every_byte[..., byte] & 0xF
        nibbles[:, ORDER[2 * byte + 1]] = every_byte[..., byte] >> 4
    return nibbles.flatten(0, 1).view(torch.int8) - ZERO_POINT


def awq_scales(scale: Tensor) -> Tensor:
    """Stored scales (O, G) as AWQ's fp16 (G, O); exact where :func:`not_in_fp16` finds none."""
    return scale.t().contiguous().to(torch.float16)


def not_in_fp16(scale: Tensor) -> Tensor:
    """Those of the scales that fp16 cannot hold exactly, 1-D.

    fp16 has more digits than bf16 but a narrower range: 65504 and above overflow, and below 2^-14
    the digits dwindle until nothing is left at 2^-25.
    """
    return scale[scale.to(torch.float16).float() != scale.float()]
