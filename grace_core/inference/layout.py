"""How codes lie in the words that the kernels read.

A release packs 32 / b neighbouring codes of b bits into each int32 word (see
`grace_core.quantization.packing`). Kernels that take one field of many words at a time would then
need inputs that are 32 / b apart. So the codes of every *slab* of 128 are dealt out anew: a slab
takes W = 128 b / 32 words, and field j of its word i is code j W + i. Neighbouring words then hold
neighbouring codes, and the inputs that belong to them lie side by side.

The sizes, the unsigned form q + 2^(b-1) and the order of slabs stay those of the release.
"""

from __future__ import annotations

from torch import Tensor

from grace_core.quantization.packing import pack_codes, unpack_codes

SLAB = 128
"""Consecutive codes along the input dimension that are dealt out among themselves."""


def words_a_slab(bits: int) -> int:
    """Number of int32 words of 128 codes."""
    return SLAB * bits // 32


def dealt(words: Tensor, bits: int) -> Tensor:
    """Release words (O, I b / 32) in the kernels' order; I is a multiple of 128."""
    codes = unpack_codes(words, bits, words.shape[1] * 32 // bits)
    fields = 32 // bits
    by_field = codes.view(len(codes), -1, fields, SLAB // fields)
    return pack_codes(by_field.transpose(2, 3).reshape(codes.shape), bits)


def collected(words: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`dealt`, up to the codes themselves: int8 (O, I)."""
    codes = unpack_codes(words.contiguous(), bits, words.shape[1] * 32 // bits)
    fields = 32 // bits
    by_word = codes.view(len(codes), -1, SLAB // fields, fields)
    return by_word.transpose(2, 3).reshape(codes.shape)


def obstacle(in_features: int, group_size: int) -> str | None:
    """Why a layer cannot be laid out so, or None."""
    if group_size % SLAB or in_features % group_size:
        return f"group size {group_size} of {in_features} inputs is no multiple of {SLAB}"
    return None
