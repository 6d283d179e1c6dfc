"""Packed words against compressed-tensors' own functions, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_core.quantization.packing import pack_codes, unpack_codes


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**20),
)
def test_words_equal_compressed_tensors(rows: int, columns: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_codes(words, bits, columns), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


def test_hand_worked_words() -> None:
    # 4 bits: -8, -7, ..., -1 are stored as 0, 1, ..., 7, the first in the lowest nibble.
    codes = torch.arange(-8, 0, dtype=torch.int8).view(1, 8)
    assert pack_codes(codes, 4).tolist() == [[0x76543210]]
    # 8 bits: -128, -127, 0, 1 are stored as 0x00, 0x01, 0x80, 0x81; the word's sign bit is set.
    codes = torch.tensor([[-128, -127, 0, 1]], dtype=torch.int8)
    assert pack_codes(codes, 8).tolist() == [[0x81800100 - 2**32]]
    # A short row ends in zero bits.
    assert pack_codes(torch.tensor([[-7, 7, -6]], dtype=torch.int8), 4).tolist() == [[0x2F1]]


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(AssertionError):
        pack_codes(torch.zeros(1, 8, dtype=torch.int8), bits)
