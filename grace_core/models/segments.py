"""Stretches of one sequence that attend within themselves: samples of a row, frames of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Consecutive stretches that cover a sequence."""

    lengths: list[int]
    """Tokens of each, known to the host, so that no kernel waits for the device to tell."""

    cumulative: Tensor
    """(len(lengths) + 1,) int32: where each begins, and the end; variable-length kernels' form."""

    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Segments of the given lengths, at least one, on the CPU."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(list(lengths), ends, max(lengths))

    @classmethod
    def joined(cls, parts: Sequence[Segments]) -> Segments:
        """The segments of several sequences one after the other, on the parts' device."""
        ends = [parts[0].cumulative]
        start = sum(parts[0].lengths)
        for part in parts[1:]:
            ends.append(part.cumulative[1:] + start)
            start += sum(part.lengths)
        lengths = [length for part in parts for length in part.lengths]
        return cls(lengths, torch.cat(ends), max(lengths))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Segments:
        """The same segments with their tensor moved: to a device, or to page-locked memory."""
        return replace(self, cumulative=move(self.cumulative))
