"""A linear layer that computes with its fake-quantized weight.

Equations: :mod:`grace_core.quantization.lsq`. The weight is quantized in one of two ways:

*In every pass.* One autograd function covers quantizer and matrix product, because then nothing of
the weight's size has to live between forward and backward: both passes compute W_hat from the
latent weight and theta. The latent weight is saved as the parameter itself, which also makes the
layer right under ZeRO-3, where ``weight.data`` is gathered for the forward pass, released, and
gathered again for the backward pass.

*Once for an accumulation cycle.* :class:`~grace_core.quantization.cycle.QuantizationCycle` puts
W_hat in the weight's place, and the layer is an ordinary linear layer as long.

Shapes: M tokens (all leading dimensions together), O output features, I input features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grace_core.quantization.lsq import quantize, stored_scale
from grace_core.quantization.straight_through import GradientShare, map_gradients, quantize_layers


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` that computes x W_hat^T + bias with W_hat = fake-quantized ``weight``.

    To ZeRO, Hugging Face and the optimizer it is an ordinary linear layer with an ordinary latent
    ``weight``. ``theta`` is deliberately a plain attribute, neither parameter nor buffer: it
    belongs to a :class:`~grace_core.quantization.scales.ScaleBank` and stays fp32 whatever the
    model is cast to.

    Args:
        linear: the layer to replace; its parameters are shared, not copied.
        theta: (O, I / group_size) fp32 log-scales, a leaf.

    Attributes:
        holds_w_hat: ``weight`` is W_hat at present, not the latent weight. Gradients of ``weight``
            are then those of W_hat, and theta gets none, until the cycle maps them.
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
        self.holds_w_hat = False
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of ``input``."""
        if self.holds_w_hat:
            return F.linear(input, self.weight, self.bias)
        output: Tensor = _FakeQuantizedLinear.apply(
            input, self.weight, self.theta, self.bias, self.bits, self.group_size
        )
        return output

    def codes(self) -> Tensor:
        """The integer codes of the present weight and scales, int8 (O, I)."""
        assert not self.holds_w_hat, "the codes are those of the latent weight; end the cycle first"
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
        scales = stored_scale(theta).flatten()
        return F.linear(x, _w_hat(weight, scales, x.dtype, bits, group_size), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, theta = ctx.saved_tensors
        needs_x, needs_weight, needs_theta, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_theta = grad_bias = None
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])  # (M, O)

        scales = stored_scale(theta).flatten()
        if needs_x:
            w_hat = _w_hat(weight, scales, x.dtype, ctx.bits, ctx.group_size)
            grad_x = (grad_rows @ w_hat).view(x.shape)
        if needs_weight or needs_theta:
            grad_w_hat = (grad_rows.t() @ x.reshape(-1, x.shape[-1])).contiguous()
            of_theta = torch.empty_like(theta)
            map_gradients(
                [weight],
                scales,
                [GradientShare(0, grad_w_hat.view(-1))],
                of_theta.view(-1),
                bits=ctx.bits,
                group_size=ctx.group_size,
            )
            grad_theta = of_theta if needs_theta else None
            grad_weight = grad_w_hat.to(weight.dtype) if needs_weight else None
        if needs_bias:
            grad_bias = grad_rows.sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_theta, grad_bias, None, None


def _w_hat(
    weight: Tensor, scales: Tensor, dtype: torch.dtype, bits: int, group_size: int
) -> Tensor:
    w_hat = torch.empty_like(weight, dtype=dtype)
    quantize_layers([weight], scales, w_hat.view(-1), bits=bits, group_size=group_size)
    return w_hat
