"""How codes lie in the words that the kernels read.

A release packs 32 / b neighbouring codes of b bits into each int32 word (see
`grace_core.quantization.packing`). The kernels take a word as two halves of 16 bits, and one field
of many halves at a time. So the codes of every *slab* of 128 are dealt out anew: a slab takes
H = 128 b / 16 halves, and field j of its half i is code j H + i. One field of neighbouring halves
then belongs to neighbouring inputs, and the two halves of a word become a pair of bf16 numbers, as
the tensor cores take them, by the same instructions.

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
    by_field = codes.view(len(codes), -1, 16 // bits, words_a_slab(bits), 2)
    return pack_codes(by_field.permute(0, 1, 3, 4, 2).reshape(codes.shape), bits)


def obstacle(in_features: int, group_size: int) -> str | None:
    """Why a layer cannot be laid out so, or None."""
    if group_size % SLAB or in_features % group_size:
        return f"group size {group_size} of {in_features} inputs is no multiple of {SLAB}"
    return None
