"""AWQ's words, against the layout written out nibble by nibble."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace_core.quantization.awq import ZERO_WORD, awq_scales, not_in_fp16, pack_awq, unpack_awq

# Where AutoAWQ's reader finds output 0, 1, ... 7 among the nibbles of a word, from the lowest.
NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


def codes_of(outputs: int, inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (outputs, inputs), generator=generator).to(torch.int8)


@settings(max_examples=60, deadline=None)
@given(words=st.integers(1, 4), inputs=st.integers(1, 9), seed=st.integers(0, 2**20))
def test_every_nibble_is_where_readers_look(words: int, inputs: int, seed: int) -> None:
    codes = codes_of(8 * words, inputs, seed)
    packed = pack_awq(codes)
    assert packed.dtype == torch.int32 and packed.shape == (inputs, words)
    assert packed.is_contiguous()
    for column in range(inputs):
        for output in range(8 * words):
            word = packed[column, output // 8].item() & 0xFFFFFFFF
            nibble = word >> (4 * NIBBLE_OF_OUTPUT[output % 8]) & 0xF
            assert nibble - 8 == codes[output, column].item()
    assert torch.equal(unpack_awq(packed), codes)


def test_hand_worked_words() -> None:
    # Outputs 0 .. 7 hold -8 .. -1, stored as 0 .. 7; nibbles from the lowest: 0 2 4 6 1 3 5 7.
    column = torch.arange(-8, 0, dtype=torch.int8).view(8, 1)
    assert pack_awq(column).tolist() == [[0x75316420]]
    assert ZERO_WORD & 0xFFFFFFFF == 0x88888888
    assert torch.equal(pack_awq(torch.zeros(8, 1, dtype=torch.int8))[0, 0], torch.tensor(ZERO_WORD))


@pytest.mark.parametrize(
    ("scale", "exact"),
    [
        (0.01, True),
        (65280.0, True),
        (65536.0, False),  # overflows
        (2.0**-14, True),
        (1.9921875 * 2.0**-17, True),  # eight digits end at 2^-24, fp16's last
        (1.9921875 * 2.0**-18, False),  # one more is lost
        (2.0**-24, True),
        (2.0**-25, False),  # vanishes
        (1e-8, False),
    ],
)
def test_scales_that_fp16_cannot_hold_are_found(scale: float, exact: bool) -> None:
    stored = torch.full((2, 3), 0.5, dtype=torch.bfloat16)
    stored[1, 2] = scale
    assert not_in_fp16(stored).tolist() == ([] if exact else [stored[1, 2].item()])
    if exact:
        assert torch.equal(awq_scales(stored).float(), stored.float().t())


def test_nothing_is_rounded_within_fp16s_range() -> None:
    bits = torch.arange(0x3780, 0x477F, dtype=torch.int32).to(torch.int16)  # 2^-16 to 65280
    every = bits.view(torch.bfloat16).view(-1, 1)
    assert every.min() == 2.0**-16 and every.max() < 65504
    assert not_in_fp16(every).numel() == 0
