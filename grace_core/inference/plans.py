"""Which kernel multiplies how many rows with a packed weight on a GPU, and how it is cut.

Fixed tables rather than tuning at run time: the same inputs give the same bits in every process.
`grace bench decode --products` times them beside cuBLAS, `--plans` other ones as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grace_core.inference.packed_kernels import Plan

Way = Literal["few_rows", "tiles"]

FEW_ROWS = 0
"""Rows up to which `few_rows` is the faster one."""

MOST_ROWS = 64
"""With more rows W is multiplied out once and given to a dense product."""


@dataclass(frozen=True)
class Choice:
    way: Way
    plan: Plan


def choose(rows: int, outputs: int, inputs: int, bits: int) -> Choice:
    """For at most `MOST_ROWS` rows."""
    if rows <= FEW_ROWS:
        return Choice("few_rows", few_rows_plan(outputs, inputs, bits))
    return Choice("tiles", tiles_plan(rows, outputs, inputs))


def few_rows_plan(outputs: int, inputs: int, bits: int) -> Plan:
    """128 words a warp: four a thread, which is what a thread reads at once."""
    words = inputs * bits // 32
    warps = 4 if words % 512 == 0 or words > 1024 else 2
    return Plan(block_n=4 if outputs < 8192 else 8, slabs=warps * 32 // bits, warps=warps)


def tiles_plan(rows: int, outputs: int, inputs: int) -> Plan:
    """Parts of the inputs side by side until each of 132 processors has two or three programs.

    Two warps: with four of 16 outputs each, Triton takes Hopper's wide instructions, whose operands
    have to wait for one another.
    """
    block_m = max(8, 1 << (rows - 1).bit_length())
    block_n = 64 if block_m == 32 else 32
    tiles = -(-outputs // block_n)
    wanted = 400 if block_m <= 16 else 256
    most = min(8, max(1, inputs // 256))
    parts = 1
    while parts * 2 <= most and tiles * parts < wanted:
        parts *= 2
    return Plan(block_n=block_n, block_m=block_m, parts=parts, warps=2, stages=4)
