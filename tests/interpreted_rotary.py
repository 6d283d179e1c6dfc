"""Compare Liger-Kernel's rotary kernel, interpreted on the CPU, with its twin; run as a script.

python interpreted_rotary.py HEAD_WIDTH DTYPE_OF_STATES DTYPE_OF_ANGLES
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from liger_kernel import ops

from grace_core.models.kernels import liger_kernels, turn


def main(width: int, states: torch.dtype, angles: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, heads, fewer = 5, 3, 1
    angle = torch.randn(1, tokens, width // 2).repeat(1, 1, 2)
    cos, sin = angle.cos().to(angles), angle.sin().to(angles)
    fused = liger_kernels(ops).turn
    # One projection that queries, keys and values are views of, as in a vision tower; and one each.
    joint = torch.randn(1, tokens, 3, heads, width).to(states)
    apart = (
        torch.randn(1, tokens, heads, width).to(states),
        torch.randn(1, tokens, fewer, width).to(states),
    )
    for made in (lambda: joint.clone().unbind(2)[:2], lambda: tuple(x.clone() for x in apart)):
        results = []
        for function in (turn, fused):
            query, key = (x.requires_grad_() for x in made())
            turned = function(query * 1, key * 1, cos, sin)
            weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(states) for x in turned]
            loss = sum((x * w).sum() for x, w in zip(turned, weights, strict=True))
            results.append([*turned, *torch.autograd.grad(loss, (query, key))])
        for expected, found in zip(*results, strict=True):
            assert found.dtype == expected.dtype and found.shape == expected.shape
            tolerance = 1e-6 if states == torch.float32 else 2**-7
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), getattr(torch, sys.argv[3]))
