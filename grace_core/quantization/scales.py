"""The learned log-scales of a whole model, kept in fp32 outside of it.

DeepSpeed's bf16 mode casts every parameter and buffer of the module it is given. Near theta = -5
one bf16 step is 0.03, which would make scales move in jumps of 1.5-3 %. The scales are therefore
neither parameters nor buffers of the model: a :class:`ScaleBank` owns them, and the quantized
layers merely refer to their share.

All groups of all layers lie in one flat tensor with one flat gradient, so that the all-reduce over
ranks, the clipping and the optimizer step are one operation each. A layer's ``theta`` is a leaf of
its own over a slice of that storage: no autograd graph runs through the slicing, and the layer's
gradient accumulates straight into the flat one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn

from grace_core.errors import GraceError


class ScaleBank:
    """fp32 log-scales (theta = log s) by layer name, backed by one flat tensor.

    Attributes:
        flat: (total groups,) fp32 parameter for the optimizer. ``flat.grad`` is the buffer into
            which the layers' gradients accumulate; an all-reduce or a clipping may change it in
            place. Clear it with :meth:`zero_grad`, not with the optimizer's ``zero_grad``, which
            would drop the buffer.
    """

    def __init__(self, thetas: Mapping[str, Tensor]) -> None:
        """Copy the given log-scales, (O, G) fp32 each, all on one device."""
        assert thetas, "a scale bank needs at least one layer"
        assert all(theta.dtype == torch.float32 for theta in thetas.values())
        flat = torch.cat([theta.detach().reshape(-1) for theta in thetas.values()])
        self.flat = nn.Parameter(flat)
        self._grad = torch.zeros_like(flat)
        self._leaves = {
            name: view.requires_grad_()
            for name, view in _slices(
                self.flat.detach(), {name: theta.shape for name, theta in thetas.items()}
            )
        }
        self._attach_gradients()

    def __len__(self) -> int:
        return len(self._leaves)

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __deepcopy__(self, memo: object) -> NoReturn:
        # The copy's leaves would no longer share storage with its flat tensor, nor with any model.
        raise TypeError("convert the copied model and use load_state_dict to copy a ScaleBank")

    def layer(self, name: str) -> Tensor:
        """The (O, G) leaf of one layer, the same object at every call."""
        return self._leaves[name]

    def zero_grad(self) -> None:
        """Zero all gradients in place, and attach them again should they have been dropped."""
        self._grad.zero_()
        self._attach_gradients()

    def to(self, device: torch.device | str) -> ScaleBank:
        """Move scales and gradients in place; references to leaves and ``flat`` stay valid."""
        self.flat.grad = None
        for leaf in self._leaves.values():
            leaf.grad = None
        self.flat.data = self.flat.data.to(device)
        self._grad = self._grad.to(device)
        for name, view in _slices(self.flat.data, self._shapes()):
            self._leaves[name].data = view
        self._attach_gradients()
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the log-scales by layer name, (O, G) fp32 each."""
        return {name: leaf.detach().clone() for name, leaf in self._leaves.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over log-scales bit for bit.

        Raises:
            GraceError: a layer is missing or unknown, or a shape or dtype differs. All such
                differences are listed, and nothing is changed.
        """
        problems = [f"{name}: missing" for name in self._leaves if name not in state]
        problems += [f"{name}: not a quantized layer here" for name in state if name not in self]
        for name, leaf in self._leaves.items():
            value = state.get(name)
            if value is None:
                continue
            if value.shape != leaf.shape:
                problems.append(f"{name}: shape {tuple(value.shape)}, expected {tuple(leaf.shape)}")
            elif value.dtype != torch.float32:
                problems.append(f"{name}: dtype {value.dtype}, expected torch.float32")
        if problems:
            raise GraceError(
                "These scales do not fit the model; use the ones saved with it, at the same group "
                "size:\n" + "\n".join(f"  - {problem}" for problem in problems)
            )
        for name, leaf in self._leaves.items():
            leaf.copy_(state[name])

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: leaf.shape for name, leaf in self._leaves.items()}

    def _attach_gradients(self) -> None:
        self.flat.grad = self._grad
        for name, view in _slices(self._grad, self._shapes()):
            self._leaves[name].grad = view


def _slices(flat: Tensor, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Consecutive views of ``flat`` in the given shapes, which fill it exactly."""
    start = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        yield name, flat.narrow(0, start, size).view(shape)
        start += size
    assert start == flat.numel()
