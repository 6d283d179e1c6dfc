"""Times of the products with packed weights by shape, number of rows and plan, beside bf16 ones.

What `grace_core.inference.plans` is written from. Each product is timed over several copies of its
weight, more than a GPU's caches hold, in one CUDA graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from grace_core.bench.markdown import markdown_table
from grace_core.bench.shapes import GROUP_SIZE
from grace_core.inference import packed_kernels, plans
from grace_core.inference.packed_kernels import Plan
from grace_core.models.cuda_graph import record

SHAPES = {
    "qkv": (4096, 2048),
    "output": (2048, 2048),
    "gate_up": (12288, 2048),
    "down": (2048, 6144),
}
"""Outputs and inputs of the projections of the 2B shapes, joined as the decoder joins them."""

_CACHE_BYTES = 2**27
_CALLS = 32

_COLUMNS = ("product", "rows", "weights", "way", "µs", "GB/s", "plan")


@dataclass(frozen=True)
class Timed:
    """One way of one product."""

    product: str
    rows: int
    weights: str
    way: str
    microseconds: float
    gigabytes_per_second: float
    """Of the weights alone."""

    plan: str = ""
    chosen: bool = False
    """By the table in `plans`."""


def products(
    device: torch.device, rows_of: Sequence[int], *, every_plan: bool
) -> Iterator[list[Timed]]:
    """All ways of one product with one number of rows after the other; on a GPU.

    Args:
        rows_of: the numbers of rows.
        every_plan: try plans beside the table's.
    """
    for rows in rows_of:
        for name, (outputs, inputs) in SHAPES.items():
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            yield [
                _dense(name, x, outputs),
                *(one for bits in (8, 4) for one in _packed(name, x, outputs, bits, every_plan)),
            ]


def _dense(name: str, x: Tensor, outputs: int) -> Timed:
    count = _CACHE_BYTES // (2 * outputs * x.shape[1]) + 1
    weights = [
        torch.randn(outputs, x.shape[1], device=x.device, dtype=x.dtype) for _ in range(count)
    ]
    took = _microseconds([partial(F.linear, x, weight) for weight in weights])
    return Timed(name, len(x), "bf16", "cuBLAS", took, weights[0].nbytes / took / 1e3)


def _packed(name: str, x: Tensor, outputs: int, bits: int, every_plan: bool) -> Iterator[Timed]:
    rows, inputs = x.shape
    count = _CACHE_BYTES * 8 // (bits * outputs * inputs) + 1
    words = [
        torch.randint(-(2**31), 2**31, (outputs, inputs * bits // 32), device=x.device).int()
        for _ in range(count)
    ]
    scales = torch.full(
        (outputs, inputs // GROUP_SIZE), 0.01, device=x.device, dtype=torch.bfloat16
    )
    moved = words[0].nbytes + scales.nbytes
    chosen = plans.plan_for(rows, outputs, inputs) if rows <= plans.MOST_ROWS else None
    for plan in _plans(chosen, outputs, inputs, every_plan):
        runs = [
            partial(
                packed_kernels.tiles, x, own, scales, None, plan, bits=bits, group_size=GROUP_SIZE
            )
            for own in words
        ]
        try:
            took = _microseconds(runs)
        except Exception as error:  # a plan that this GPU cannot run; the table says why
            told = f"{plan}: {error}"[:200]
            yield Timed(name, rows, f"w{bits}", "tiles", float("inf"), 0.0, told)
            continue
        rate = moved / took / 1e3
        yield Timed(name, rows, f"w{bits}", "tiles", took, rate, _short(plan), plan == chosen)
    if rows >= 64:
        room = torch.empty(outputs, inputs, device=x.device, dtype=x.dtype)

        def expanded(own: Tensor) -> Tensor:
            packed_kernels.expand(own, scales, room, bits=bits, group_size=GROUP_SIZE)
            return F.linear(x, room)

        took = _microseconds([partial(expanded, own) for own in words])
        yield Timed(
            name, rows, f"w{bits}", "expand, cuBLAS", took, moved / took / 1e3, "", chosen is None
        )


def _plans(chosen: Plan | None, outputs: int, inputs: int, every_plan: bool) -> Iterable[Plan]:
    if chosen is None:
        return []
    found = [chosen]
    if every_plan:
        for block_n in (16, 32, 64):
            for parts in (1, 2, 4, 8):
                for stages in (3, 5):
                    tiles = -(-outputs // block_n)
                    if 100 <= tiles * parts <= 1600 and inputs // 128 // parts >= 2:
                        warps = max(1, min(chosen.warps, block_n // 16))
                        one = replace(
                            chosen, block_n=block_n, parts=parts, stages=stages, warps=warps
                        )
                        found.append(one)
    return dict.fromkeys(found)


def _microseconds(runs: Sequence[Callable[[], Tensor]]) -> float:
    """Of one run, the best of several replays of a graph that goes through all of them."""
    calls = max(_CALLS, len(runs))

    def all_calls() -> None:
        for call in range(calls):
            runs[call % len(runs)]()

    graph = record(all_calls, device=torch.device("cuda"))
    best = float("inf")
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, 1e3 * begin.elapsed_time(end) / calls)
    return best


def _short(plan: Plan) -> str:
    return f"n{plan.block_n} m{plan.block_m} p{plan.parts} w{plan.warps} t{plan.stages}"


def to_json(environment: Mapping[str, str], found: list[Timed]) -> str:
    """Everything, for programs."""
    lines = [asdict(one) for one in found]
    return json.dumps({"environment": environment, "lines": lines}, indent=1) + "\n"


def to_markdown(device: str, found: list[Timed]) -> str:
    """Of each product, number of rows and weights: bf16, the table's choice, the fastest."""
    rows = []
    groups: dict[tuple[str, int, str], list[Timed]] = {}
    for one in found:
        groups.setdefault((one.product, one.rows, one.weights), []).append(one)
    for group in groups.values():
        best = min(group, key=lambda one: one.microseconds)
        for one in group:
            if one is best or one.chosen:
                mark = " (chosen)" if one.chosen else ""
                rows.append(
                    (
                        one.product,
                        str(one.rows),
                        one.weights,
                        one.way + mark,
                        f"{one.microseconds:.2f}",
                        f"{one.gigabytes_per_second:,.0f}",
                        one.plan,
                    )
                )
    return markdown_table(f"products with weights on {device}", _COLUMNS, rows)
