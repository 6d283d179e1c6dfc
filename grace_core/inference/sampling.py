"""Choosing the next token by chance, in proportion to what the model thinks of each."""

from __future__ import annotations

import torch
from torch import Tensor

from grace_core.errors import GraceError


class Sampler:
    """Draws tokens from softmax(logits / temperature), reproducibly.

    One generator serves all draws, so the same calls in the same order give the same tokens.
    """

    def __init__(self, temperature: float, *, seed: int, device: torch.device) -> None:
        """
        Args:
            temperature: above 0; 1 draws with the model's own probabilities, less makes likely
                tokens likelier.
            device: where the logits are.

        Raises:
            GraceError: the temperature is not above 0.
        """
        if not temperature > 0:
            raise GraceError(
                f"a temperature of {temperature} is not above 0; without a sampler, the likeliest "
                "token is taken"
            )
        self._temperature = temperature
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """A token for each row of (B, V) logits, (B,) int64; drawn in fp32."""
        chances = torch.softmax(logits.float() / self._temperature, dim=-1)
        return torch.multinomial(chances, 1, generator=self._generator)[:, 0]
