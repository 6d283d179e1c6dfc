"""Steps of decoding as CUDA graphs: the whole step is launched at once.

A step of a small model is a thousand kernels, each shorter than its own launch. A graph has fixed
shapes and addresses, so rows and columns of the cache come in few sizes, and what a step reads and
writes lies in tensors that stay where they are.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from grace_core.evaluation.engine.decoding import Decoder, EagerSteps, State
from grace_core.evaluation.engine.key_values import KeyValues
from grace_core.models.cuda_graph import record

log = logging.getLogger(__name__)

_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_COLUMNS = 64
"""Columns come in multiples of this, which is also an alignment that all kernels accept."""

_HELD = 64
"""Graphs kept, the least recently used leaving first; each takes some megabytes."""


class GraphSteps:
    """See `Steps`; a graph for each size of the cache, captured when it is first met."""

    stride = 4

    def __init__(self, decoder: Decoder, cache: KeyValues) -> None:
        self._decoder = decoder
        self._cache = cache
        self._held: OrderedDict[tuple[int, int], _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._eager = EagerSteps(decoder, cache)
        self._obstacle: str | None = None

    @staticmethod
    def rows(count: int) -> int:
        """The next size that graphs come in."""
        return _ROWS[bisect_left(_ROWS, count)] if count <= _ROWS[-1] else count

    @staticmethod
    def columns(count: int) -> int:
        """The next size that graphs come in."""
        return -(-count // _COLUMNS) * _COLUMNS

    def run(self, state: State, count: int) -> Tensor:
        """See `Steps.run`."""
        captured = self._of(self._cache.rows, self._cache.columns)
        if captured is None:
            return self._eager.run(state, count)
        return captured.run(state, count)

    def _of(self, rows: int, columns: int) -> _Captured | None:
        if self._obstacle is not None:
            return None
        shape = (rows, columns)
        if shape not in self._held:
            try:
                self._held[shape] = _Captured(self._decoder, self._cache, self._pool)
            except RuntimeError as error:
                self._obstacle = str(error).splitlines()[0]
                log.warning(
                    "decoding goes on without CUDA graphs, slower by the launches of its kernels: "
                    "a step could not be captured (%s)",
                    self._obstacle,
                )
                return None
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(shape)
        return self._held[shape]


class FixedStep:
    """One step in tensors that stay where they are, for the cache as it is sized now."""

    def __init__(self, decoder: Decoder, cache: KeyValues) -> None:
        device, rows, columns = decoder.device, cache.rows, cache.columns
        self._decoder, self._cache = decoder, cache
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, dtype=torch.long, device=device)
        self._mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._starts = torch.arange(rows, device=device) * columns
        self.rest()

    def rest(self) -> None:
        """What runs before a state is loaded writes the last column, which nobody sees yet."""
        self._column.fill_(self._cache.columns - 1)

    def compute(self) -> None:
        """The step itself; nothing in it depends on the host."""
        self._mask.index_fill_(1, self._column, True)
        self._cache.write_column(self._starts + self._column, self._cache.columns)
        mask = self._mask[:, None, None]
        made = self._decoder.step(self._tokens, self._positions, self._cache, mask)
        self._tokens.copy_(made)
        self._positions += 1
        self._column += 1

    def run(self, state: State, count: int) -> Tensor:
        """See `Steps.run`."""
        self._tokens.copy_(state.tokens)
        self._positions.copy_(state.positions)
        self._mask.copy_(state.mask)
        self._column.fill_(state.column)
        made = []
        for _ in range(count):
            self.launch()
            made.append(self._tokens.clone())
        state.tokens, state.positions = made[-1], self._positions.clone()
        state.mask.copy_(self._mask)
        state.column += count
        return torch.stack(made)

    def launch(self) -> None:
        """Compute one step."""
        self.compute()


class _Captured(FixedStep):
    """The same step as a graph."""

    def __init__(self, decoder: Decoder, cache: KeyValues, pool: Any) -> None:
        super().__init__(decoder, cache)
        self._graph = record(self.compute, device=decoder.device, restore=self.rest, pool=pool)

    def launch(self) -> None:
        self._graph.replay()
