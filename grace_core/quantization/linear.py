"""A linear layer whose weight is fake-quantized in every forward pass.

Equations: :mod:`grace_core.quantization.lsq`. One autograd function covers quantizer and matrix
product, because then nothing of the weight's size has to live between forward and backward: both
passes compute W_hat from the latent weight and theta. The latent weight is saved as the parameter
itself, which also makes the layer right under ZeRO-3, where ``weight.data`` is gathered for the
forward pass, released, and gathered again for the backward pass.

Shapes: M tokens (all leading dimensions together), O output features, I input features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grace_core.quantization.lsq import code_range, grouped, quantize, stored_scale


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` that computes x W_hat^T + bias with W_hat = fake-quantized ``weight``.

    To ZeRO, Hugging Face and the optimizer it is an ordinary linear layer with an ordinary latent
    ``weight``. ``theta`` is deliberately a plain attribute, neither parameter nor buffer: it
    belongs to a :class:`~grace_core.quantization.scales.ScaleBank` and stays fp32 whatever the
    model is cast to.

    Args:
        linear: the layer to replace; its parameters are shared, not copied.
        theta: (O, I / group_size) fp32 log-scales, a leaf.
    """

    theta: Tensor

    def __init__(self, linear: nn.Linear, theta: Tensor, *, bits: int, group_size: int) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        assert theta.shape == (self.out_features, self.in_features // group_size)
        assert theta.dtype == torch.float32 and theta.is_leaf
        self.weight = linear.weight
        self.bias = linear.bias
        self.theta = theta
        self.bits = bits
        self.group_size = group_size
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of ``input``."""
        output: Tensor = _FakeQuantizedLinear.apply(
            input, self.weight, self.theta, self.bias, self.bits, self.group_size
        )
        return output

    def codes(self) -> Tensor:
        """The integer codes of the present weight and scales, int8 (O, I)."""
        return quantize(self.weight, stored_scale(self.theta), self.bits, self.group_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


class _FakeQuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        theta: Tensor,
        bias: Tensor | None,
        bits: int,
        group_size: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, theta)
        ctx.bits, ctx.group_size = bits, group_size
        ctx.bias_dtype = None if bias is None else bias.dtype
        step = stored_scale(theta).float().unsqueeze(-1)
        ratio = grouped(weight, group_size) / step  # promoted to fp32
        w_hat = ratio.round_().clamp_(*code_range(bits)).mul_(step).to(x.dtype).flatten(1)
        return F.linear(x, w_hat, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, theta = ctx.saved_tensors
        needs_x, needs_weight, needs_theta, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_theta = grad_bias = None
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])  # (M, O)

        step = stored_scale(theta).float().unsqueeze(-1)
        ratio = grouped(weight, ctx.group_size) / step
        rounded = ratio.round()
        codes = rounded.clamp(*code_range(ctx.bits))
        if needs_x:
            grad_x = (grad_rows @ (codes * step).to(x.dtype).flatten(1)).view(x.shape)
        if needs_weight or needs_theta:
            outside = codes != rounded
            grad_w_hat = grouped(grad_rows.t() @ x.reshape(-1, x.shape[-1]), ctx.group_size)
            if needs_theta:
                # dW_hat/ds: round(v) - v inside, the clipped code itself outside.
                slope = codes.sub_(ratio.masked_fill_(outside, 0.0))
                grad_theta = slope.mul_(grad_w_hat).mul_(step).sum(dim=-1)
            if needs_weight:
                grad_weight = grad_w_hat.masked_fill_(outside, 0.0).flatten(1).to(weight.dtype)
        if needs_bias:
            grad_bias = grad_rows.sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_theta, grad_bias, None, None
