"""Compile the inference kernels for sm_90 with Triton's own assembler; run as a process.

Prints how many bytes of registers were spilled, which must be none: it would cost more than the
kernels save.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grace_core.inference import layer_kernels, packed_kernels, plans

HOPPER = GPUTarget("cuda", 90, 32)
BF16, FP32, INT16, INT64 = "*bf16", "*fp32", "*i16", "*i64"
PRODUCT = {
    "x": BF16,
    "halves": INT16,
    "scales": BF16,
    "bias": BF16,
    "x_stride": "i32",
    "N": "i32",
}
EXACT = frozenset(
    "halves scales x out product residual keys values turned sums x_stride N stride d D T".split()
)
"""Arguments that are multiples of 16, as in every model of today."""


def compiled(
    kernel: Any, types: dict[str, str], warps: int = 4, stages: int = 3, **own: Any
) -> Any:
    names = kernel.arg_names
    if "DEPENDENT" in names:
        own["DEPENDENT"] = True
    types = {name: kind for name, kind in types.items() if name in names}
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in own.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name in EXACT}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": "DEPENDENT" in names}
    return triton.compile(source, target=HOPPER, options=options)


def stack_bytes(kernel: Any) -> int:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"STACK:(\d+)", told.stdout)
    assert found is not None
    return int(found[1])


def products() -> list[Any]:
    made = []
    for bits in (4, 8):
        for rows in (8, 32, 64):
            plan = plans.plan_for(rows, 2048, 6144)
            made.append(
                compiled(
                    packed_kernels._tiles_kernel,
                    {**PRODUCT, "out": FP32, "M": "i32"},
                    plan.warps,
                    plan.stages,
                    K=6144,
                    BITS=bits,
                    GROUP=128,
                    BLOCK_M=plan.block_m,
                    BLOCK_N=plan.block_n,
                    PARTS=plan.parts,
                    STAGES=plan.stages,
                    LINES=packed_kernels.lines(6144, plan.parts, bits),
                    HAS_BIAS=True,
                    PAIRED=True,
                )
            )
        types = {"halves": INT16, "scales": BF16, "out": BF16, "S": "i32"}
        made.append(compiled(packed_kernels._expand_kernel, types, BITS=bits, GROUP=128, SLABS=16))
    return made


def layers() -> list[Any]:
    made = []
    for parts, product in ((1, BF16), (4, FP32)):
        sizes = {"stride": "i32", "d": "i32"}
        types = {"product": product, "residual": BF16, "weight": BF16, "out": BF16, "eps": "fp32"}
        made.append(
            compiled(
                layer_kernels._add_and_norm_kernel,
                types | sizes,
                8,
                PARTS=parts,
                ADDS=True,
                BLOCK=2048,
            )
        )
        tensors = ("query_norm", "key_norm", "cosines", "sines", "keys", "values", "out")
        numbers = ("stride", "H", "J", "D")
        made.append(
            compiled(
                layer_kernels._turn_kernel,
                {"product": product, "eps": "fp32", "turns": INT64, "places": INT64}
                | dict.fromkeys(tensors, BF16)
                | dict.fromkeys(numbers, "i32"),
                1,
                PARTS=parts,
                NORMS=True,
                BLOCK=128,
            )
        )
        made.append(
            compiled(
                layer_kernels._silu_times_kernel,
                {"product": product, "out": BF16} | sizes,
                PARTS=parts,
                BLOCK=1024,
            )
        )
    made.append(
        compiled(
            layer_kernels._attend_kernel,
            dict.fromkeys(("turned", "keys", "values"), BF16)
            | dict.fromkeys(("sums", "maxima", "weights"), FP32)
            | dict.fromkeys(("T", "S", "H", "J", "D"), "i32")
            | {"places": INT64, "scale": "fp32"},
            4,
            2,
            HEADS=16,
            BLOCK=128,
            TOKENS=64,
            STRETCH=layer_kernels.STRETCH,
        )
    )
    made.append(
        compiled(
            layer_kernels._join_kernel,
            dict.fromkeys(("sums", "maxima", "weights"), FP32)
            | {"out": BF16, "S": "i32", "D": "i32"},
            1,
            STRETCHES=4,
            BLOCK=128,
        )
    )
    return made


if __name__ == "__main__":
    print("spilled:", sum(stack_bytes(kernel) for kernel in (*products(), *layers())))
