"""Integer codes in int32 words, as compressed-tensors' ``pack-quantized`` format stores them.

A code q of b bits is stored as the unsigned q + 2^(b-1). Along the input dimension 32 / b of them
fill one word, the first in the lowest bits; the last word of a row is filled up with zero bits.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

PACKABLE_BITS = (4, 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes (O, I) into int32 words (O, ceil(I * bits / 32))."""
    _check(bits)
    assert codes.dtype == torch.int8 and codes.ndim == 2
    unsigned = F.pad(unsigned_codes(codes, bits), (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        # Two codes lie in the bytes of a half-word; the second moves down beside the first.
        pairs = unsigned.view(torch.int16)
        unsigned = (pairs | (pairs >> 4)).to(torch.uint8)
    return unsigned.view(torch.int32)


def unpack_codes(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Inverse of :func:`pack_codes`: int32 words back to int8 codes (O, in_features)."""
    _check(bits)
    assert words.dtype == torch.int32 and words.ndim == 2
    assert words.shape[1] == -(-in_features * bits // 32), (
        f"{words.shape[1]} words a row do not hold {in_features} codes of {bits} bits"
    )
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 0xF, unsigned >> 4), dim=-1).flatten(1)
    codes = unsigned[:, :in_features].to(torch.int16) - (1 << (bits - 1))
    return codes.to(torch.int8)


def unsigned_codes(codes: Tensor, bits: int) -> Tensor:
    """q + 2^(b-1) as uint8, from int8 codes of any shape."""
    return codes.contiguous().view(torch.uint8) + (1 << (bits - 1))  # modulo 256


def _check(bits: int) -> None:
    assert bits in PACKABLE_BITS, f"{bits}-bit codes cross word boundaries"
    assert sys.byteorder == "little", "bytes are reinterpreted as little-endian words"
