"""Weights quantized once for an accumulation cycle, and their gradients mapped once at its end.

Weights and scales change only at the optimizer step. In between W_hat is computed once and put in
the place of the latent weights, so that every pass of the cycle, recomputation included, is that of
ordinary linear layers: no quantizer runs, and what accumulates in the weights' gradients is
dL/dW_hat. At the end the latent weights are put back and the accumulated gradient is mapped to
those of weights and scales (:mod:`grace_core.quantization.straight_through`).

W_hat costs memory of the quantized weights' size, 2 bytes each in bf16. The weights must be whole
for the length of a cycle, which under ZeRO-3 they are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grace_core.quantization.linear import QuantizedLinear
from grace_core.quantization.lsq import stored_scale
from grace_core.quantization.scales import ScaleBank
from grace_core.quantization.straight_through import GradientShare, map_gradients, quantize_layers


class QuantizationCycle:
    """All quantized layers of a model, over one accumulation cycle after the other::

        with cycle.weights_quantized():
            ...  # forward and backward passes
        cycle.map_gradients(shares)
        ...  # step scales and weights

    W_hat exists within the block alone, so one that is older than its weights cannot be used.
    """

    def __init__(self, model: nn.Module, bank: ScaleBank) -> None:
        """
        Args:
            model: has the quantized layers that the bank holds the scales of.
        """
        layers = {}
        for name in bank:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear) and layer.theta is bank.layer(name), name
            layers[name] = layer
        (self._bits,) = {layer.bits for layer in layers.values()}
        (self._group_size,) = {layer.group_size for layer in layers.values()}
        self._layers = list(layers.values())
        self._bank = bank
        weights = self.weights
        assert all(
            weight.shape == (layer.out_features, layer.in_features)
            for weight, layer in zip(weights, self._layers, strict=True)
        ), "the weights are sharded; they are quantized in every pass"
        # Made here, so that whoever shares out what memory is left sees it taken.
        self._buffer = torch.empty(
            sum(weight.numel() for weight in weights),
            dtype=weights[0].dtype,
            device=weights[0].device,
        )
        self._scales: Tensor | None = None
        self._version = -1

    @property
    def weights(self) -> list[Tensor]:
        """The layers' weight parameters, in the order in which shares are given."""
        return [layer.weight for layer in self._layers]

    @contextmanager
    def weights_quantized(self) -> Iterator[None]:
        """Have W_hat in the place of the weights; the latent ones are back afterwards."""
        self.quantize()
        # `data` is what ZeRO too replaces: parameter, gradient and hooks stay what they are.
        latent = [layer.weight.data for layer in self._layers]
        w_hats = self._buffer.split([weight.numel() for weight in latent])
        try:
            for layer, weight, w_hat in zip(self._layers, latent, w_hats, strict=True):
                layer.weight.data = w_hat.view_as(weight)
                layer.holds_w_hat = True
            yield
        finally:
            for layer, weight in zip(self._layers, latent, strict=True):
                layer.weight.data = weight
                layer.holds_w_hat = False

    def quantize(self) -> None:
        """Compute W_hat of all layers, in the weights' dtype."""
        weights = [weight.data for weight in self.weights]
        assert not any(layer.holds_w_hat for layer in self._layers), "a cycle is under way"
        self._scales, self._version = stored_scale(self._bank.flat), self._bank.flat._version
        quantize_layers(
            weights, self._scales, self._buffer, bits=self._bits, group_size=self._group_size
        )

    def map_gradients(self, shares: Sequence[GradientShare | None]) -> None:
        """Turn the cycle's dL/dW_hat into dL/dW, in place, and into ``bank.flat.grad``.

        Args:
            shares: of each of :attr:`weights`, in this order, what is held here of its accumulated
                gradient. The gradient of a group's scale is that of its share.
        """
        scales, self._scales = self._scales, None
        assert scales is not None, "gradients are mapped once in a cycle, after its passes"
        assert self._version == self._bank.flat._version, "the scales changed within the cycle"
        weights = [weight.data for weight in self.weights]
        assert not any(layer.holds_w_hat for layer in self._layers), "the cycle is still under way"
        gradient = self._bank.flat.grad
        assert gradient is not None
        map_gradients(
            weights, scales, shares, gradient, bits=self._bits, group_size=self._group_size
        )
