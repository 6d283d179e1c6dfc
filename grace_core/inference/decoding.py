"""Rows of tokens that grow side by side: prompts put in, then one token a row with each step.

Keys and values lie in a cache of fixed size, so that on a GPU a step is one CUDA graph: recorded
once, started by one call. Rows are independent: a prompt may be put into any of them at any time,
while the others are in the midst of an answer, and an answer depends on its row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grace_core.errors import GraceError
from grace_core.inference.decoder import Decoder, PictureFeatures, Placed
from grace_core.inference.sampling import Sampler
from grace_core.models.cuda_graph import record
from grace_core.models.rows import PackedRow

_MULTIPLE = 16
"""Kernels read addresses that are multiples of it more at a time."""


class Decoding:
    """State of `rows` rows of at most `capacity` tokens, prompts included."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: int,
        capacity: int,
        graph: bool | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        """Take the memory.

        Args:
            capacity: rounded up to a multiple of 16.
            graph: record a step as a CUDA graph; by default wherever there is a GPU.
            sampler: chooses the tokens; by default the likeliest one is taken. It draws for all
                rows at once, so what a row draws depends on the others.

        Memory: 4 x layers x rows x capacity x key-value heads x head width bytes in bf16.
        """
        self.decoder = decoder
        capacity = -(-capacity // _MULTIPLE) * _MULTIPLE
        self.rows, self.capacity = rows, capacity
        device = decoder.device
        self._records = device.type == "cuda" if graph is None else graph
        size = (len(decoder.layers), rows, capacity, decoder.kept_heads, decoder.head_width)
        # Zeros: what no token has been put into is read, and weighted by nothing.
        self._keys = torch.zeros(size, dtype=decoder.dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        self._cosines, self._sines = decoder.rotary_table(capacity)
        self._begins = torch.arange(rows, device=device) * capacity
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        """(rows,) int64: each row's newest token, not yet put through the decoder. May be
        overwritten, in place, by another choice."""
        self._places = self._begins.clone()
        self._turns = torch.zeros_like(self.tokens)
        self.logits = torch.zeros(rows, decoder.vocabulary, dtype=decoder.dtype, device=device)
        """(rows, V): what `tokens` were chosen by."""
        self._sampler = sampler
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def put(
        self, row: PackedRow, into: Sequence[int], *, features: PictureFeatures | None = None
    ) -> None:
        """Run prompts and start these rows anew with them.

        Args:
            row: the prompts, see `prompts.prompt_row`; on any device.
            into: the row of each.
            features: of the pictures, where they are known already.

        Raises:
            GraceError: a prompt leaves no room for an answer.
        """
        lengths = row.samples.lengths
        assert len(lengths) == len(into) == len(set(into))
        self._put(row, into, 0, features)

    @torch.inference_mode()
    def extend(self, rest: PackedRow, row: int, held: int) -> None:
        """Go on with what a row holds already: run the rest of a prompt after its first tokens.

        Args:
            rest: of one prompt, see `prompts.rest_of_prompt`; on any device.
            row: that it goes into.
            held: tokens of the row that stay, at least 1; further ones are overwritten.

        Raises:
            GraceError: the whole prompt leaves no room for an answer.
        """
        assert len(rest.samples.lengths) == 1 and held > 0
        self._put(rest, [row], held, None)

    def _put(
        self,
        row: PackedRow,
        into: Sequence[int],
        held: int,
        features: PictureFeatures | None,
    ) -> None:
        lengths = row.samples.lengths
        longest = held + max(lengths)
        if longest >= self.capacity:
            raise GraceError(
                f"a prompt of {longest} tokens leaves no room for an answer: rows hold "
                f"{self.capacity} tokens"
            )
        device = self.decoder.device
        # One past the highest position: after a picture, positions fall behind places.
        ends = [int(part.max()) + 1 for part in row.position_ids.cpu().split(lengths, dim=-1)]
        rows = torch.tensor(list(into))
        places = torch.cat(
            [
                torch.arange(held, held + length) + index * self.capacity
                for index, length in zip(into, lengths, strict=True)
            ]
        )
        states = self.decoder.first_states(
            row.to(device),
            self._keys.flatten(1, 2),
            self._values.flatten(1, 2),
            places.to(device),
            features,
            before=slice(into[0] * self.capacity, into[0] * self.capacity + held),
        )
        rows = rows.to(device)
        logits = self.decoder.logits(states)
        self.logits[rows] = logits
        self.tokens[rows] = logits.argmax(-1) if self._sampler is None else self._sampler(logits)
        filled = torch.tensor(lengths, device=device) + held
        self._places[rows] = self._begins[rows] + filled
        self._turns[rows] = torch.tensor(ends, device=device)

    @torch.inference_mode()
    def step(self) -> None:
        """Put every row's newest token through the decoder and choose the next.

        A row that is full stays where it is and goes on overwriting its last place.
        """
        if not self._records:
            self._step()
        else:
            if self._graph is None:
                self._graph = self._recorded()
            self._graph.replay()
        if self._sampler is not None:
            self.tokens.copy_(self._sampler(self.logits))

    def _step(self) -> None:
        placed = Placed(self._places, self._cosines, self._sines, self._turns)
        states = self.decoder.next_states(self.tokens, placed, self._keys, self._values)
        self.logits.copy_(self.decoder.logits(states))
        torch.argmax(self.logits, dim=-1, out=self.tokens)
        full = self._begins + (self.capacity - 1)
        torch.minimum(self._places + 1, full, out=self._places)
        self._turns.add_(1).clamp_(max=self.capacity - 1)

    def _recorded(self) -> torch.cuda.CUDAGraph:
        state = [self.tokens, self._places, self._turns, self.logits]
        before = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        return record(self._step, device=self.decoder.device, restore=restore)
