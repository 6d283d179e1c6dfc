"""How the product of how many rows with a packed weight is cut among the programs of a GPU.

Fixed rules rather than tuning at run time: the same inputs give the same bits in every process.
`grace bench decode --products` times them beside cuBLAS, `--plans` other ones as well.
"""

from __future__ import annotations

from grace_core.inference.packed_kernels import Plan

MOST_ROWS = 64
"""With more rows W is multiplied out once and given to a dense product."""


def plan_for(rows: int, outputs: int, inputs: int) -> Plan:
    """For at most `MOST_ROWS` rows.

    Parts of the inputs side by side until each of 132 processors has two or three programs.

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
